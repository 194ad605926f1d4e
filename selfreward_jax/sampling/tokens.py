"""Choosing the next token: temperature, top-k, nucleus and min-p, from uniform numbers of each row's own.

A token is drawn by inverting the cumulative distribution of the kept tokens in sorted order, so a window of the most
probable ones and a full sort choose the same token from the same number. A window is exact when it holds `top_p` of
the mass or reaches below min-p; rows for which it is not take a wider one, and then the full sort. Without top-k and
top-p nothing is sorted: the distribution is inverted in the order of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from selfreward_jax import contradictions
from selfreward_jax.errors import UserError

BLOCK = 32  # tokens; looking for the window is cheapest with about the root of vocabulary / window
FEW = 4  # rows that are drawn again at once, or a 64th of all

Drawn = tuple[jax.Array, jax.Array]  # tokens [R], and [R] bool, whether their window was exact


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (paper section 3.1.3: temperature 0.7 and top-p 0.9 for responses and judgments).

    After the temperature the limits apply one after the other, in the order of transformers: `top_k`, `top_p` of the
    mass that `top_k` left, `min_p` (vLLM puts `min_p` first). Greedy ignores all three, as both of those do.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass; the smallest set of most probable tokens that reaches it is kept. 1: no limit.
        max_new_tokens: longest completion, end of turn included.
        window: most probable tokens that are looked at before the exact fallback (of 1,715 tokens of SmolLM2-135M at
            T 0.7, p 0.9, 4.8 % needed more than 32, 1.3 % more than 64 and one more than 256). `top_k` is its own.
        top_k: most tokens that are kept, of equal ones the first; 0: no limit.
        min_p: tokens less probable than this share of the most probable one are dropped; 0: no limit.

    Raises:
        UserError: a line for each value that is out of its range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    window: int = 256
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        lines = [f"sampling: {line}" for line in contradictions.sampling(self)]
        if self.window < 1:
            lines.append(f"sampling: window={self.window}: at least 1")
        if lines:
            raise UserError(*lines)


def request_keys(seed: int, phase: int, requests: jax.Array) -> jax.Array:
    """Keys `[R]` of requests `[R]` int32: independent of batch, slot and host."""
    base = jax.random.fold_in(jax.random.key(seed), phase)
    return jax.vmap(lambda request: jax.random.fold_in(base, request))(requests)


def choose(
    logits: jax.Array, keys: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses one token a row; rows are independent, so each shard of them chooses for itself.

    Args:
        logits: `[R,V]` float32; -inf is never chosen, and each row has something else.
        keys: `[R]` keys of the requests.
        position: `[R]` int32, the place of each row's token in its completion.

    Returns:
        tokens `[R]` int32; their log-probs `[R]` float32 under the model at temperature 1; and `[R]` bool, whether
        the row's nucleus needed more than the window.
    """
    row = P(jax.typeof(logits).sharding.spec[0])
    local = jax.shard_map(partial(_choose_local, sampling=sampling), out_specs=(row, row, row), check_vma=False)
    return local(logits, keys, position)


def _choose_local(
    logits: jax.Array, keys: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    wider = jnp.zeros(len(logits), bool)
    if sampling.temperature == 0.0:
        token = _descending(logits, 1)[1](jnp.zeros(len(logits), jnp.int32))
    elif sampling.top_p == 1.0 and not 0 < sampling.top_k < logits.shape[-1]:
        token = _draw_from_all(logits, highest, keys, sampling)
    else:
        token, wider = _draw_from_sorted(logits, highest, keys, sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    logp = chosen - highest - jnp.log(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))
    return token, logp[:, 0], wider


def _draw_from_all(logits: jax.Array, highest: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens `[R]` of all that min-p leaves: a block of the vocabulary by one number, a token of it by another.

    One number of 23 bits would be too coarse: in a flat vocabulary of 128,000 a token is 65 steps of it wide.
    """
    blocks = _blocks(logits)
    # From the middle of their steps, or 0 would always choose the first token, however improbable.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys) + 2**-24

    def mass(logits: jax.Array, peak: jax.Array, highest: jax.Array) -> jax.Array:
        return jnp.where(_likely(logits, highest, sampling), _mass(logits, peak, sampling), 0.0)

    block = _invert(jnp.sum(mass(blocks, highest[..., None], highest[..., None]), axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _invert(mass(inside, jnp.max(inside, axis=-1, keepdims=True), highest), uniform[:, 1])


def _draw_from_sorted(
    logits: jax.Array, highest: jax.Array, keys: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Tokens `[R]` of the nucleus, and `[R]` bool, whether the window was too narrow for the row."""
    vocabulary = logits.shape[-1]
    uniform = jax.vmap(jax.random.uniform)(keys)

    def draw(
        width: int, logits: jax.Array, highest: jax.Array, uniform: jax.Array, total: jax.Array | None = None
    ) -> Drawn:
        """From the `width` most probable tokens; top-p is a share of `total` `[R,1]`, or else of their own mass."""
        top, token_at = _descending(logits, width)
        mass = _mass(top, highest, sampling)
        ends = jnp.cumsum(mass, axis=-1)
        share = sampling.top_p * (ends[:, -1:] if total is None else total)
        likely = _likely(top, highest, sampling)
        # A window that reaches below min-p holds all that is kept, whatever its share of the mass.
        exact = (ends[:, -1] >= share[:, 0]) | ~jnp.all(likely, axis=-1)
        kept = likely if sampling.top_p == 1.0 else likely & (ends - mass < share)
        return token_at(_invert(jnp.where(kept, mass, 0.0), uniform)), exact

    if 0 < sampling.top_k < vocabulary:
        return draw(sampling.top_k, logits, highest, uniform)[0], jnp.zeros(len(logits), bool)
    if sampling.window >= vocabulary:
        return draw(vocabulary, logits, highest, uniform)[0], jnp.zeros(len(logits), bool)
    total = jnp.sum(_mass(logits, highest, sampling), axis=-1, keepdims=True)
    rows = (logits, highest, uniform, total)
    # An eighth of the window does for most rows and takes an eighth of the time, where there are blocks for it.
    first = sampling.window // 8
    if _by_blocks(vocabulary, first):
        drawn = _again(partial(draw, sampling.window), rows, draw(first, *rows))
    else:
        drawn = draw(sampling.window, *rows)
    return _again(partial(draw, vocabulary), rows, drawn)[0], ~drawn[1]


def _again(draw: Callable[..., Drawn], rows: tuple[jax.Array, ...], drawn: Drawn) -> Drawn:
    """Draws again where `drawn` is not exact, a few rows at a time: a flat row does not sort its whole batch."""
    count = len(drawn[0])
    few = min(count, max(FEW, count // 64))

    def step(state: tuple[jax.Array, Drawn]) -> tuple[jax.Array, Drawn]:
        left, (token, exact) = state
        # Those left come first; should others fill up the few, they come out as they were: wider is exact too.
        some = jnp.argsort(~left)[:few]
        again = draw(*(part[some] for part in rows))
        return left.at[some].set(False), (token.at[some].set(again[0]), exact.at[some].set(again[1]))

    return jax.lax.while_loop(lambda state: jnp.any(state[0]), step, (~drawn[1], drawn))[1]


def _mass(logits: jax.Array, peak: jax.Array, sampling: Sampling) -> jax.Array:
    """Probabilities after the temperature, as multiples of that of `peak`."""
    return jnp.exp((logits - peak) / _temperature(sampling))


def _likely(logits: jax.Array, highest: jax.Array, sampling: Sampling) -> jax.Array:
    """Which logits are within min-p of the highest."""
    if sampling.min_p == 0.0:
        return jnp.ones(logits.shape, bool)
    return logits - highest >= _temperature(sampling) * math.log(sampling.min_p)


def _temperature(sampling: Sampling) -> float:
    """The temperature inside what float32 holds; outside of it every distribution is its limit already."""
    return min(max(sampling.temperature, 1e-30), 1e30)


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """The places `[R]` where uniform numbers `[R]` fall in the cumulative distributions of `mass` `[R,N]`.

    A place without mass is never returned, though float32 sums of other parts may differ in their last bit.
    """
    there = mass > 0
    ends = jnp.where(there, jnp.cumsum(mass, axis=-1), 0.0)
    beyond = ends > uniform[:, None] * jnp.max(ends, axis=-1, keepdims=True)
    last = mass.shape[-1] - 1
    return jnp.min(jnp.where(beyond, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _blocks(logits: jax.Array) -> jax.Array:
    """`[R,V]` as `[R,N,BLOCK]`, the last block filled up with -inf."""
    short = -logits.shape[-1] % BLOCK
    whole = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf) if short else logits
    return whole.reshape(len(logits), -1, BLOCK)


def _by_blocks(vocabulary: int, width: int) -> bool:
    """Whether so many of the most probable tokens are found faster by the highest of each block."""
    return 0 < 4 * width <= vocabulary // BLOCK


def _descending(logits: jax.Array, width: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The highest logits `[R,width]` in order, and a function from places `[R]` in it to tokens `[R]`.

    Equal logits are in the order of the vocabulary, whichever way is taken: no window changes what is chosen.
    """
    if width > logits.shape[-1] // 8:
        return _sorted(logits, width)
    if _by_blocks(logits.shape[-1], width):
        blocks = _blocks(logits)
        # The highest `width` tokens lie in the `width` blocks with the highest maxima.
        chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), width)[1], axis=-1)
        some = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(logits), -1)
        top, at = jax.lax.top_k(some, width)
        ids = jnp.take_along_axis(chosen, at // BLOCK, axis=-1) * BLOCK + at % BLOCK
    else:
        top, ids = jax.lax.top_k(logits, width)
    return top, lambda place: jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]


def _sorted(logits: jax.Array, width: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`_descending` by a sort of the values alone, as integers: several times faster than one with their tokens."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ranks = ~_flip(bits)  # the higher the logit, the lower
    ordered = jnp.sort(ranks, axis=-1)[:, :width]

    def token_at(place: jax.Array) -> jax.Array:
        """The token with the value of that place; of equal ones the one that is as many after the first."""
        rank = jnp.take_along_axis(ordered, place[:, None], axis=-1)
        after = place[:, None] - jnp.sum(ordered < rank, axis=-1, keepdims=True)
        return jnp.sum(jnp.cumsum(ranks == rank, axis=-1, dtype=jnp.int32) <= after, axis=-1, dtype=jnp.int32)

    return jax.lax.bitcast_convert_type(_flip(~ordered), jnp.float32), token_at


def _flip(bits: jax.Array) -> jax.Array:
    """Between a float32's bits and an int32 in the same order; its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
