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
    """Rows of tokens and where their targets are; B rows are right padded to T tokens and M targets.

    Attributes:
        tokens: `[B,T]` int32.
        positions: `[B,T]` int32, NOWHERE at padding.
        at: `[B,M]` int32, the index of the token that predicts a target (target index minus one: the shift is here).
        targets: `[B,M]` int32.
        weights: `[B,M]` float32, above 0 at targets (1, or a mixing weight), 0 at padding.
    """

    tokens: jax.Array
    positions: jax.Array
    at: jax.Array
    targets: jax.Array
    weights: jax.Array


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
    hidden = llama.hidden_states(config, compute, params, batch.tokens, batch.positions, dropout)
    rows = P(*spec_of(batch.at), None)
    picked = hidden.at[jnp.arange(hidden.shape[0])[:, None], batch.at].get(out_sharding=rows)  # [B,M,D]
    head = llama.head_weights(config, compute, params)
    width = min(chunk, picked.shape[1])
    pieces = -(-picked.shape[1] // width)
    pad = pieces * width - picked.shape[1]

    def split(x: jax.Array) -> jax.Array:  # [B,M,...] -> [pieces,B,width,...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, width, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def piece(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        some_hidden, some_targets = inputs
        logits = llama.logits(config, head, some_hidden)  # [B,width,V]
        # A masked sum, not a gather: V may be sharded over `tensor`.
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=spec_of(logits))
        target = jnp.sum(jnp.where(vocabulary == some_targets[..., None], logits, 0.0), axis=-1)
        return None, target - jax.nn.logsumexp(logits, axis=-1)

    _, logps = jax.lax.scan(piece, None, (split(picked), split(batch.targets)))
    logps = jnp.moveaxis(logps, 0, 1).reshape(batch.at.shape[0], pieces * width)[:, : batch.at.shape[1]]
    return jnp.where(batch.weights > 0, logps, 0.0)
