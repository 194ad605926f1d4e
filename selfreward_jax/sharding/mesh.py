"""The device mesh: explicit axes `(data, fsdp, tensor)`, 1x1x1 on a laptop, one code path everywhere."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

from selfreward_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
Sizes = tuple[int, int, int]


def make_mesh(data: int, fsdp: int, tensor: int, option: str = "--config.mesh") -> Mesh:
    """Builds the mesh over all devices of all processes.

    Explicit axis types make shardings part of array types: in Auto mode gradients and optimizer moments were seen
    to lose their fsdp axis.

    Args:
        data, fsdp, tensor: sizes of the axes; at most one is -1 and takes the devices that are left.
        option: what errors name.

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    return jax.make_mesh(full_sizes((data, fsdp, tensor), option), AXES, axis_types=(AxisType.Explicit,) * 3)


def full_sizes(sizes: Sizes, option: str) -> Sizes:
    """Sizes with a -1 filled in, checked against the devices."""
    devices = jax.device_count()
    shape = "x".join(map(str, sizes))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or devices % known:
        raise UserError(f"{option}: mesh {shape} does not divide {devices} devices; use one -1 for the rest")
    data, fsdp, tensor = (devices // known if size == -1 else size for size in sizes)
    if data * fsdp * tensor != devices:
        raise UserError(f"{option}: mesh {shape} needs {known} devices, there are {devices}; use one -1 for the rest")
    return data, fsdp, tensor


def regrouped(mesh: Mesh, sizes: Sizes) -> Mesh:
    """The same devices in the same order under other axis sizes: moving arrays between the two is one program."""
    if tuple(mesh.shape.values()) == sizes:
        return mesh
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * 3)


def shape_of(mesh: Mesh) -> str:
    """`data 1 x fsdp 4 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
