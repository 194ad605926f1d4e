"""Host arrays onto the mesh, arrays from one layout to another, and results back to every host."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.sharding.rules import STORED, Rules, mesh_axes


def rows_multiple(mesh: jax.sharding.Mesh, rules: Rules = STORED) -> int:
    """Rows of a batch are a multiple of this many: one or more for each shard of rows."""
    return math.prod(mesh.shape[name] for name in mesh_axes(rules["rows"]))


def place(array: np.ndarray, mesh: jax.sharding.Mesh, rules: Rules = STORED) -> jax.Array:
    """Puts a host array on the mesh, its rows split as the table says; every process holds the whole host array."""
    sharding = NamedSharding(mesh, P(rules["rows"], *(None,) * (array.ndim - 1)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Puts a host array whole on each device of the mesh."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda index: array[index])


def from_each(value: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """`[devices]` int32: on each device the value of the process that it belongs to."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.asarray([value], np.int32))


def fetch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays on the mesh as whole numpy arrays, on every process alike (all must call this)."""
    return jax.device_get(_gather(mesh)(tree))


@lru_cache
def _gather(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def move(tree: Any, target: Any, dtype: str) -> Any:
    """Lays arrays out anew, cast first so that fewer bytes move: device to device, one array at a time.

    The arrays of `tree` are donated: each is gone as soon as it has moved, so that at most one lies twice.

    Args:
        tree: arrays on a mesh.
        target: tree of `NamedSharding`, on the same mesh or one of the same devices in the same order (`mesh.regrouped`).
        dtype: of the result.
    """
    leaves, structure = jax.tree.flatten(tree)
    del tree
    moved = []
    for index, sharding in enumerate(structure.flatten_up_to(target)):
        array, leaves[index] = leaves[index], None
        if array.sharding == sharding and array.dtype == dtype:
            moved.append(array)
            continue
        with jax.set_mesh(array.sharding.mesh):  # the source's: the cast is computed where the array lies
            moved.append(_moving(sharding, dtype)(array))
        array.delete()  # donation by hand: memory of another size can't be taken over, only freed
    return structure.unflatten(moved)


@lru_cache
def _moving(sharding: NamedSharding, dtype: str) -> Any:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)
