"""The paper's section 2.4 as code: which stages make SFT, M1, M2, M3, ..., and in what order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import Config, flat, free_fields, models
from selfreward_jax.errors import UserError
from selfreward_jax.observe import report
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run
from selfreward_jax.stages import (
    check,
    eft,
    export,
    judgments,
    pairs,
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
    out = [Stage("seed/split", seed.make, ("seed", "data", "eft", "judge.low", "judge.high"), (), seeds)]
    for model in models(config.target):
        if model == "sft":
            out.append(_training(model, partial(train_sft.make, model=model), ("data", "sft"), (seeds[0],)))
        elif model == "m1":
            building = config.eft.source == "build"
            inputs = (seeds[1], *(("sft/stages/train.json",) if building else ()))
            out.append(
                Stage(
                    "m1/eft",
                    eft.make,
                    (*_MODEL, "eft", "judge"),
                    inputs,
                    ("m1/eft_train.jsonl",),
                    ("m1/eft_judgments",),
                )
            )
            out.append(
                _training(
                    model, partial(train_sft.make, model=model), ("data", "sft"), (seeds[0], "m1/eft_train.jsonl")
                )
            )
        else:
            out += _iteration(config, model, f"m{int(model[1:]) - 1}", seeds)
        trained = f"{model}/stages/train.json"
        out.append(
            Stage(
                f"{model}/export",
                partial(export.make, model=model),
                ("model.export_dtype",),
                (trained,),
                (f"{model}/model",),
            )
        )
        out.append(
            Stage(
                f"{model}/check", partial(check.make, model=model), (*_MODEL, "judge", "responses", "check", "data.validation"),
                (trained, seeds[2]), (f"{model}/check",), (f"{model}/check",),
            )
        )  # fmt: skip
    return out


# Fields that may name a file of the user: what a stage makes depends on what is in it.
_FILES = ("data.oasst", "data.validation", "eft.file", "prompts.source", "judge.template", "model.chat_template")


def _training(model: str, make: Callable, settings: tuple[str, ...], inputs: tuple[str, ...]) -> Stage:
    scratch = (f"{model}/checkpoints",)
    return Stage(
        f"{model}/train",
        make,
        (*_MODEL, *settings),
        inputs,
        (f"{model}/params",),
        (*scratch, f"{model}/metrics"),
        scratch,
    )


def _iteration(config: Config, model: str, before: str, seeds: tuple[str, ...]) -> list[Stage]:
    """AIFT(before) and DPO on it (paper sections 2.2 and 2.3): M(t+1) comes from M(t) alone."""
    trained = f"{before}/stages/train.json"
    earlier = tuple(f"m{t}/prompts.jsonl" for t in range(2, int(model[1:])))
    made = {name: f"{model}/{name}" for name in ("responses", "judgments")}
    prompt_file, pair_file, reference_file = (f"{model}/{name}.jsonl" for name in ("prompts", "pairs", "reference"))
    with_reference = (reference_file,) if config.dpo.reference == "cached" else ()
    out = [
        Stage(
            f"{model}/prompts", partial(prompts.make, model=model),
            (*_MODEL, "prompts", "data", "responses.max_new_tokens"), (seeds[0], seeds[3], *earlier), (prompt_file,),
        ),
        Stage(
            f"{model}/responses", partial(responses.make, model=model, before=before), (*_MODEL, "responses"),
            (prompt_file, trained), (made["responses"],), (made["responses"],),
        ),
        Stage(
            f"{model}/judgments", partial(judgments.make, model=model, before=before), (*_MODEL, "judge"),
            (prompt_file, made["responses"], trained), (made["judgments"],), (made["judgments"],),
        ),
        Stage(
            f"{model}/pairs", partial(pairs.make, model=model), _MODEL,
            (prompt_file, made["responses"], made["judgments"]), (pair_file,),
        ),
    ]  # fmt: skip
    if with_reference:
        out.append(
            Stage(
                f"{model}/reference", partial(reference.make, model=model, before=before), _MODEL,
                (pair_file, trained), (reference_file,),
            )
        )  # fmt: skip
    inputs = (pair_file, *with_reference, trained)
    out.append(_training(model, partial(train_dpo.make, model=model, before=before), ("dpo",), inputs))
    return out


def settings_of(config: Config, stage: Stage) -> dict[str, Any]:
    """The fields that decide a stage's result, by dotted name; a field that names a local file, with its sha256."""
    free = free_fields()
    found: dict[str, Any] = {}
    for name, value in flat(config).items():
        if name not in free and any(name == some or name.startswith(f"{some}.") for some in stage.settings):
            found[name] = value
            if name in _FILES and value and epath.Path(value).exists() and not epath.Path(value).is_dir():
                found[f"{name} (sha256)"] = workdir.manifest(epath.Path(value))
    return found


def check_stop(config: Config, stop_after: str) -> None:
    """Refuses a `--stop_after` that is no stage of this target."""
    names = [stage.name for stage in stages(config)]
    if stop_after and stop_after not in names:
        raise UserError(f"--stop_after={stop_after}: no such stage; they are {', '.join(names)}")


def build(config: Config, root: epath.Path, open_run: Callable[[], Run], stop_after: str = "") -> None:
    """Builds what is missing, in order; finished stages are skipped, a half-finished one is continued.

    Args:
        root: the run's folder, locked by the caller.
        open_run: opens model, tokenizer and mesh; called only if there is work.
        stop_after: name of the last stage to do, or "".
    """
    run: Run | None = None
    plan = stages(config)
    for stage in plan:
        if workdir.is_done(root, stage.name):
            _clear(root, stage)  # a kill may have come between the record and the clearing
            say(f"[{stage.name}] done before")
        else:
            run = run or open_run()
            _do(run, config, root, stage)
        if stage.name == stop_after:
            return
    report.write(root, models(config.target), [stage.name for stage in plan])


def _clear(root: epath.Path, stage: Stage) -> None:
    for name in stage.scratch:
        if (root / name).exists():
            (root / name).rmtree()


def _do(run: Run, config: Config, root: epath.Path, stage: Stage) -> None:
    def at(names: tuple[str, ...]) -> list[epath.Path]:
        return [root / name for name in names]

    began = time.monotonic()
    workdir.begin(root, stage.name, settings_of(config, stage), at(stage.inputs), at(stage.partial))
    try:
        facts = stage.make(run)
    except OSError as error:
        raise workdir.disk_error(error.filename or root, error) from error
    seconds = time.monotonic() - began
    workdir.finish(root, stage.name, at(stage.inputs), at(stage.outputs), seconds, facts)
    _clear(root, stage)
    say(f"[{stage.name}] done in {seconds:.1f} s")
