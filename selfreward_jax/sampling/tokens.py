"""Choosing the next token: temperature first, then the nucleus, from one uniform number a token.

A token is drawn by inverting the nucleus' cumulative distribution in sorted order, so a top-k window and a full sort
choose the same token from the same number. A window is exact when it holds at least `top_p` of the mass; where it does
not for some row, the batch takes one 16 times as wide, and then the full sort.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (paper section 3.1.3: temperature 0.7 and top-p 0.9 for responses and judgments).

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass; the smallest set of most probable tokens that reaches it is kept.
        max_new_tokens: longest completion, end of turn included.
        window: most probable tokens that are looked at before the exact fallback (at T 0.7, p 0.9, 256 were always
            enough for SmolLM2-135M and 64 failed in 0.65 % of steps).
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    window: int = 256


def request_keys(seed: int, phase: int, requests: jax.Array) -> jax.Array:
    """Keys `[R]` of requests `[R]` int32: independent of batch, slot and host."""
    base = jax.random.fold_in(jax.random.key(seed), phase)
    return jax.vmap(lambda request: jax.random.fold_in(base, request))(requests)


def choose(
    logits: jax.Array, keys: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses one token a row; rows are independent, so each shard of them chooses for itself.

    Args:
        logits: `[R,V]` float32.
        keys: `[R]` keys of the requests.
        position: `[R]` int32, the token's place in its completion.

    Returns:
        tokens `[R]` int32; their log-probs `[R]` float32 under the model at temperature 1; and `[R]` bool, whether
        the row's shard needed more than the first window.
    """
    row = P(jax.typeof(logits).sharding.spec[0])
    local = jax.shard_map(partial(_choose_local, sampling=sampling), out_specs=(row, row, row), check_vma=False)
    return local(logits, keys, position)


def _choose_local(
    logits: jax.Array, keys: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    never = jnp.zeros(logits.shape[0], bool)
    total = jax.nn.logsumexp(logits, axis=-1)
    if sampling.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.max(logits, axis=-1) - total, never
    uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))(keys, position)
    scaled = logits / sampling.temperature
    scaled_total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)

    def invert(top: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        mass = jnp.exp(top - scaled_total)
        before = jnp.cumsum(mass, axis=-1) - mass
        kept = jnp.where(before < sampling.top_p, mass, 0.0)
        ends = jnp.cumsum(kept, axis=-1)
        # The first token whose interval ends beyond the draw; kept tokens only, so never outside the nucleus.
        place = jnp.sum(ends <= uniform[:, None] * ends[:, -1:], axis=-1)
        place = jnp.minimum(place, jnp.sum(kept > 0, axis=-1) - 1)
        rows = jnp.arange(place.shape[0])
        return ids[rows, place].astype(jnp.int32), top[rows, place] * sampling.temperature

    def widen(widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The narrowest window that is exact for all rows; whether it was the first."""
        top, ids = jax.lax.top_k(scaled, widths[0])
        if len(widths) == 1:
            return *invert(top, ids), jnp.ones((), bool)
        exact = jnp.all(jnp.sum(jnp.exp(top - scaled_total), axis=-1) >= sampling.top_p)
        token, logit = jax.lax.cond(exact, lambda: invert(top, ids), lambda: widen(widths[1:])[:2])
        return token, logit, exact

    vocabulary = logits.shape[-1]
    widths = tuple(width for width in (sampling.window, 16 * sampling.window) if width < vocabulary)
    token, logit, exact = widen((*widths, vocabulary) if widths else (vocabulary,))
    return token, logit - total, never | ~exact
