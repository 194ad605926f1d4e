"""Attention over one or more blocks of keys: the same function trains, prefills and decodes.

A block holds keys and values of G groups; row b of the queries reads group `b // (B / G)`. So a rubric that all
judgments share is a block with G = 1, the prompt of N candidates one with G = B / N, a row's own tokens one with
G = B: nothing is copied, and a shared block is read once for its rows. Masks are positions: a query sees the keys
whose position is not after its own.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# The position of padding: after every query, so never seen. Fits int32 with room for subtraction.
NOWHERE = 2**30


class Keys(NamedTuple):
    """Keys and values that queries may read.

    Attributes:
        k, v: `[G,S,K,H]` (or `[L,G,S,K,H]` for the layers of a cache).
        positions: `[G,S]` int32, NOWHERE where there is no token.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array


def attend(q: jax.Array, q_positions: jax.Array, blocks: tuple[Keys, ...], window: int) -> jax.Array:
    """Softmax attention of queries over all blocks together, scores and softmax in float32.

    Args:
        q: `[B,T,N,H]`.
        q_positions: `[B,T]` int32.
        blocks: keys of one layer; B is a multiple of each block's G, N of K.
        window: keys `window` or more positions back are masked; 0: no limit.

    Returns:
        `[B,T,N,H]` in q's dtype and layout.
    """
    return jax.shard_map(partial(_attend_local, window=window), out_specs=jax.typeof(q).sharding.spec, check_vma=False)(
        q, q_positions, blocks
    )


def _attend_local(q: jax.Array, q_positions: jax.Array, blocks: tuple[Keys, ...], window: int) -> jax.Array:
    batch, time, heads, width = q.shape
    q = q * jnp.asarray(width**-0.5, q.dtype)
    scores, queries = [], []
    for block in blocks:
        groups, extent, kv_heads, _ = block.k.shape
        grouped = q.reshape(groups, batch // groups, time, kv_heads, heads // kv_heads, width)
        score = jnp.einsum("grtkqh,gskh->grkqts", grouped, block.k, preferred_element_type=jnp.float32)
        at = q_positions.reshape(groups, batch // groups, time)[:, :, None, None, :, None]
        key_at = block.positions[:, None, None, None, None, :]
        seen = key_at <= at
        if window:
            seen &= at - key_at < window
        score = jnp.where(seen, score, jnp.finfo(jnp.float32).min)
        scores.append(score.reshape(batch, kv_heads, heads // kv_heads, time, extent))
        queries.append(groups)
    top = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        top = jnp.maximum(top, score.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = [jnp.exp(score - top) for score in scores]
    total = sum(weight.sum(-1) for weight in weights)  # [B,K,Q,T]
    out = jnp.zeros((), jnp.float32)
    for block, groups, weight in zip(blocks, queries, weights, strict=True):
        grouped = weight.astype(q.dtype).reshape(groups, batch // groups, *weight.shape[1:])
        part = jnp.einsum("grkqts,gskh->grtkqh", grouped, block.v, preferred_element_type=jnp.float32)
        out = out + part.reshape(batch, time, *weight.shape[1:3], width)
    out = out / jnp.transpose(total, (0, 3, 1, 2))[..., None]
    return out.reshape(batch, time, heads, width).astype(q.dtype)


def spec_of(x: jax.Array) -> P:
    """The partition spec that an array's type carries (explicit mesh axes)."""
    return jax.typeof(x).sharding.spec
