"""Seed data (paper section 3.1.1): which prompts are IFT, which build EFT, which only measure the judge."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from etils import epath

from selfreward_jax.config import DataConfig
from selfreward_jax.data import oasst
from selfreward_jax.data.seeds import held_out_sets, hub_rows, judge_rows, packaged
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, write_records


def load(data: DataConfig, seed: int) -> oasst.Seed:
    """Reads the ranked conversations: the packaged ones, a file, or a data set of the hub (its train split)."""
    if data.oasst == "seed":
        return oasst.load(packaged("trees.jsonl"), data.lang, data.drop_synthetic, seed)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data.oasst) and not epath.Path(data.oasst).exists():
        return oasst.from_rows(hub_rows(data.oasst), data.oasst, data.lang, data.drop_synthetic, seed)
    return oasst.load(data.oasst, data.lang, data.drop_synthetic, seed)


def make(run: Run) -> dict[str, Any]:
    """Splits the seed prompts; writes `seed/{ift,eft_train_sets,eft_eval_sets,rest}.jsonl`."""
    config = run.config
    loaded = load(config.data, config.seed)
    building = config.eft.train_sets if config.eft.source == "build" else 0
    split = oasst.split(loaded, config.data.ift_examples, config.eft.eval_sets, building, config.seed)
    evaluation = list(split.eft_eval)
    if config.eft.source == "file":
        evaluation += held_out_sets(judge_rows(config.eft.file, config.judge.low, config.judge.high))
    folder = run.root / "seed"
    outputs: dict[str, list[Any]] = {
        "ift": list(split.ift), "eft_train_sets": list(split.eft_train), "eft_eval_sets": list(evaluation),
        "rest": list(split.rest),
    }  # fmt: skip
    for name, records in outputs.items():
        write_records(folder / f"{name}.jsonl", records)
    replies = Counter(len(ranked.replies) for ranked in loaded.sets)
    mean = sum(size * count for size, count in replies.items()) / max(1, len(loaded.sets))
    say(
        f"[seed] {len(loaded.examples)} prompts with a rank-0 reply, {len(loaded.sets)} ranked sets"
        f" (mean {mean:.2f} replies): {len(split.ift)} IFT, {len(split.eft_train)} to build EFT,"
        f" {len(evaluation)} to measure the judge, {len(split.rest)} left"
    )
    return {
        "examples": len(loaded.examples), "ranked_sets": len(loaded.sets), "mean_replies": round(mean, 3),
        "drops": loaded.drops, **{name: len(records) for name, records in outputs.items()},
    }  # fmt: skip
