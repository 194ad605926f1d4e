"""Which mesh for how many devices: for training by the rows of a batch, for generation by what fits one device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfreward_jax.sharding.mesh import Sizes
from selfreward_jax.sharding.rules import GENERATION, STORED, Rules, misfits

# Weights may take this much of a device while sampling; the rest is for the KV cache and a prefill's activations.
_WEIGHTS_SHARE = 0.5


def training(devices: int, extents: Mapping[str, int], rows: int) -> Sizes:
    """Mesh sizes for training: as much `fsdp` as the examples of an update fill, `tensor` for what is left.

    A shard of rows that an update leaves empty is a device that computes padding, so those are fewest first. Then
    fewest replicas (`data`), since parameters, gradients and moments fit where they are cut finest. Then least
    `tensor`, whose all-reduces of activations lie between all matmuls, where `fsdp` gathers weights ahead of them.

    Args:
        extents: size of each logical axis of the model (`rules.extents`).
        rows: that an update may have: its examples.
    """

    def cost(sizes: Sizes) -> tuple[int, int, int]:
        shards = sizes[0] * sizes[1]
        return -rows % shards, sizes[0], sizes[2]

    return min(_possible(devices, extents, STORED), key=cost)


def generation(devices: int, extents: Mapping[str, int], weight_bytes: int, device_bytes: int) -> Sizes:
    """Mesh sizes for sampling: weights in as few pieces as fit, every other factor of the devices samples rows of its own.

    Args:
        weight_bytes: of the whole model in the compute dtype.
        device_bytes: memory of one device; 0: unknown, so taken to be enough.
    """

    def cost(sizes: Sizes) -> tuple[float, int, int]:
        pieces = sizes[1] * sizes[2]
        over = weight_bytes / pieces / (_WEIGHTS_SHARE * device_bytes) if device_bytes else 0.0
        return max(1.0, over), pieces, sizes[1]  # fits least badly, then fewest pieces, then kv heads apart

    fitting = (sizes for sizes in _possible(devices, extents, GENERATION) if whole_heads(sizes, extents))
    return min(fitting, key=cost)


def whole_heads(sizes: Sizes, extents: Mapping[str, int]) -> bool:
    """Whether each device's query heads read whole kv heads, or all read one: what `attention.attend` can do."""
    shared = extents["q_heads"] // extents["kv_heads"]
    mine = extents["q_heads"] // (sizes[1] * sizes[2])
    return mine % shared == 0 or shared % mine == 0


def memory_here() -> int:
    """Bytes that the devices of this job hold together if all hosts are as this one, 0 if they don't tell; on a CPU the
    machine's memory."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum((device.memory_stats() or {}).get("bytes_limit", 0) for device in devices) * jax.process_count()


def memory_of_a_device() -> int:
    """Bytes of one device on the host that has least, 0 if they don't tell; all processes must call this."""
    return int(multihost_utils.process_allgather(np.float32(memory_here() // jax.device_count())).min())


def _possible(devices: int, extents: Mapping[str, int], rules: Rules) -> Iterator[Sizes]:
    """All mesh sizes over the devices that divide the model; (devices, 1, 1) always does."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp in divisors:
        for tensor in divisors:
            sizes = {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
            if devices % (fsdp * tensor) == 0 and not misfits(extents, sizes, rules):
                yield sizes["data"], fsdp, tensor
