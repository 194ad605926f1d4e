"""Slots on the device: prompts are read into them, and their rows decoded some steps at a time, every shape fixed.

A slot holds one prompt and its n samples: the prompt's keys lie there once and its n rows read them. All rows take a
step together, each at its own place in its own completion: row r writes its new key at the same index of its own
cache as all others, which goes round (a completion has no more tokens than the cache has places), and positions tell
which keys are a row's. So a slot is refilled at any time without moving or compiling anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from selfreward_jax.model import llama
from selfreward_jax.model.attention import NOWHERE, Keys, spec_of
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sampling import stopping
from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.rules import LAYOUTS, mesh_axes


class Program(NamedTuple):
    """What is compiled.

    Attributes:
        vocabulary: tokens from here on are padding rows of the head; they are never chosen.
    """

    config: LlamaConfig
    compute: llama.Compute
    sampling: Sampling
    vocabulary: int


class Inputs(NamedTuple):
    """What all calls of a stage read.

    Attributes:
        params: parameters in the layout of `Program.compute`; their layers stacked or apart (`llama.apart`).
        seed, phase: scalars uint32, see `tokens.request_keys`.
        prefix: () or one cache of a prefix that all prompts share.
        stops: `stopping.Stops.table`.
    """

    params: llama.Params
    seed: Any
    phase: Any
    prefix: tuple[Keys, ...]
    stops: Any


class Rows(NamedTuple):
    """What R rows have sampled, of at most M tokens each.

    Attributes:
        requests: `[R]` int32, the identity of the completion, for its random key.
        ends: `[R]` int32, position of the completion's first token.
        token: `[R]` int32, the last token, which is not read yet.
        state: `[R]` int32, of the stops (`stopping.Stops`) after that token.
        lengths: `[R]` int32, tokens so far, the one that ends it included.
        done: `[R]` bool, whether the row waits for another prompt.
        stopped: `[R]` bool, whether a stop ended it (else the length limit did).
        tokens: `[R,M]` int32; what follows the completion is 0.
        logps: `[R,M]` float32, log-probs at temperature 1, nats.
    """

    requests: jax.Array
    ends: jax.Array
    token: jax.Array
    state: jax.Array
    lengths: jax.Array
    done: jax.Array
    stopped: jax.Array
    tokens: jax.Array
    logps: jax.Array


class Slots(NamedTuple):
    """G slots with n rows each, R = G n, sharded over the rows' mesh axes.

    Attributes:
        prompts: keys `[L,G,K,T,H]` (or L times `[G,K,T,H]`), right padded.
        own: the rows' keys `[L,R,K,M,H]` (or L times `[R,K,M,H]`), a ring.
        steps: scalar int32, decode steps so far; its rest by M is where the ring is written next.
        places: scalar int32, rows that were computed, summed over the steps.
        busy: scalar int32, of them, those that were not done.
        fallbacks: scalar int32, tokens that needed more than the first window.
    """

    prompts: Keys
    own: Keys
    rows: Rows
    steps: jax.Array
    places: jax.Array
    busy: jax.Array
    fallbacks: jax.Array


class Report(NamedTuple):
    """What the host looks at after some steps; `Slots` themselves are given on to the next."""

    done: jax.Array
    stopped: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    logps: jax.Array
    steps: jax.Array
    places: jax.Array
    busy: jax.Array
    fallbacks: jax.Array


@partial(jax.jit, static_argnames=("program", "slots", "samples", "time"))
def blank(program: Program, params: llama.Params, slots: int, samples: int, time: int) -> Slots:
    """Slots without prompts: G = `slots`, n = `samples`, T = `time`, M = the sampling's `max_new_tokens`; all rows are done.

    Args:
        params: the caches' layers are stacked or apart as theirs are.
    """
    config, compute, new = program.config, program.compute, program.sampling.max_new_tokens
    rules, rows = LAYOUTS[compute.layout][0], slots * samples
    split = rules["rows"]

    def cache(count: int, extent: int) -> Keys:
        shape, spec = (count, config.kv_heads, extent, config.head_dim), (split, rules["kv_heads"], None, None)

        def empty() -> Any:
            if isinstance(params["layers"], tuple):
                return tuple(jnp.zeros(shape, compute.dtype, out_sharding=P(*spec)) for _ in range(config.layers))
            return jnp.zeros((config.layers, *shape), compute.dtype, out_sharding=P(None, *spec))

        return Keys(empty(), empty(), jnp.full((count, extent), NOWHERE, jnp.int32, out_sharding=P(split, None)))

    zero = jnp.zeros((), jnp.int32)
    nobody = jnp.zeros((rows,), jnp.int32, out_sharding=P(split))
    held = _no_tokens(nobody, nobody, nobody < 1, new)
    return Slots(cache(slots, time), cache(rows, new), held, zero, zero, zero, zero)


def _no_tokens(requests: jax.Array, ends: jax.Array, done: jax.Array, new: int) -> Rows:
    """R rows without a token."""
    split = spec_of(done)[0]
    empty = jnp.zeros((len(done), new), jnp.int32, out_sharding=P(split, None))
    zero = jnp.zeros_like(requests)
    return Rows(requests, ends, zero, zero, zero, done, zero > 0, empty, empty.astype(jnp.float32))


@partial(jax.jit, static_argnames=("config", "compute"))
def prefix_keys(config: LlamaConfig, compute: llama.Compute, params: llama.Params, tokens: jax.Array) -> Keys:
    """Keys `[L,1,K,S,H]` of a prefix `[1,S]` that all requests share; read once, never copied."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return llama.prefill(config, compute, params, tokens, positions)[1]


@partial(jax.jit, static_argnames=("program",))
def read(
    program: Program, inputs: Inputs, prompts: jax.Array, lengths: jax.Array, requests: jax.Array
) -> tuple[Keys, Rows, jax.Array]:
    """Reads B prompts and samples the first token of each one's n completions: one prefill a prompt.

    Args:
        prompts: `[B,T]` int32, right padded, without the shared prefix.
        lengths: `[B]` int32; 0 marks a prompt that only fills the batch.
        requests: `[B,n]` int32.

    Returns:
        The prompts' keys `[L,B,K,T,H]`; their B x n rows, prompt by prompt; and how many of their tokens needed more
        than the first window.
    """
    config, compute, prefix = program.config, program.compute, inputs.prefix
    split = LAYOUTS[compute.layout][0]["rows"]
    (count, time), samples = prompts.shape, requests.shape[1]
    start = prefix[0].positions.shape[1] if prefix else 0
    place = jnp.arange(time, dtype=jnp.int32)[None]
    positions = jnp.where(place < jnp.maximum(lengths, 1)[:, None], start + place, NOWHERE)
    hidden, keys = llama.prefill(config, compute, inputs.params, prompts, positions, prefix)
    row = jax.lax.broadcasted_iota(jnp.int32, (count,), 0, out_sharding=spec_of(lengths))
    last = hidden.at[row, jnp.maximum(lengths, 1) - 1].get(out_sharding=P(*spec_of(lengths), None))

    def spread(x: jax.Array) -> jax.Array:  # [B,...] -> [R,...]
        wide = jnp.broadcast_to(
            x[:, None], (count, samples, *x.shape[1:]), out_sharding=P(split, None, *spec_of(x)[1:])
        )
        return wide.reshape(count * samples, *x.shape[1:], out_sharding=P(split, *spec_of(x)[1:]))

    logits = spread(_scores(program, llama.head_weights(config, compute, inputs.params), last))
    asked = requests.reshape(-1, out_sharding=P(split))
    rows = _no_tokens(asked, spread(start + lengths), spread(lengths) == 0, program.sampling.max_new_tokens)
    return keys, *_record(rows, logits, program.sampling, inputs)


@partial(jax.jit, donate_argnames=("slots",))
def insert(slots: Slots, keys: Keys, rows: Rows, fallbacks: jax.Array, where: jax.Array) -> Slots:
    """Puts prompts and their rows into slots.

    Args:
        keys, rows, fallbacks: from `read`; their T is at most the slots'.
        where: `[B]` int32, sharded like the prompts: the slot of each, counted within its shard of the slots; -1 for
            a prompt that only fills the batch.
    """

    def shard(slots: Slots, keys: Keys, rows: Rows, where: jax.Array) -> tuple[Keys, jax.Array, Rows]:
        count, extent = slots.prompts.positions.shape
        samples = rows.token.shape[0] // where.shape[0]

        def move(cache: jax.Array, new: jax.Array) -> jax.Array:  # [..,G,K,T,H] and [..,B,K,T',H]
            axis = new.ndim - 4
            for index in range(where.shape[0]):  # updates in place: a scatter of whole prompts would copy the cache
                one = jax.lax.slice_in_dim(new, index, index + 1, axis=axis)
                at: list[Any] = [0] * new.ndim
                at[axis] = jnp.maximum(where[index], 0)
                there = jax.lax.dynamic_slice(cache, at, one.shape)
                cache = llama.put_slice(cache, jnp.where(where[index] >= 0, one, there), at)
            return cache

        k, v = jax.tree.map(move, (slots.prompts.k, slots.prompts.v), (keys.k, keys.v))
        there = jnp.where(where >= 0, where, count)  # beyond the last: dropped
        padded = jnp.pad(keys.positions, ((0, 0), (0, extent - keys.positions.shape[1])), constant_values=NOWHERE)
        positions = slots.prompts.positions.at[there].set(padded, mode="drop")

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            old, new = (x.reshape(-1, samples, *x.shape[1:]) for x in (old, new))
            return old.at[there].set(new, mode="drop").reshape(-1, *old.shape[2:])

        nowhere = jnp.full_like(slots.own.positions[:1], NOWHERE)
        forgotten = put(slots.own.positions, jnp.broadcast_to(nowhere, (len(rows.token), nowhere.shape[1])))
        return Keys(k, v, positions), forgotten, Rows(*map(put, slots.rows, rows))

    specs = jax.tree.map(spec_of, (slots.prompts, slots.own.positions, slots.rows))
    prompts, own, held = jax.shard_map(shard, out_specs=specs, check_vma=False)(slots, keys, rows, where)
    return slots._replace(
        prompts=prompts, own=slots.own._replace(positions=own), rows=held, fallbacks=slots.fallbacks + fallbacks
    )


@partial(jax.jit, static_argnames=("program", "width"), donate_argnames=("slots",))
def advance(
    program: Program, inputs: Inputs, slots: Slots, width: int, limit: jax.Array, enough: jax.Array, most: jax.Array,
    few: jax.Array,
) -> tuple[Slots, Report]:  # fmt: skip
    """Decodes all rows that are not done.

    It ends after `limit` steps, or when there is room for `enough` more prompts (each a free slot, and n of the `most`
    rows of a shard that may go on at once), or when no shard has more than `few` rows that go on.

    Args:
        width: rows that are computed, R or fewer: at least as many as are not done, on each shard of the rows.
        limit, enough, most, few: scalars int32.
    """
    config, compute = program.config, program.compute
    last = slots.steps + limit
    count, whole = slots.prompts.positions.shape[0], slots.rows
    split, shards = spec_of(whole.done)[0], _shards(whole.done)
    spread, pick = _gather(whole.done, width)

    def go_on(state: tuple[Slots, jax.Array]) -> jax.Array:
        slots, done = state
        done = done.reshape(shards, count // shards, -1, out_sharding=P(split, None, None))
        free, live = jnp.sum(jnp.all(done, axis=2), axis=1), jnp.sum(~done, axis=(1, 2))
        room = jnp.minimum(free, (most - live) // done.shape[2])
        return (slots.steps < last) & (jnp.sum(room) < enough) & (jnp.max(live) > few)

    def step(state: tuple[Slots, jax.Array]) -> tuple[Slots, jax.Array]:
        slots, _ = state
        rows = slots.rows
        hidden, own = llama.decode_step(
            config, compute, inputs.params, rows.token, rows.ends + rows.lengths - 1, (*inputs.prefix, slots.prompts),
            slots.own, slots.steps % slots.own.positions.shape[1], spread, pick,
        )  # fmt: skip
        after, fallbacks = _record(rows, _scores(program, head, hidden), program.sampling, inputs)
        slots = Slots(
            slots.prompts, own, after, slots.steps + 1, slots.places + width, slots.busy + jnp.sum(~rows.done),
            slots.fallbacks + fallbacks,
        )  # fmt: skip
        return slots, whole.done | spread(after.done)

    with jax.named_scope("decode"):
        head = llama.head_weights(config, compute, inputs.params)
        start = slots._replace(rows=jax.tree.map(pick, whole))
        slots, _ = jax.lax.while_loop(go_on, step, (start, whole.done))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(whole.done, tuple(range(1, old.ndim))), old, spread(new))

    rows = jax.tree.map(put, whole, slots.rows)
    slots = slots._replace(rows=rows)
    return slots, Report(
        rows.done, rows.stopped, rows.lengths, rows.tokens, rows.logps, slots.steps, slots.places, slots.busy,
        slots.fallbacks,
    )  # fmt: skip


Move = Callable[[jax.Array], jax.Array]


def _gather(done: jax.Array, width: int) -> tuple[Move, Move]:
    """How the values `[width,...]` of rows that go on are spread over all `[R,...]`, and picked out of them.

    A shard's rows stay on it. What is spread to rows that are done is another row's and means nothing.
    """
    if width == len(done):
        return lambda x: x, lambda x: x
    each = width // _shards(done)

    def order(done: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.argsort(done, stable=True)
        return rows[:each], jnp.minimum(jnp.argsort(rows), each - 1)

    split = P(spec_of(done)[0])
    live, back = jax.shard_map(order, out_specs=(split, split), check_vma=False)(done)

    def take(index: jax.Array, x: jax.Array) -> jax.Array:
        return jax.shard_map(lambda x, index: x[index], out_specs=spec_of(x), check_vma=False)(x, index)

    return partial(take, back), partial(take, live)


def _shards(rows: jax.Array) -> int:
    mesh = jax.typeof(rows).sharding.mesh
    return math.prod(mesh.shape[axis] for axis in mesh_axes(spec_of(rows)[0]))


def _scores(program: Program, head: jax.Array, hidden: jax.Array) -> jax.Array:
    """Logits `[R,V]` of hidden states `[R,D]`, gathered over the vocabulary's axes: choosing needs whole rows."""
    logits = llama.logits(program.config, head, hidden)
    whole = jax.sharding.reshard(logits, P(*spec_of(hidden)[:1], None))
    return (
        whole
        if program.vocabulary >= whole.shape[-1]
        else jnp.where(jnp.arange(whole.shape[-1]) < program.vocabulary, whole, -jnp.inf)
    )


def _record(rows: Rows, logits: jax.Array, sampling: Sampling, inputs: Inputs) -> tuple[Rows, jax.Array]:
    """Chooses the next token of each row that is not done and notes it; and counts those that needed a wider window."""
    live = ~rows.done
    # Rows that are done go on as certainties: their flat garbage would send the whole batch to the full sort.
    certain = jnp.arange(logits.shape[-1]) == 0
    logits = jnp.where(live[:, None] | certain, logits, -jnp.inf)
    with jax.named_scope("choose"):
        keys = request_keys(inputs.seed, inputs.phase, rows.requests)
        token, logp, fell_back = choose(logits, keys, rows.lengths, sampling)
    here = live[:, None] & (jnp.arange(rows.tokens.shape[1]) == rows.lengths[:, None])
    lengths = rows.lengths + live
    state = jnp.where(live, stopping.advance(inputs.stops, rows.state, token), rows.state)
    ended = live & stopping.ended(inputs.stops, state)
    return Rows(
        rows.requests, rows.ends, jnp.where(live, token, rows.token), state, lengths,
        rows.done | ended | (lengths >= sampling.max_new_tokens), rows.stopped | ended,
        jnp.where(here, token[:, None], rows.tokens), jnp.where(here, logp[:, None], rows.logps),
    ), jnp.sum(fell_back & live)  # fmt: skip
