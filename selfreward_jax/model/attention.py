"""Attention over one or more blocks of keys: the same function trains, prefills and decodes.

A block holds keys and values of G groups; row b of the queries reads group `b // (B / G)`. So a rubric that all
judgments share is a block with G = 1, the prompt of N candidates one with G = B / N, a row's own tokens one with
G = B: nothing is copied, and a shared block is read once for its rows. Masks are positions: a query sees the keys
whose position is not after its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from selfreward_jax.model.kernels import KERNELS, packed_mask
from selfreward_jax.sharding.rules import mesh_axes

# The position of padding: after every query, so never seen. Fits int32 with room for subtraction.
NOWHERE = 2**30


class Keys(NamedTuple):
    """Keys and values that queries may read.

    Attributes:
        k, v: `[G,K,S,H]` (for the layers of a cache `[L,G,K,S,H]`, or a tuple of L): a head's keys lie together, as matmuls read
            them. With S before K a CPU turned the whole cache at each decoded token, 6 times the work itself.
        positions: `[G,S]` int32, NOWHERE where there is no token.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array


def keys_of(k: jax.Array, v: jax.Array, positions: jax.Array) -> Keys:
    """A block from keys and values as a layer computes them, `[G,S,K,H]`."""
    return Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), positions)


# The score of a key that is not seen; finite, so that a row that sees nothing gives no NaN.
_LOWEST = float(np.finfo(np.float32).min)

# Queries that the mapped form takes at once, and the most such tiles of a row, each of which is compiled; keys after a
# tile are not even multiplied.
_TILE, _TILES = 128, 8


def attend(
    q: jax.Array,
    q_positions: jax.Array,
    blocks: tuple[Keys, ...],
    window: int,
    form: str,
    ends: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of queries over all blocks together, scores and softmax in float32.

    Heads may be split over mesh axes, the queries' over those of the keys and then over more of them, as long as the
    query heads of a device are whole groups of its kv heads or lie in one group.

    Args:
        q: `[B,T,N,H]`.
        q_positions: `[B,T]` int32.
        blocks: keys of one layer; B is a multiple of each block's G, N of K. With T above 1 the last block is the
            queries' own rows, token for token.
        window: keys `window` or more positions back are masked; 0: no limit.
        form: "plain": batched matmuls over all rows; "mapped": two-dimensional matmuls, a row and kv head at a time,
            3.4 times as fast on a CPU (B 4, T 512, N 9, K 3, H 64, forward, backward and recomputation); "cudnn",
            "splash" and their tests' twins: `kernels.KERNELS`. A kernel serves T above 1 and one block, the queries'
            own, each row's positions counting up by one and then NOWHERE; all else takes the plain form instead, by
            design and without a word: one new token a row (T = 1) in any form, and blocks that rows share.
        ends: `[B,T]` int32 for rows of several sequences, whose one block is the queries' own: the token at place j of
            a row is seen from the places j to before `ends[j]` (`data.packing`). Splash takes such rows only if no
            two sequences share a token. None: a row is one sequence.

    Returns:
        `[B,T,N,H]` in q's dtype and layout. Values at padding mean nothing, but are finite.

    Raises:
        ValueError: for a form that does not exist, and for heads that are split in another way than said above.
    """
    if form not in ("plain", "mapped", *KERNELS):
        raise ValueError(f"attention form {form}: plain, mapped, {', '.join(KERNELS)}")
    local: Callable[..., jax.Array] = _attend_plain
    if q.shape[1] > 1 and form == "mapped":
        local = _attend_mapped
    elif q.shape[1] > 1 and form in KERNELS and [block.positions.shape for block in blocks] == [q.shape[:2]]:
        local = partial(_attend_kernel, kernel=KERNELS[form])
    pickers = [_head_picker(q, block) for block in blocks]

    def shard(q: jax.Array, q_positions: jax.Array, blocks: tuple[Keys, ...], ends: jax.Array | None) -> jax.Array:
        read = tuple(pick(block) for pick, block in zip(pickers, blocks, strict=True))
        return local(q, q_positions, read, window=window, ends=ends)

    return jax.shard_map(shard, out_specs=spec_of(q), check_vma=False)(q, q_positions, blocks, ends)


def _head_picker(q: jax.Array, block: Keys) -> Callable[[Keys], Keys]:
    """What a device does with its kv heads, inside `shard_map`: keep those that its query heads read."""
    mesh = jax.typeof(q).sharding.mesh
    q_axes, kv_axes = _axes(q, 2), _axes(block.k, 1)
    if q_axes == kv_axes:
        return lambda block: block
    q_heads = q.shape[2] // math.prod(mesh.shape[axis] for axis in q_axes)
    share = q.shape[2] // block.k.shape[1]
    if q_axes[: len(kv_axes)] != kv_axes or (q_heads % share and share % q_heads):
        raise ValueError(
            f"{q.shape[2]} query heads split over mesh axes {q_axes} cannot read {block.k.shape[1]} kv heads split "
            f"over {kv_axes}: a device's query heads must be whole groups of its own kv heads, or lie in one group"
        )
    extra, count = q_axes[len(kv_axes) :], max(q_heads // share, 1)

    def pick(block: Keys) -> Keys:
        if block.k.shape[1] == count:
            return block
        start = jax.lax.axis_index(extra) * q_heads // share
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) for x in (block.k, block.v))
        return Keys(k, v, block.positions)

    return pick


def _axes(x: jax.Array, dimension: int) -> tuple[str, ...]:
    """The mesh axes that one dimension of an array is split over, those of size one left out."""
    mesh = jax.typeof(x).sharding.mesh
    return tuple(axis for axis in mesh_axes(spec_of(x)[dimension]) if mesh.shape[axis] > 1)


def _attend_kernel(
    q: jax.Array,
    q_positions: jax.Array,
    blocks: tuple[Keys, ...],
    window: int,
    ends: jax.Array | None,
    kernel: Callable[..., jax.Array],
) -> jax.Array:
    k, v = (jnp.swapaxes(x, 1, 2) for x in (blocks[0].k, blocks[0].v))
    if ends is None:  # causal, and padding comes last: places in the row say all that positions do
        return kernel(q, k, v, window=window)
    return kernel(q, k, v, window=window, packed=(q_positions, ends))


def _visible(q_positions: jax.Array, key_positions: jax.Array, window: int) -> jax.Array:
    seen = key_positions <= q_positions
    return seen & (q_positions - key_positions < window) if window else seen


def _attend_mapped(
    q: jax.Array, q_positions: jax.Array, blocks: tuple[Keys, ...], window: int, ends: jax.Array | None
) -> jax.Array:
    batch, time, heads, width = q.shape
    own, shared = blocks[-1], blocks[:-1]
    kv_heads = own.k.shape[1]
    share = heads // kv_heads
    # [B,T,N,H] -> [B*K,Q,T,H]: a row and kv head is one matmul operand
    queries = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, time, kv_heads, share, width)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, share, time, width)
    own_k, own_v = (x.reshape(batch * kv_heads, time, width) for x in (own.k, own.v))

    @jax.checkpoint
    def one(item: tuple[jax.Array, ...]) -> jax.Array:
        index, here, k, v = item
        row, head = index // kv_heads, index % kv_heads
        read = []
        for block in shared:
            group = row // (batch // block.k.shape[0])
            read.append((block.k[group, head], block.v[group, head], block.positions[group]))
        outs = []
        step = max(_TILE, -(-time // _TILES))
        for start in range(0, time, step):
            end = min(start + step, time)
            parts = [*read, (k[:end], v[:end], own.positions[row, :end])]  # a query's own later tokens are never seen
            tile = here[:, start:end].reshape(share * (end - start), width)
            at = q_positions[row, start:end, None]
            seen = [_visible(at, places[None], window) for _, _, places in parts]
            if ends is not None:
                seen = [packed_mask(q_positions[row, :end], ends[row, :end], window, start)]
            weights, total = _softmax([
                jnp.where(jnp.tile(mask, (share, 1)), jnp.dot(tile, some_k.T, preferred_element_type=jnp.float32), _LOWEST)
                for mask, (some_k, _, _) in zip(seen, parts, strict=True)
            ])  # fmt: skip
            out = jnp.zeros((), jnp.float32)
            for weight, (_, some_v, _) in zip(weights, parts, strict=True):
                out = out + jnp.dot(weight.astype(q.dtype), some_v, preferred_element_type=jnp.float32)
            outs.append((out / total[:, None]).reshape(share, end - start, width))
        return jnp.concatenate(outs, axis=1).astype(q.dtype)

    out = jax.lax.map(one, (jnp.arange(batch * kv_heads), queries, own_k, own_v))
    return (
        out.reshape(batch, kv_heads, share, time, width).transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)
    )


def _softmax(scores: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Unnormalised weights of several score blocks `[...,S]` under one maximum, and their sum `[...]`."""
    top = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        top = jnp.maximum(top, score.max(-1, keepdims=True))
    weights = [jnp.exp(score - jax.lax.stop_gradient(top)) for score in scores]
    return weights, sum((weight.sum(-1) for weight in weights), start=jnp.zeros((), jnp.float32))


def _attend_plain(
    q: jax.Array, q_positions: jax.Array, blocks: tuple[Keys, ...], window: int, ends: jax.Array | None
) -> jax.Array:
    batch, time, heads, width = q.shape
    kv_heads = blocks[0].k.shape[1]
    # [B,T,N,H] -> [B,K,QT,H]: all queries of a kv head are rows of one matmul
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, time, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    share = heads // kv_heads
    q = q.reshape(batch, kv_heads, share * time, width)
    mask = None if ends is None else packed_mask(q_positions, ends, window)
    parts = [_attend_block(q, q_positions, b, window, mask) for b in blocks]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([top for top, _, _ in parts]), axis=0))
    scales = [jnp.exp(part[0] - top) for part in parts]
    total = sum((scale * part[1] for scale, part in zip(scales, parts, strict=True)), start=jnp.zeros(()))
    out = sum((scale[..., None] * part[2] for scale, part in zip(scales, parts, strict=True)), start=jnp.zeros(()))
    out = (out / total[..., None]).reshape(batch, kv_heads, share, time, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, time, heads, width).astype(q.dtype)


def _attend_block(
    q: jax.Array, q_positions: jax.Array, block: Keys, window: int, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one block adds: its highest score and the sum of its weights `[B,K,QT]`, and the weighted values `[B,K,QT,H]`."""
    batch, kv_heads, queries, _ = q.shape
    groups, rows = block.k.shape[0], batch // block.k.shape[0]
    time = q_positions.shape[1]

    def together(x: jax.Array) -> jax.Array:  # [B,K,QT,..] -> [G,K,rQT,..]: rows that read the same keys
        x = x.reshape(groups, rows, kv_heads, queries, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(groups, kv_heads, rows * queries, *x.shape[4:])

    def apart(x: jax.Array) -> jax.Array:
        x = x.reshape(groups, kv_heads, rows, queries, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(batch, kv_heads, queries, *x.shape[4:])

    scores = jnp.einsum("gkxh,gksh->gkxs", together(q), block.k, preferred_element_type=jnp.float32)
    if mask is None:
        at = jnp.broadcast_to(q_positions.reshape(groups, rows, 1, time), (groups, rows, queries // time, time))
        seen = _visible(at.reshape(groups, 1, -1, 1), block.positions[:, None, None, :], window)
    else:
        seen = jnp.tile(mask, (1, queries // time, 1))[:, None]
    scores = jnp.where(seen, scores, _LOWEST)
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("gkxs,gksh->gkxh", weights.astype(q.dtype), block.v, preferred_element_type=jnp.float32)
    return apart(top), apart(weights.sum(-1)), apart(out)


def spec_of(x: jax.Array) -> P:
    """The partition spec that an array's type carries (explicit mesh axes)."""
    return jax.typeof(x).sharding.spec
