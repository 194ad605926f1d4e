"""What a stage's record says of the program, the machine and the flags that made it: enough to make the same bytes again."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from selfreward_jax import processes, workdir

PACKAGES = (
    "selfreward-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint",
    "grain", "transformers", "tokenizers", "datasets", "numpy",
)  # fmt: skip
# Variables that change what XLA makes of a program, or where it runs. No others are recorded: some hold keys.
FLAGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DISABLE_JIT", "JAX_THREEFRY_PARTITIONABLE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


def made_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, devices, flags that are set, and the hash of the whole config.

    Args:
        config: all fields by dotted name (`config.flat`).
    """
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := _version(name))},
        "devices": f"{len(devices)} {devices[0].platform}: {devices[0].device_kind}",
        "processes": processes.count(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "config": workdir.digest(dict(config)),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
