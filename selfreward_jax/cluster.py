"""What a machine says of the job that it runs: whether there are several processes, and where process 0 is."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from selfreward_jax.errors import UserError

_GOOGLE = "0x1ae0"  # the PCI vendor; its network cards and disks (classes 0x02 and 0x01) are in every virtual machine
_BY_HAND = "or give --coordinator, --num_processes and --process_id"


class Found(NamedTuple):
    """HOST:PORT of process 0, how many processes there are, and which one this is."""

    coordinator: str
    count: int
    index: int


def several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables say that this is one process of several."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return (
        any(number(name) > 1 for name in tasks)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or _kubernetes(environment)
    )


def _kubernetes(environment: Mapping[str, str]) -> bool:
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def has_tpu(environment: Mapping[str, str], dev: str = "/dev", pci: str = "/sys/bus/pci/devices") -> bool:
    """Whether this host has TPU chips that jax will use: it may be one of a slice, and only its metadata tell.

    Chips up to v5 are /dev/accelN or /dev/vfio/N, later ones /dev/vfio/N, as other devices are that a virtual machine
    gets whole: there the PCI vendor decides.
    """
    if environment.get("JAX_PLATFORMS", "tpu") in ("cpu", "cuda"):
        return False
    if glob.glob(f"{dev}/accel[0-9]*"):
        return True
    return bool(glob.glob(f"{dev}/vfio/[0-9]*")) and any(
        _read(f"{device}/vendor") == _GOOGLE and _read(f"{device}/class")[:4] not in ("0x01", "0x02")
        for device in glob.glob(f"{pci}/*")
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # a device that has just gone
        return ""


def find(environment: Mapping[str, str], timeout: int) -> Found | None:
    """Where the job's processes meet, as jax finds it out; None if this jax cannot be asked before it starts.

    Raises:
        UserError: if this is one process of several, and the others cannot be found.
    """
    try:  # jax has no public name for it; tested with 0.10 and 0.11
        from jax._src.clusters import ClusterEnv

        ask = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None
    try:
        address, count, index, _ = ask(os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout)
    except TypeError:
        return None
    except Exception as error:  # whatever the cluster's client raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the job's other processes cannot be found ({reason}); mend that, {_BY_HAND}") from error
    if address and count is not None and index is not None:
        return Found(address, count, index)
    if _kubernetes(environment):
        raise UserError(f"the job's other processes cannot be found: `pip install 'selfreward-jax[k8s]'`, {_BY_HAND}")
    if several(environment):
        raise UserError(
            f"this is one process of several, and the others cannot be found; start it otherwise, {_BY_HAND}"
        )
    return Found("", 1, 0)  # a TPU without metadata: one host
