"""The host side of sampling: requests in, completions out, a part at a time."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from selfreward_jax.data.chat import common_prefix
from selfreward_jax.model import llama
from selfreward_jax.model.attention import Keys
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.place import fetch, place, rows_multiple
from selfreward_jax.sharding.rules import LAYOUTS, Rules


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model that is ready to sample.

    Attributes:
        compute, decode_compute: how prompts are read, and how single tokens are; both in the layout of `params`.
        params: parameters on the mesh.
        stop_ids: a completion ends after one of these.
        vocabulary: ids from here on are padding rows of the head and are never sampled.
        rows: completions that are decoded together.
        pad: prompt lengths are padded to multiples of this.
    """

    config: LlamaConfig
    compute: llama.Compute
    decode_compute: llama.Compute
    params: llama.Params
    mesh: jax.sharding.Mesh
    stop_ids: tuple[int, ...]
    vocabulary: int
    rows: int
    pad: int

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
    """A sampled continuation; `finish_reason` is "stop" (a stop token, which is its last id) or "length"."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def per_part(engine: Engine, requests: Sequence[Request]) -> int:
    """Requests that are sampled together, no more than there are.

    The mesh has no say: parts are the unit of resume, and a run may go on with another number of devices.
    """
    return min(max(1, engine.rows // len(requests[0].keys)), len(requests))


def padded(engine: Engine, count: int) -> int:
    """Rows of a batch that holds `count`: the next multiple of the mesh's row shards."""
    multiple = rows_multiple(engine.mesh, engine.rules)
    return -(-count // multiple) * multiple


def run(
    engine: Engine, sampling: Sampling, requests: Sequence[Request], seed: int, phase: str, skip: Sequence[bool] = ()
) -> Iterator[tuple[int, list[list[Completion]], dict[str, int]]]:
    """Samples all requests, `per_part` at a time; what all of them begin with is read once.

    Args:
        requests: each with the same number of keys.
        phase: names the work, e.g. "m2/responses"; part of every random key.
        skip: parts that are not needed (an earlier process wrote them).

    Yields:
        (part, completions of each of its requests, {"tokens", "steps", "fallbacks"}).
    """
    if not requests:
        return
    width = per_part(engine, requests)
    shared = _shared_prefix(requests)
    longest = max(len(request.ids) for request in requests) - len(shared)
    time = -(-longest // engine.pad) * engine.pad
    prefix: tuple[Keys, ...] | None = None
    for part in range(-(-len(requests) // width)):
        if part < len(skip) and skip[part]:
            continue
        if prefix is None:
            prefix = _read_shared(engine, shared)
        chosen = requests[part * width : (part + 1) * width]
        sampled = _sample(engine, sampling, chosen, len(shared), padded(engine, width), time, prefix, seed, phase)
        yield part, *_collect(sampled, len(chosen), len(requests[0].keys))


def _read_shared(engine: Engine, shared: tuple[int, ...]) -> tuple[Keys, ...]:
    if not shared:
        return ()
    with jax.set_mesh(engine.mesh):
        here = np.asarray([shared], np.int32)
        return (decode.prefix_keys(engine.config, engine.compute, engine.params, here),)


def _sample(
    engine: Engine, sampling: Sampling, requests: Sequence[Request], start: int, rows: int, time: int,
    prefix: tuple[Keys, ...], seed: int, phase: str,
) -> decode.Sampled:  # fmt: skip
    """One batch: `rows` prompts of `time` tokens after the first `start`, which are the shared prefix."""
    prompts = np.zeros((rows, time), np.int32)
    lengths = np.zeros(rows, np.int32)
    keys = np.zeros((rows, len(requests[0].keys)), np.int32)
    for index, request in enumerate(requests):
        own = request.ids[start:]
        prompts[index, : len(own)] = own
        lengths[index] = len(own)
        keys[index] = request.keys
    with jax.set_mesh(engine.mesh):
        batch = (place(array, engine.mesh, engine.rules) for array in (prompts, lengths, keys))
        sampled = decode.sample(
            engine.config, engine.compute, engine.decode_compute, sampling, np.uint32(seed),
            np.uint32(zlib.crc32(phase.encode())), engine.vocabulary, engine.params, *batch, prefix,
            np.asarray(engine.stop_ids, np.int32),
        )  # fmt: skip
        return fetch(sampled, engine.mesh)


def _shared_prefix(requests: Sequence[Request]) -> tuple[int, ...]:
    """The longest common start of all prompts, one token short of the shortest: each needs one of its own."""
    limit = min(len(request.ids) for request in requests) - 1
    return tuple(common_prefix([request.ids for request in requests])[:limit])


def _collect(sampled: decode.Sampled, requests: int, samples: int) -> tuple[list[list[Completion]], dict[str, int]]:
    out = []
    for request in range(requests):
        rows = range(request * samples, (request + 1) * samples)
        out.append([
            Completion(
                tuple(int(i) for i in sampled.tokens[row, : sampled.lengths[row]]),
                tuple(round(float(p), 6) for p in sampled.logps[row, : sampled.lengths[row]]),
                "stop" if sampled.stopped[row] else "length",
            )
            for row in rows
        ])  # fmt: skip
    counts = {"tokens": int(sampled.lengths.sum()), "steps": int(sampled.steps), "fallbacks": int(sampled.fallbacks)}
    return out, counts
