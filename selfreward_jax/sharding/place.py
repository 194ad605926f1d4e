"""Host arrays onto the mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.sharding.rules import BATCH


def rows_multiple(mesh: jax.sharding.Mesh) -> int:
    """Rows of a batch are a multiple of this many, one or more for each (data, fsdp) shard."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Puts a host array on the mesh, rows split over (data, fsdp); every process holds the whole host array."""
    sharding = NamedSharding(mesh, P(BATCH, *(None,) * (array.ndim - 1)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
