"""The device mesh: explicit axes `(data, fsdp, tensor)`, 1x1x1 on a laptop, one code path everywhere."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from selfreward_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Builds the mesh over all devices.

    Explicit axis types make shardings part of array types: in Auto mode gradients and optimizer moments were seen
    to lose their fsdp axis.

    Args:
        data, fsdp, tensor: sizes of the axes; at most one is -1 and takes the devices that are left.

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.device_count()
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) > 1 or known < 1 or devices % known:
        raise UserError(f"mesh {data}x{fsdp}x{tensor} does not divide {devices} devices; use one -1 for the rest")
    sizes = [devices // known if size == -1 else size for size in sizes]
    if sizes[0] * sizes[1] * sizes[2] != devices:
        raise UserError(f"mesh {data}x{fsdp}x{tensor} needs {known} devices, this host has {devices}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3)
