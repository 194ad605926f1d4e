"""Seed data (paper section 3.1.1): which prompts are IFT, which build EFT, which only measure the judge."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from selfreward_jax.config import DataConfig
from selfreward_jax.data import layouts, oasst
from selfreward_jax.data.seeds import measuring_sets, packaged, rows_of
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, write_records


def load(data: DataConfig, seed: int) -> oasst.Seed:
    """Reads the ranked conversations: the packaged ones, a file, or a data set of the hub (its train split)."""
    if data.oasst == "none":
        return oasst.Seed((), (), {})
    if data.oasst == "seed":
        return oasst.load(packaged("trees.jsonl"), data.lang, data.drop_synthetic, seed)
    rows = rows_of(data.oasst, "--config.data.oasst")
    return oasst.from_rows(rows, data.oasst, data.lang, data.drop_synthetic, seed)


def with_own_examples(data: DataConfig, loaded: oasst.Seed) -> oasst.Seed:
    """`data.ift`'s examples in place of the conversations' best replies; none of them asks a ranked set's question."""
    if not data.ift:
        return loaded
    examples, drops = layouts.read_examples(data.ift, "--config.data.ift")
    ranked = {oasst.words_of(some.prompt) for some in loaded.sets}
    own = [example for example in examples if oasst.words_of(example.prompt) not in ranked]
    counts = Counter(loaded.drops) + Counter({f"ift_{reason}": count for reason, count in drops.items()})
    counts += Counter({"ift_prompt_of_a_ranked_set": len(examples) - len(own)})
    return dataclasses.replace(loaded, examples=tuple(own), drops=dict(sorted(counts.items())))


def make(run: Run) -> dict[str, Any]:
    """Splits the seed prompts; writes `seed/{ift,eft_train_sets,eft_eval_sets,rest}.jsonl`."""
    config = run.config
    loaded = with_own_examples(config.data, load(config.data, config.seed))
    building = config.eft.train_sets if config.eft.source == "build" else 0
    split = oasst.split(loaded, config.data.ift_examples, config.eft.eval_sets, building, config.seed)
    evaluation = [*split.eft_eval, *measuring_sets(config.eft, config.judge.low, config.judge.high)]
    outputs: dict[str, list[Any]] = {
        "ift": list(split.ift), "eft_train_sets": list(split.eft_train), "eft_eval_sets": evaluation,
        "rest": list(split.rest),
    }  # fmt: skip
    for name, records in outputs.items():
        write_records(run.root / "seed" / f"{name}.jsonl", records)
    say(f"[seed] {config.data.oasst}{' and ' + config.data.ift if config.data.ift else ''}")
    say(oasst.summary_table(loaded))
    say(
        f"[seed] {len(split.ift)} examples for IFT, {len(split.eft_train)} ranked sets to build EFT,"
        f" {len(evaluation)} to measure the judge, {len(split.rest)} examples left"
    )
    return {
        **{label: figure for label, figure in oasst.summary(loaded) if not label.startswith("left out")}, "drops": loaded.drops,
        **{name: len(records) for name, records in outputs.items()},
    }  # fmt: skip
