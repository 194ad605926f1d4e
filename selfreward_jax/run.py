"""What the stages of one run share: the config, the folder, the mesh, the tokenizer, and the model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import jax
from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import OWN_JUDGES, Config, TrainConfig
from selfreward_jax.data import batches
from selfreward_jax.data.chat import Chat, encode_prompt, load_chat
from selfreward_jax.data.records import Judgment, Pair, Prompt, Response, read_records, to_json
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation.judge import score_of
from selfreward_jax.judging import templates
from selfreward_jax.judging.pairs import Candidate
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import progress
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.rules import shardings
from selfreward_jax.training import checkpoint
from selfreward_jax.training.optimizer import Optimizer
from selfreward_jax.training.trainer import Plan
from selfreward_jax.weights.source import Source, load_params, open_source


@dataclasses.dataclass
class Run:
    """One process working on one run.

    Attributes:
        held: (name, parameters) of the model that was used last, so that neighbouring stages load it once.
    """

    config: Config
    root: epath.Path
    mesh: jax.sharding.Mesh
    source: Source
    chat: Chat
    held: tuple[str, llama.Params] | None = None


def compute(config: Config) -> llama.Compute:
    """How the model runs while training and prefilling."""
    form = attention_form(config.model.attention)
    return llama.Compute(config.model.compute_dtype, config.model.unroll, config.model.remat, form)


def attention_form(choice: str) -> str:
    """The form of attention for this host: `auto` is "mapped" on a CPU and "plain" elsewhere."""
    if choice != "auto":
        return choice
    return "mapped" if jax.default_backend() == "cpu" else "plain"


def abstract_params(run: Run) -> llama.Params:
    """Shapes, dtype and shardings of the parameters at training precision."""
    config = run.source.config
    placed = shardings(llama.logical_axes(config), run.mesh)
    tree = llama.abstract(config, run.config.model.param_dtype)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed)


def params_of(run: Run, model: str) -> llama.Params:
    """Parameters of "m0" (the source) or of a model that this run has trained; kept until another is asked for."""
    if run.held is None or run.held[0] != model:
        run.held = None  # freed before the next is read: two copies of a 70B do not fit
        run.held = (model, fresh_params(run, model))
    return run.held[1]


def fresh_params(run: Run, model: str) -> llama.Params:
    """As `params_of`, but always read anew: a copy of the caller's own."""
    if model == "m0":
        return load_params(run.source, run.mesh, run.config.model.param_dtype)
    return checkpoint.load_params(run.root / model / "params", abstract_params(run))


def take_params(run: Run, model: str) -> llama.Params:
    """`params_of` for a caller that donates them to training: nobody else holds them afterwards."""
    params = params_of(run, model)
    run.held = None
    return params


def engine(run: Run, params: llama.Params) -> engines.Engine:
    """A sampler over these parameters of the run's own model."""
    return _engine(run, run.source, run.chat, params)


def open_fixed(name: str, option: str) -> Source:
    """`open_source` for a model that another option than `model.source` names."""
    try:
        return open_source(name)
    except UserError as error:
        raise UserError(*(line.replace("--config.model.source", option) for line in error.args)) from error


def fixed_model(run: Run, name: str, option: str) -> tuple[engines.Engine, Chat]:
    """A sampler over a model fixed in advance (a prompt writer, a judge), with its own tokenizer and template.

    Another model's parameters are held in place of the run's own, in the compute dtype: they are never trained.
    """
    if name == run.config.model.source:
        return engine(run, params_of(run, "m0")), run.chat
    run.held = None
    source = open_fixed(name, option)
    chat = load_chat(source.tokenizer, "own" if source.tokenizer.chat_template else "llama2", source.eos_ids)
    return _engine(run, source, chat, load_params(source, run.mesh, run.config.model.compute_dtype)), chat


def prompt_writer(run: Run, before: str) -> tuple[engines.Engine, Chat]:
    """The model that writes new prompts: `prompts.model`, M0 itself, or `before`, the model in training (A.5)."""
    name = run.config.prompts.model
    if name == "current":
        return engine(run, params_of(run, before)), run.chat
    return fixed_model(run, name or run.config.model.source, "--config.prompts.model")


def judge_model(run: Run, before: str) -> tuple[engines.Engine, Chat]:
    """The judge of `before`'s answers: `before` itself, or the one fixed in advance by `judge.model`."""
    name = run.config.judge.model
    if name in ("", *OWN_JUDGES):
        return engine(run, params_of(run, name or before)), run.chat
    return fixed_model(run, name, "--config.judge.model")


def _engine(run: Run, source: Source, chat: Chat, params: llama.Params) -> engines.Engine:
    training = compute(run.config)
    return engines.Engine(
        source.config, dataclasses.replace(training, remat="none"),
        dataclasses.replace(training, remat="none", unroll=min(run.config.model.decode_unroll, source.config.layers)),
        params, run.mesh, chat.stop_ids, chat.vocabulary, run.config.engine.rows, run.config.engine.pad,
    )  # fmt: skip


def sampling(run: Run, part: Any) -> Sampling:
    """Sampling parameters from a config group that has temperature, top_p and max_new_tokens."""
    return Sampling(part.temperature, part.top_p, part.max_new_tokens, run.config.engine.window)


def plan(run: Run, part: TrainConfig, items: int) -> Plan:
    """The training plan of a config group for so many examples."""
    steps = batches.updates(items, part.epochs, part.batch)
    optimizer = Optimizer(
        part.lr, part.lr_end, steps, part.warmup, part.b1, part.b2, part.eps, part.weight_decay, part.clip
    )
    shape = batches.Shape(run.config.engine.pad, run.config.engine.pad_targets)
    return Plan(
        optimizer, part.epochs, part.batch, part.microbatch, run.config.seed, part.dropout, run.config.engine.chunk,
        shape, part.checkpoint_every, part.keep,
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
    return read_records(path, cls) if path.stat().length else []


def read_parts(directory: epath.Path, cls: type) -> list[Any]:
    """Records of all part files of a finished stage, in order; what a kill left half-written is no part."""
    files = sorted(directory.glob("part-*.jsonl"), key=lambda path: path.name)
    return [record for file in files for record in read_ours(file, cls)]


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
) -> list[epath.Path]:
    """Samples all requests into part files; parts that an earlier process finished are not done again.

    Args:
        unit: what a completion is called in the progress line.
        to_records: (index of a part's first request, completions of each of its requests) -> records to write.

    Returns:
        The part files, in order.
    """
    if not requests:
        return []
    width = engines.per_part(model, requests)
    files = workdir.parts(directory, -(-len(requests) // width))
    there = [file.exists() for file in files]
    per_request = len(requests[0].keys)
    done = sum(len(requests[i * width : (i + 1) * width]) * per_request for i, exists in enumerate(there) if exists)
    fallbacks = tokens = 0
    with progress(stage, len(requests) * per_request, unit, done) as advance:
        for part, completions, counts in engines.run(model, how, requests, run.config.seed, stage, there):
            write_records(files[part], to_records(part * width, completions))
            fallbacks += counts["fallbacks"]
            tokens += counts["tokens"]
            advance(len(completions) * per_request, f"{tokens} tokens, wider nucleus window for {fallbacks}")
    return files
