"""Log-probs of target tokens without a `[B,T,V]` array: only target positions meet the head, in chunks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from selfreward_jax.model import llama
from selfreward_jax.model.attention import spec_of
from selfreward_jax.model.config import LlamaConfig


class Batch(NamedTuple):
    """Packed rows of tokens (`data.packing`) and where their targets are, right padded to T tokens and M targets.

    Attributes:
        tokens: `[B,T]` int32.
        positions: `[B,T]` int32, in its sequence, NOWHERE at padding.
        ends: `[B,T]` int32, the first place behind a token from which it is not seen.
        at: `[B,M]` int32, the place of the token that predicts a target (the one before it: the shift is here).
        targets: `[B,M]` int32.
        weights: `[B,M]` float32, above 0 at targets (1, or a mixing weight), 0 at padding.
        sequences: `[B,M]` int32, which sequence of the batch a target belongs to.
    """

    tokens: jax.Array
    positions: jax.Array
    ends: jax.Array
    at: jax.Array
    targets: jax.Array
    weights: jax.Array
    sequences: jax.Array


def target_logprobs(
    config: LlamaConfig,
    compute: llama.Compute,
    params: llama.Params,
    batch: Batch,
    chunk: int,
    dropout: llama.Dropout | None = None,
) -> jax.Array:
    """Log-probs of the batch's targets.

    Args:
        chunk: targets a row that meet the head at once; logits of `B x chunk x V` float32 exist at a time, in the
            forward pass and (recomputed) in the backward pass.

    Returns:
        `[B,M]` float32, nats; 0 at padding.
    """
    hidden = llama.hidden_states(config, compute, params, batch.tokens, batch.positions, batch.ends, dropout)
    rows = P(*spec_of(batch.at), None)
    picked = hidden.at[jnp.arange(hidden.shape[0])[:, None], batch.at].get(out_sharding=rows)  # [B,M,D]
    head = llama.head_weights(config, compute, params)
    width = min(chunk, picked.shape[1])
    pieces = -(-picked.shape[1] // width)
    pad = pieces * width - picked.shape[1]

    def split(x: jax.Array) -> jax.Array:  # [B,M,...] -> [pieces,B,width,...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, width, *x.shape[2:]), 1, 0)

    def logps_of(some_hidden: jax.Array, some_targets: jax.Array) -> jax.Array:
        logits = llama.logits(config, head, some_hidden)  # [B,width,V]
        # A masked sum, not a gather: V may be sharded over `tensor`.
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=spec_of(logits))
        target = jnp.sum(jnp.where(vocabulary == some_targets[..., None], logits, 0.0), axis=-1)
        return target - jax.nn.logsumexp(logits, axis=-1)

    def nothing(_: jax.Array, some_targets: jax.Array) -> jax.Array:
        return jnp.zeros(some_targets.shape, jnp.float32, out_sharding=P(*spec_of(some_targets)))

    @jax.checkpoint
    def piece(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        # There is room for as many targets as a row has tokens, so that the number of targets changes no shape; where a
        # piece has none in any row, nothing is computed.
        some_hidden, some_targets, some_weights = inputs
        return None, jax.lax.cond(jnp.any(some_weights > 0), logps_of, nothing, some_hidden, some_targets)

    _, logps = jax.lax.scan(piece, None, (split(picked), split(batch.targets), split(batch.weights)))
    logps = jnp.moveaxis(logps, 0, 1).reshape(batch.at.shape[0], pieces * width)[:, : batch.at.shape[1]]
    return jnp.where(batch.weights > 0, logps, 0.0)


def of_sequences(values: jax.Array, batch: Batch, count: int) -> jax.Array:
    """Sums `[count]` of values `[B,M]` over the targets of each sequence, whole on every device."""
    mine = batch.sequences[..., None] == jnp.arange(count, dtype=jnp.int32)
    one = jnp.where(mine & (batch.weights[..., None] > 0), values[..., None], 0.0)
    return jax.sharding.reshard(jnp.sum(one, axis=1), P(None, None)).sum(axis=0)
