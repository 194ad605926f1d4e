"""The host side of sampling: a queue of requests in, completions out, a part at a time.

The requests of a part wait in a queue, longest prompt first, so that prompts that are read together are alike. A slot
that has finished its samples gets the next one. The device runs ahead: while the host looks at what one dispatch of
steps has done, the next is already there, and it ends by itself where there is room for the next prompts. A part is
drained before the next begins: its results depend on nothing but its own requests, and a killed run loses one.
Which widths and refills a part takes follows from its completions alone, never from the clock.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from selfreward_jax.data.chat import common_prefix
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.attention import Keys
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.stopping import Stops, stop_table
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.place import fetch, place, replicate, rows_multiple
from selfreward_jax.sharding.rules import LAYOUTS, Rules

STEPS = 32  # of a dispatch, at most
READ = 8  # prompts that are read together, at most: a quarter of the slots, so that few wait for others to be free
AHEAD = 1  # dispatches that are under way while the host looks at the one before


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model that is ready to sample.

    Attributes:
        compute, decode_compute: how prompts are read, and how single tokens are; both in the layout of `params`.
        params: parameters on the mesh.
        stop_ids: a completion ends after one of these, where nothing else is asked for (`stopping.Stops`).
        vocabulary: ids from here on are padding rows of the head and are never sampled.
        rows: completions that are decoded together, at most.
        cached: completions that have a place for their keys, `rows` or more: while some samples of a prompt have ended
            and others hold its slot, those of further prompts take their rows.
        part: completions of a part.
        pad: prompt lengths are padded to multiples of this.
        narrowest: when few go on they do so in a quarter of `rows`, or a quarter of that, not below this. Not in a half:
            each width is a program of its own, and a layer takes a CPU a second to compile.
    """

    config: LlamaConfig
    compute: llama.Compute
    decode_compute: llama.Compute
    params: llama.Params
    mesh: jax.sharding.Mesh
    stop_ids: tuple[int, ...]
    vocabulary: int
    rows: int
    cached: int
    part: int
    pad: int
    narrowest: int

    @property
    def rules(self) -> Rules:
        """Which mesh axes the parameters and the rows of a batch are cut over."""
        return LAYOUTS[self.compute.layout][0]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete n times.

    Attributes:
        ids: the prompt's token ids.
        keys: identities of its completions, one each; with the seed and phase they decide the random draws.
    """

    ids: tuple[int, ...]
    keys: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A sampled continuation; `finish_reason` is "stop" (its last id has ended it) or "length"."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """What sampling has cost.

    Attributes:
        tokens: sampled.
        fallbacks: of them, those that needed more than the first window.
        steps: of decoding.
        places: rows that were computed, summed over the steps; those that decoded no token were lost, to samples of a
            prompt that ended before the others and to draining.
        lost: of them.
        shapes: programs that were used.
    """

    tokens: int = 0
    fallbacks: int = 0
    steps: int = 0
    places: int = 0
    lost: int = 0
    shapes: frozenset[tuple[int, ...]] = frozenset()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tokens + other.tokens, self.fallbacks + other.fallbacks, self.steps + other.steps,
            self.places + other.places, self.lost + other.lost, self.shapes | other.shapes,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.lost / max(self.places, 1):.0%} of slots lost, wider window for"
            f" {self.fallbacks}, {len(self.shapes)} shapes"
        )


Advance = Callable[[int, Counts], None]


def per_part(engine: Engine, requests: Sequence[Request]) -> int:
    """Requests of a part, no more than there are.

    The mesh has no say: parts are the unit of resume, and a run may go on with another number of devices.
    """
    return min(max(1, engine.part // len(requests[0].keys)), len(requests))


def padded(engine: Engine, count: int) -> int:
    """Rows of a batch that holds `count`: the next multiple of the mesh's row shards."""
    multiple = rows_multiple(engine.mesh, engine.rules)
    return -(-count // multiple) * multiple


def extent(length: int, pad: int) -> int:
    """The padded length: `pad` times 1, 2, 3, 4, 6, 8, 12, 16, …: few shapes, and at most a third of one is padding."""
    size = 1
    while size * pad < length:
        size = size + 1 if size < 3 else size * 4 // 3 if size % 3 == 0 else size * 3 // 2
    return size * pad


def run(
    engine: Engine,
    sampling: Sampling,
    requests: Sequence[Request],
    seed: int,
    phase: str,
    skip: Sequence[bool] = (),
    advance: Advance = lambda *_: None,
    stops: Stops | None = None,
) -> Iterator[tuple[int, list[list[Completion]], Counts]]:
    """Samples all requests, `per_part` at a time; what all of them begin with is read once.

    Args:
        requests: each with the same number of keys.
        phase: names the work, e.g. "m2/responses"; part of every random key.
        skip: parts that are not needed (an earlier process wrote them).
        stops: what ends a completion, if not only the engine's stop ids.
        advance: told how many completions have ended since it was last told, and what their part has cost so far.

    Yields:
        (part, completions of each of its requests, what it cost).

    Raises:
        UserError: for empty prompts and those that leave no room for a completion in the model's context.
    """
    if not requests:
        return
    _check(engine, sampling, requests)
    width, samples = per_part(engine, requests), len(requests[0].keys)
    shared = _shared_prefix(requests)
    count = padded(engine, min(max(1, engine.cached // samples), width))
    program = decode.Program(engine.config, engine.compute, sampling, engine.vocabulary)
    inputs: decode.Inputs | None = None
    for part in range(-(-len(requests) // width)):
        if part < len(skip) and skip[part]:
            continue
        if inputs is None:
            table = stops.table if stops else stop_table(engine.stop_ids, engine.vocabulary)
            inputs = _inputs(engine, seed, phase, shared, table)
        work = _Work(engine, program, inputs, len(shared), count)
        yield part, *_drain(work, requests[part * width : (part + 1) * width], advance)


def _check(engine: Engine, sampling: Sampling, requests: Sequence[Request]) -> None:
    empty = sum(not request.ids for request in requests)
    room = engine.config.context - sampling.max_new_tokens
    long = sum(len(request.ids) > room for request in requests)
    problems = []
    if empty:
        problems.append(f"{empty} of {len(requests)} prompts have no token; leave them out")
    if long:
        problems.append(
            f"{long} of {len(requests)} prompts have more than {room} tokens, and the model's context is"
            f" {engine.config.context} with {sampling.max_new_tokens} for the completion; leave them out or allow fewer"
        )
    if problems:
        raise UserError(*problems)


def _shared_prefix(requests: Sequence[Request]) -> tuple[int, ...]:
    """The longest common start of all prompts, one token short of the shortest: each needs one of its own."""
    limit = min(len(request.ids) for request in requests) - 1
    return tuple(common_prefix([request.ids for request in requests])[:limit])


def _inputs(engine: Engine, seed: int, phase: str, shared: tuple[int, ...], table: np.ndarray) -> decode.Inputs:
    """What the parts have in common, on the devices."""

    def number(value: int) -> jax.Array:
        return replicate(np.asarray(value, np.uint32), engine.mesh)

    prefix = _read_shared(engine, shared)
    return decode.Inputs(
        engine.params, number(seed), number(zlib.crc32(phase.encode())), prefix, replicate(table, engine.mesh)
    )


def _read_shared(engine: Engine, shared: tuple[int, ...]) -> tuple[Keys, ...]:
    if not shared:
        return ()
    with jax.set_mesh(engine.mesh):
        here = np.asarray([shared], np.int32)
        return (decode.prefix_keys(engine.config, engine.compute, engine.params, here),)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the dispatches of a part have in common.

    Attributes:
        start: tokens of each prompt that are in the prefix.
        slots: G.
    """

    engine: Engine
    program: decode.Program
    inputs: decode.Inputs
    start: int
    slots: int


def _widths(engine: Engine, slots: int, samples: int) -> list[int]:
    """Rows that a step can be computed for, fewest first: the engine's, and quarters of them as often as it says."""
    shards = rows_multiple(engine.mesh, engine.rules)
    widths = [max(min(engine.rows, slots * samples) // shards, samples) * shards]
    while widths[0] // 4 >= engine.narrowest and widths[0] % (4 * shards) == 0:
        widths.insert(0, widths[0] // 4)
    return widths


def _drain(work: _Work, requests: Sequence[Request], advance: Advance) -> tuple[list[list[Completion]], Counts]:
    """All completions of a part's requests."""
    engine, samples = work.engine, len(requests[0].keys)
    time = extent(max(len(request.ids) for request in requests) - work.start, engine.pad)
    shards = rows_multiple(engine.mesh, engine.rules)
    waiting = deque(sorted(range(len(requests)), key=lambda index: -len(requests[index].ids)))
    free = [deque(range(start, start + work.slots // shards)) for start in range(0, work.slots, work.slots // shards)]
    held: dict[int, tuple[int, int]] = {}  # slot to its request, and the dispatch that is the first to decode it
    reports: deque[tuple[int, decode.Report]] = deque()
    out: list[list[Completion]] = [[] for _ in requests]
    shapes: set[tuple[int, ...]] = set()
    decoding = work.program._replace(compute=engine.decode_compute)
    going = np.zeros((work.slots, samples), bool)  # rows that may not be done
    dispatch = 0
    widths = _widths(engine, work.slots, samples)
    most = widths[-1] // shards  # rows of a shard
    batch = min(padded(engine, min(READ, -(-work.slots // 4))), most // samples * shards)
    with jax.set_mesh(engine.mesh):
        slots = decode.blank(decoding, engine.params, work.slots, samples, time)
        while True:
            while waiting:
                live = going.reshape(shards, -1).sum(axis=1)
                room = [min(len(ours), (most - int(rows)) // samples) for ours, rows in zip(free, live, strict=True)]
                if sum(room) < min(batch, len(waiting)):
                    break
                chosen = _choose(waiting, free, [min(more, batch // shards) for more in room])
                held |= {slot: (request, dispatch) for slot, request in chosen.items()}
                going[list(chosen)] = True
                slots, shape = _fill(work, slots, [(slot, requests[index]) for slot, index in chosen.items()], batch)
                shapes.add(shape)
            live = int(going.reshape(shards, -1).sum(axis=1).max()) * shards
            place_in = next(index for index, width in enumerate(widths) if width >= live)
            few = widths[place_in - 1] // shards if place_in else 0
            enough = min(batch, len(waiting)) or work.slots + 1  # none waits: until few go on
            shapes.add((work.slots, samples, time, widths[place_in]))
            slots, report = decode.advance(
                decoding, work.inputs, slots, widths[place_in], *map(np.int32, (STEPS, enough, most, few))
            )
            reports.append((dispatch, report))
            dispatch += 1
            if len(reports) <= AHEAD:
                continue
            number, report = reports.popleft()
            seen = fetch(report, engine.mesh)
            done = seen.done.reshape(work.slots, samples)
            seen_slots = [slot for slot, (_, first) in held.items() if first <= number]
            going[seen_slots] = ~done[seen_slots]
            ended = [slot for slot in seen_slots if done[slot].all()]
            for slot in ended:
                out[held.pop(slot)[0]] = [_completion(seen, slot * samples + row) for row in range(samples)]
                free[slot // (work.slots // shards)].append(slot)
            tokens = sum(len(one.ids) for some in out for one in some)
            places = int(seen.places)
            lost = places - int(seen.busy)
            counts = Counts(tokens, int(seen.fallbacks), int(seen.steps), places, lost, frozenset(shapes))
            if ended:
                advance(len(ended) * samples, counts)
            if not waiting and not held:
                return out, counts


def _choose(waiting: deque[int], free: Sequence[deque[int]], room: Sequence[int]) -> dict[int, int]:
    """Free slots, as many of each shard as it has room for, to the requests that are next."""
    chosen = {}
    for shard, count in zip(free, room, strict=True):
        for _ in range(min(count, len(waiting))):
            chosen[shard.popleft()] = waiting.popleft()
    return chosen


def _fill(
    work: _Work, slots: decode.Slots, chosen: Sequence[tuple[int, Request]], batch: int
) -> tuple[decode.Slots, tuple[int, ...]]:
    """Reads the chosen requests' prompts into their slots; and the shape that this took."""
    engine = work.engine
    shards = rows_multiple(engine.mesh, engine.rules)
    time = extent(max(len(request.ids) for _, request in chosen) - work.start, engine.pad)
    prompts = np.zeros((batch, time), np.int32)
    lengths = np.zeros(batch, np.int32)
    keys = np.zeros((batch, len(chosen[0][1].keys)), np.int32)
    where = np.full(batch, -1, np.int32)
    taken = [0] * shards
    for slot, request in chosen:
        shard, place_there = divmod(slot, work.slots // shards)
        row = shard * (batch // shards) + taken[shard]
        taken[shard] += 1
        own = request.ids[work.start :]
        prompts[row, : len(own)], lengths[row], keys[row], where[row] = own, len(own), request.keys, place_there
    batches = [place(array, engine.mesh, engine.rules) for array in (prompts, lengths, keys, where)]
    read = decode.read(work.program, work.inputs, *batches[:3])
    return decode.insert(slots, *read, batches[3]), (batch, *keys.shape[1:], time)


def _completion(seen: decode.Report, row: int) -> Completion:
    length = int(seen.lengths[row])
    return Completion(
        tuple(int(i) for i in seen.tokens[row, :length]),
        tuple(round(float(p), 6) for p in seen.logps[row, :length]),
        "stop" if seen.stopped[row] else "length",
    )
