"""The paper's section 2.4 as code: which stages make SFT, M1, M2, M3, ..., and in what order."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from etils import epath

from selfreward_jax import processes, stores, workdir
from selfreward_jax.config import Config, flat, free_fields, models
from selfreward_jax.errors import UserError
from selfreward_jax.made_by import made_by
from selfreward_jax.observe import report
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run
from selfreward_jax.stages import (
    check,
    eft,
    export,
    judgments,
    own_data,
    pairs,
    positives,
    prompts,
    reference,
    responses,
    seed,
    train_dpo,
    train_sft,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    Attributes:
        name: "m2/responses".
        make: does the work and returns facts for the record.
        settings: config fields and groups ("dpo", "engine.rows") that decide its result.
        inputs, outputs: paths under the workdir that it reads and leaves.
        partial: outputs that a killed start leaves half-done and the next one continues.
        scratch: paths that are deleted when it is done.
    """

    name: str
    make: Callable[[Run], dict[str, Any]]
    settings: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()


_MODEL = ("seed", "model", "data.max_length", "engine")


def stages(config: Config) -> list[Stage]:
    """All stages of the target, in order."""
    seeds = tuple(f"seed/{name}.jsonl" for name in ("ift", "eft_train_sets", "eft_eval_sets", "rest"))
    eft_file = "m1/eft_train.jsonl"
    out = [Stage("seed/split", seed.make, ("seed", "data", "eft", "judge.low", "judge.high"), (), seeds)]
    for model in models(config.target):
        if model == "sft":
            out.append(_sft(model, seeds[:1]))
        elif model == "m1":
            judged = ("sft/stages/train.json",) if config.eft.source == "build" else ()
            out.append(
                Stage(
                    "m1/eft", eft.make, (*_MODEL, "eft", "judge"), (seeds[1], *judged), (eft_file,),
                    ("m1/eft_judgments",),
                )
            )  # fmt: skip
            if config.eft.source == "none":
                copying = partial(train_sft.copy, model=model, of="sft")
                out.append(_training(model, copying, (), (eft_file, "sft/stages/train.json")))
            else:
                out.append(_sft(model, (seeds[0], eft_file)))
        else:
            out += _iteration(config, model, f"m{int(model[1:]) - 1}", seeds, eft_file)
        trained = f"{model}/stages/train.json"
        out += [
            _export(model),
            Stage(
                f"{model}/check", partial(check.make, model=model), (*_MODEL, "judge", "responses", "check", "data.validation"),
                (trained, seeds[2]), (f"{model}/check",), (f"{model}/check",),
            ),
        ]  # fmt: skip
    return out


def own_stages(config: Config, loss: str) -> list[Stage]:
    """Training on people's own data without the loop: from `model.source` by "sft" or "dpo" to `trained/`."""
    model, before = "trained", "m0"
    if loss == "sft":
        rows = "trained/examples.jsonl"
        read = Stage("trained/examples", own_data.examples, ("seed", "data.ift"), (), (rows,))
        return [read, _sft(model, (rows,)), _export(model)]
    read = Stage("trained/pairs", own_data.preferences, (*_MODEL, "data.preferences"), (), ("trained/pairs.jsonl",))
    return [read, *_dpo(config, model, before, ()), _export(model)]


# Fields that may name a file of the user (or files): what a stage makes depends on what is in it.
_FILES = (
    "data.oasst", "data.ift", "data.preferences", "data.validation", "eft.file", "prompts.source", "prompts.avoid",
    "judge.template", "model.chat_template",
)  # fmt: skip
_MODELS = ("model.source", "model.tokenizer")  # a folder, or a file of weights
_HASHED = 64 * 2**20  # bytes: tokenizers and configs are smaller


def _training(model: str, make: Callable, settings: tuple[str, ...], inputs: tuple[str, ...]) -> Stage:
    scratch = (f"{model}/checkpoints",)
    return Stage(
        f"{model}/train", make, (*_MODEL, *settings), inputs, (f"{model}/params",),
        (*scratch, *(f"{model}/{name}" for name in ("metrics", "verdicts.json", "left_out"))), scratch,
    )  # fmt: skip


def _export(model: str) -> Stage:
    return Stage(
        f"{model}/export", partial(export.make, model=model), ("model.export_dtype",), (f"{model}/stages/train.json",),
        (f"{model}/model",),
    )  # fmt: skip


def _sft(model: str, files: tuple[str, ...], weights: tuple[float, ...] = ()) -> Stage:
    """SFT from M0 on these files, each with weight 1 if no weights are given."""
    weighted = list(zip(files, weights or (1.0,) * len(files), strict=True))
    settings = ("data", "sft", *(("aift.positive_weight",) if weights else ()))
    return _training(model, partial(train_sft.make, model=model, files=weighted), settings, files)


def _dpo(config: Config, model: str, before: str, trained: tuple[str, ...]) -> list[Stage]:
    """DPO from `before` on `MODEL/pairs.jsonl`, with its reference log-probs where they are cached."""
    pair_file, reference_file = f"{model}/pairs.jsonl", f"{model}/reference.jsonl"
    train = partial(train_dpo.make, model=model, before=before)
    if config.dpo.reference == "live":
        return [_training(model, train, ("dpo",), (pair_file, *trained))]
    cached = Stage(
        f"{model}/reference", partial(reference.make, model=model, before=before), _MODEL, (pair_file, *trained),
        (reference_file,),
    )  # fmt: skip
    return [cached, _training(model, train, ("dpo",), (pair_file, reference_file, *trained))]


def _iteration(config: Config, model: str, before: str, seeds: tuple[str, ...], eft_file: str) -> list[Stage]:
    """AIFT(before) and training on it (paper sections 2.2 and 2.3): M(t+1) comes from M(t) alone."""
    trained = f"{before}/stages/train.json"
    earlier = tuple(f"m{t}/prompts.jsonl" for t in range(2, int(model[1:])))
    made = {name: f"{model}/{name}" for name in ("responses", "judgments")}
    prompt_file = f"{model}/prompts.jsonl"
    answers = (prompt_file, made["responses"], made["judgments"])
    of_before = config.prompts.model == "current"
    prompt_settings = (*_MODEL, "prompts", "aift.num_prompts", "data", "responses.max_new_tokens")
    out = [
        Stage(
            f"{model}/prompts", partial(prompts.make, model=model, before=before), prompt_settings,
            (seeds[0], seeds[3], *earlier, *((trained,) if of_before else ())), (prompt_file,),
            (f"{model}/pool",) if of_before else (),
        ),
        Stage(
            f"{model}/responses", partial(responses.make, model=model, before=before), (*_MODEL, "responses"),
            (prompt_file, trained), (made["responses"],), (made["responses"],),
        ),
        Stage(
            f"{model}/judgments", partial(judgments.make, model=model, before=before), (*_MODEL, "judge"),
            (prompt_file, made["responses"], trained), (made["judgments"],), (made["judgments"],),
        ),
    ]  # fmt: skip
    if config.aift.method == "positives":
        positive_file = f"{model}/positives.jsonl"
        settings = (*_MODEL, "aift.positive_score", "aift.min_judgments")
        out.append(
            Stage(f"{model}/positives", partial(positives.make, model=model), settings, answers, (positive_file,))
        )
        files, weights = (seeds[0], eft_file, positive_file), (1.0, 1.0, config.aift.positive_weight)
        return [*out, _sft(model, files, weights)]
    settings = (*_MODEL, *(f"aift.{name}" for name in ("max_pairs", "min_judgments", "tie_break", "length_control")))
    outputs = (f"{model}/pairs.jsonl", f"{model}/preferences.jsonl")
    out.append(Stage(f"{model}/pairs", partial(pairs.make, model=model), settings, answers, outputs))
    return [*out, *_dpo(config, model, before, (trained,))]


def settings_of(config: Config, stage: Stage) -> dict[str, Any]:
    """The fields that decide a stage's result, by dotted name."""
    free = free_fields()
    return {
        name: value
        for name, value in flat(config).items()
        if name not in free and any(name == some or name.startswith(f"{some}.") for some in stage.settings)
    }


def files_of(settings: dict[str, Any]) -> dict[str, str]:
    """The user's local files and model folders that a stage's settings name, with what identifies their content."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        for file in value if isinstance(value, tuple) else (value,):
            if name in _MODELS or (name in _FILES and not epath.Path(file or ".").is_dir()):
                found[file] = _identity(file)
    return {file: identity for file, identity in found.items() if identity}


def _identity(name: str) -> str:
    """Of a file its sha256, or its size if it is as big as weights are; of a folder its files'; "" if it is not there."""
    path = epath.Path(name).expanduser()
    if name in ("", "demo") or stores.is_remote(name) or not path.exists():
        return ""
    if path.is_dir():
        return workdir.digest(sorted((file.name, _identity(str(file))) for file in path.iterdir()))
    size = path.stat().length
    return workdir.manifest(path) if size <= _HASHED else f"{size} bytes"


def _changed_files(root: epath.Path, stage: Stage) -> bool:
    """Whether what the stage was made from is there with another content; what is gone changes nothing."""
    made_from = workdir.facts(root, stage.name).get("files", {})
    changed = processes.together(
        lambda: [file for file, identity in made_from.items() if _identity(file) not in ("", identity)]
    )
    if changed:
        say(f"[{stage.name}] {', '.join(changed)} changed: done again")
    return bool(changed)


def check_stop(plan: Sequence[Stage], stop_after: str) -> None:
    """Refuses a `--stop_after` that is no stage of this plan."""
    names = [stage.name for stage in plan]
    if stop_after and stop_after not in names:
        raise UserError(f"--stop_after={stop_after}: no such stage; they are {', '.join(names)}")


def build(
    plan: Sequence[Stage], config: Config, root: epath.Path, open_run: Callable[[], Run], stop_after: str = ""
) -> None:
    """Builds what is missing, in order; finished stages are skipped, a half-finished one is continued.

    Args:
        plan: `stages(config)` for the loop, `own_stages` for training on its own.
        root: the run's folder, locked by the caller.
        open_run: opens model, tokenizer and mesh; called only if there is work.
        stop_after: name of the last stage to do, or "".
    """
    run: Run | None = None
    for stage in plan:
        if workdir.is_done(root, stage.name) and not _changed_files(root, stage):
            _clear(root, stage)  # a kill may have come between the record and the clearing
            say(f"[{stage.name}] done before")
        else:
            run = run or open_run()
            _do(run, config, root, stage)
        if stage.name == stop_after:
            say(f"stopped here by --stop_after={stop_after}; the same command without it goes on")
            return


def build_loop(config: Config, root: epath.Path, open_run: Callable[[], Run], stop_after: str = "") -> None:
    """`build` for the whole loop, then the closing table; also where the loop cannot go on, of what there is."""
    plan = stages(config)
    try:
        build(plan, config, root, open_run, stop_after)
    except UserError:
        with contextlib.suppress(UserError):  # a full disk fails the report too; the error that matters is the first
            finished = [model for model in models(config.target) if workdir.facts(root, f"{model}/check")]
            if finished:
                report.write(root, finished, [stage.name for stage in plan])
        raise
    if not stop_after:
        report.write(root, models(config.target), [stage.name for stage in plan])


def _clear(root: epath.Path, stage: Stage) -> None:
    for name in stage.scratch:
        workdir.remove(root / name)


def _do(run: Run, config: Config, root: epath.Path, stage: Stage) -> None:
    def at(names: tuple[str, ...]) -> list[epath.Path]:
        return [root / name for name in names]

    began = time.monotonic()
    settings = settings_of(config, stage)
    files = processes.together(lambda: files_of(settings))
    workdir.begin(root, stage.name, settings | files, at(stage.inputs), at(stage.partial))
    try:
        facts = stage.make(run)
    except OSError as error:
        raise workdir.disk_error(error.filename or root, error) from error
    seconds = time.monotonic() - began
    facts |= {"files": files}
    workdir.finish(root, stage.name, at(stage.inputs), at(stage.outputs), seconds, facts, made_by(flat(config)))
    _clear(root, stage)
    say(f"[{stage.name}] done in {seconds:.1f} s")
