"""What the stages of one run share: the config, the folder, the mesh, the tokenizer, and the model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from etils import epath

from selfreward_jax import processes, stores, workdir
from selfreward_jax.config import Config, TrainConfig
from selfreward_jax.data import batches, packing
from selfreward_jax.data.chat import Chat, encode_prompt
from selfreward_jax.data.records import Judgment, Pair, Prompt, Response, read_records, to_json
from selfreward_jax.evaluation.judge import score_of
from selfreward_jax.judging import templates
from selfreward_jax.judging.pairs import Candidate
from selfreward_jax.model import kernels, llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.stopping import Stops
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.place import rows_multiple
from selfreward_jax.training.optimizer import Optimizer
from selfreward_jax.training.trainer import Plan
from selfreward_jax.weights.source import Source


class Held(NamedTuple):
    """Parameters in memory: of which model ("m0", "sft", "m1", …), in which layout (`sharding.rules.LAYOUTS`)."""

    model: str
    layout: str
    params: llama.Params


@dataclasses.dataclass
class Run:
    """One run, as each of its processes knows it.

    Attributes:
        attention: the form of attention (`model.attention.attend`).
        mesh, generation_mesh: the same devices as training and as sampling group them.
        held: the model that was used last, so that neighbouring stages load it once.
    """

    config: Config
    root: epath.Path
    attention: str
    mesh: jax.sharding.Mesh
    generation_mesh: jax.sharding.Mesh
    source: Source
    chat: Chat
    held: Held | None = None


def sampling(run: Run, part: Any) -> Sampling:
    """Sampling parameters from a config group that has temperature, top_p, top_k, min_p and max_new_tokens."""
    return Sampling(
        part.temperature, part.top_p, part.max_new_tokens, run.config.engine.window, part.top_k, part.min_p
    )


def plan(run: Run, name: str, part: TrainConfig, items: Sequence[Any]) -> Plan:
    """The training plan of a config group for these examples or pairs; a line says how they are packed."""
    steps = batches.updates(len(items), part.epochs, part.batch)
    optimizer = Optimizer(
        part.lr, part.lr_end, steps, part.warmup, part.b1, part.b2, part.eps, part.weight_decay, part.clip,
        part.optimizer, part.moments, part.spike,
    )  # fmt: skip
    model, pad = run.source.config, run.config.engine.pad
    shape = packing.Shape(pad, rows_multiple(run.mesh), pad, run.attention not in kernels.SEGMENTS)

    def groups(epochs: int) -> list[list[Sequence[batches.Row]]]:
        count, seed = len(items), run.config.seed
        orders = (
            batches.batch_indices(count, epochs, seed, part.batch, i)
            for i in range(batches.updates(count, epochs, part.batch))
        )
        return [[items[i].rows for i in order] for order in orders]

    # By the first epoch alone, so that the pass over the reference, which is one, has the rows of training.
    time = packing.choose_time(groups(1), shape, part.row, model.attention_share())
    shape = dataclasses.replace(shape, time=time)
    updates = groups(part.epochs)
    parts = [part for update in updates for part in packing.microbatches(update, shape)]
    whole = sum(len(row.tokens) for update in updates for rows in update for row in rows)
    held = sum(part.tokens for part in parts)
    say(
        f"[{name}] {steps} batches in {len(parts)} microbatches of {shape.rows} rows of"
        f" {', '.join(map(str, sorted({part.time for part in parts})))} tokens: {packing.wasted(parts, shape):.1%} of"
        f" positions are wasted; common prefixes {f'once, {1 - held / whole:.1%} of the tokens less' if shape.shared else 'repeated'}"
    )
    return Plan(
        optimizer, part.epochs, part.batch, shape, run.config.seed, part.dropout, run.config.engine.chunk,
        part.checkpoint_every, part.keep, part.on_bad,
    )  # fmt: skip


def fits(config: LlamaConfig, ids: Sequence[int], new_tokens: int) -> bool:
    """Whether a prompt leaves room for its completion in the model's context."""
    return len(ids) + new_tokens <= config.context


def pair_rows(run: Run, pair: Pair) -> tuple[batches.Row, batches.Row]:
    """Chosen and rejected as token rows: the prompt's ids, then the ids as they were sampled."""
    prompt = tuple(encode_prompt(run.chat, pair.prompt))
    return batches.Row(prompt + pair.chosen_ids, len(prompt)), batches.Row(prompt + pair.rejected_ids, len(prompt))


def write_records(path: epath.Path, records: Sequence[Any]) -> None:
    """Writes records as jsonl, whole or not at all."""
    workdir.write_text(path, "".join(to_json(record) + "\n" for record in records))


def read_ours(path: epath.Path, cls: type) -> list[Any]:
    """Records of a file that the run wrote; it may hold none (a user's empty file is an error, ours is not)."""
    with stores.asking(path, "read"):
        empty = not path.stat().length
    return [] if empty else read_records(path, cls)


def read_parts(directory: epath.Path, cls: type) -> list[Any]:
    """Records of all part files of a finished stage, in order; what a kill left half-written is no part."""
    there = processes.together(lambda: stores.listing(directory)) or {}
    names = sorted(name for name in there if name.startswith("part-") and name.endswith(".jsonl"))
    return [record for name in names for record in read_ours(directory / name, cls)]


def judged(run: Run, model: str) -> Iterator[tuple[Prompt, dict[int, Response], list[Candidate]]]:
    """Each prompt of the iteration with its responses by index and its candidates, in the order of the prompts."""
    responses: dict[str, dict[int, Response]] = {}
    for response in read_parts(run.root / model / "responses", Response):
        responses.setdefault(response.prompt_id, {})[response.index] = response
    votes: dict[tuple[str, int], list[Fraction]] = {}
    for judgment in read_parts(run.root / model / "judgments", Judgment):
        score = score_of(judgment)
        if score is not None:
            votes.setdefault((judgment.prompt_id, judgment.response_index), []).append(score)
    for prompt in read_records(run.root / model / "prompts.jsonl", Prompt):
        by_index = dict(sorted(responses.get(prompt.id, {}).items()))
        yield (
            prompt,
            by_index,
            [
                Candidate(i, tuple(votes.get((prompt.id, i), ())), r.finish_reason == "stop", r.token_ids, r.text)
                for i, r in by_index.items()
            ],
        )


def judge_template(run: Run) -> templates.Template:
    """The judge prompt of the config, with its range of scores."""
    return templates.load(run.config.judge.template, run.config.judge.low, run.config.judge.high)


def sample_parts(
    run: Run,
    model: engines.Engine,
    how: Sampling,
    requests: Sequence[engines.Request],
    stage: str,
    directory: epath.Path,
    unit: str,
    to_records: Callable[[int, list[list[engines.Completion]]], list[Any]],
    stops: Stops | None = None,
) -> list[epath.Path]:
    """Samples all requests into part files; parts that an earlier process finished are not done again.

    Args:
        unit: what a completion is called in the progress line.
        stops: what ends a completion, if not only the end of its turn.
        to_records: (index of a part's first request, completions of each of its requests) -> records to write.

    Returns:
        The part files, in order.
    """
    if not requests:
        return []
    width = engines.per_part(model, requests)
    files = workdir.parts(directory, -(-len(requests) // width))
    there = workdir.exist(files)
    per_request = len(requests[0].keys)
    done = sum(len(requests[i * width : (i + 1) * width]) * per_request for i, exists in enumerate(there) if exists)
    total = engines.Counts()
    with progress(stage, len(requests) * per_request, unit, done) as advance:
        note = lambda count, cost: advance(count, str(total + cost))  # noqa: E731
        for part, completions, counts in engines.run(
            model, how, requests, run.config.seed, stage, there, note, stops
        ):
            write_records(files[part], to_records(part * width, completions))
            total += counts
    return files
