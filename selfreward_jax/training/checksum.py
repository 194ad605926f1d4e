"""Sums over the bits of arrays, computed where they lie: what says that a checkpoint came back as it was saved.

Whole numbers modulo 2^32 add up to the same in any order, so a sum is the same on every mesh, and an accelerator
computes it at the speed of its memory. Orbax's files have no such sum of their own over an array.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfreward_jax.sharding.place import fetch

_MIX = 2654435769  # 2^32 over the golden ratio: neighbours get multipliers that are far apart
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def sums(tree: Any, mesh: jax.sharding.Mesh) -> np.ndarray:
    """The sum of each array of a tree.

    Each word counts times an odd number that depends on its place: one changed bit always changes the sum, and words that
    were exchanged, cut off or zeroed do but for one time in 2^32.

    Returns:
        `[n]` uint32, on every process alike (all must call this).
    """
    with jax.set_mesh(mesh):
        return fetch(_sums(jax.tree.leaves(tree)), mesh)


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    """One program: of many at once, each with its collective, processes of several CPU devices hang."""
    return jnp.stack([_sum(array) for array in arrays])


def _sum(array: jax.Array) -> jax.Array:
    if array.ndim < 3:
        return _part(array, jnp.uint32(0))
    each = math.prod(array.shape[1:]) % 2**32  # layer by layer: a CPU holds a part's terms in memory

    def add(total: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, part = layer
        return total + _part(part, number * jnp.uint32(each)), None

    return jax.lax.scan(add, jnp.uint32(0), (jnp.arange(len(array), dtype=jnp.uint32), array))[0]


def _part(array: jax.Array, first: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros_like(words)
    for axis, size in enumerate(words.shape):
        # Split as the array is: whole on each device it would not fit.
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis, out_sharding=jax.typeof(words).sharding)
        place = place * jnp.uint32(size) + here
    mixed = (place + first) * jnp.uint32(_MIX)
    odd = (mixed ^ (mixed >> 15)) | jnp.uint32(1)
    return jnp.sum((words + jnp.uint32(1)) * odd, dtype=jnp.uint32)
