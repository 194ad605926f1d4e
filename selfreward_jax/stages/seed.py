"""Seed data (paper section 3.1.1): which prompts are IFT, which build EFT, which only measure the judge."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from selfreward_jax.config import Config, DataConfig
from selfreward_jax.contradictions import fewest_examples
from selfreward_jax.data import layouts, oasst
from selfreward_jax.data.records import Example, RankedSet
from selfreward_jax.data.seeds import measuring_sets, on_hub, packaged, rows_of
from selfreward_jax.errors import UserError
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


def check_files(data: DataConfig) -> None:
    """Reads the files that `data.oasst` and `data.ift` name, for a check at the start; the hub is left to the stage.

    Raises:
        UserError: all that is wrong with both.
    """
    problems: list[str] = []
    conversations = (data.oasst, lambda: load(data, 0))
    instructions = (data.ift, lambda: layouts.read_examples(data.ift, "--config.data.ift"))
    for name, read in (conversations, instructions):
        try:
            if name and not on_hub(name):
                read()
        except UserError as error:
            problems.extend(error.args)
    if problems:
        raise UserError(*problems)


def with_own_examples(data: DataConfig, loaded: oasst.Seed) -> oasst.Seed:
    """`data.ift`'s examples in place of the conversations' best replies, each prompt once and none a ranked set's."""
    if not data.ift:
        return loaded
    examples, drops = layouts.read_examples(data.ift, "--config.data.ift")
    ranked = {oasst.words_of(some.prompt) for some in loaded.sets}
    counts = Counter({f"ift_{reason}": count for reason, count in drops.items()})
    own: dict[str, Example] = {}
    for example in examples:
        words = oasst.words_of(example.prompt)
        if words in ranked:
            counts["ift_prompt_of_a_ranked_set"] += 1
        elif words in own:
            counts["ift_duplicate_prompt"] += 1
        else:
            own[words] = example
    return _less(loaded, tuple(own.values()), loaded.sets, counts)


def without_held_out(loaded: oasst.Seed, held_out: Sequence[RankedSet]) -> oasst.Seed:
    """The seed without prompts that held-out judge examples ask: those measure the judge, in every split."""
    asked = {oasst.words_of(some.prompt) for some in held_out}
    met = asked & {oasst.words_of(item.prompt) for item in (*loaded.examples, *loaded.sets)}
    examples, sets = oasst.without(loaded.examples, held_out), oasst.without(loaded.sets, held_out)
    return _less(loaded, tuple(examples), tuple(sets), Counter(prompt_of_held_out_judge_examples=len(met)))


def _less(
    loaded: oasst.Seed, examples: tuple[Example, ...], sets: tuple[RankedSet, ...], counts: Counter[str]
) -> oasst.Seed:
    drops = Counter(loaded.drops) + counts  # without the zeros
    return dataclasses.replace(loaded, examples=examples, sets=sets, drops=dict(sorted(drops.items())))


def make(run: Run) -> dict[str, Any]:
    """Splits the seed prompts; writes `seed/{ift,eft_train_sets,eft_eval_sets,rest}.jsonl`.

    IFT-only (A.3, `eft.source=none`) reserves the sets that would build EFT too, so that it has the very data of the
    loop it is compared with.

    Raises:
        UserError: if there is less than a size asks for, or a later stage needs.
    """
    config = run.config
    held_out = measuring_sets(config.eft, config.judge.low, config.judge.high)
    loaded = without_held_out(with_own_examples(config.data, load(config.data, config.seed)), held_out)
    building = 0 if config.eft.source == "file" else config.eft.train_sets
    split = oasst.split(loaded, config.data.ift_examples, config.eft.eval_sets, building, config.seed)
    _check_enough(config, split)
    evaluation = [*split.eft_eval, *held_out]
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


def _check_enough(config: Config, split: oasst.Split) -> None:
    """Refuses now what would end a later stage, after training."""
    problems = []
    fewest, purpose = fewest_examples(config)
    if len(split.ift) < fewest:
        problems.append(
            f"--config.data.ift_examples={config.data.ift_examples}: {len(split.ift)} examples are left for IFT,"
            f" at least {fewest} are needed ({purpose})"
        )
    if config.eft.source == "build" and not split.eft_train:
        problems.append(
            f"--config.eft.source=build: no ranked set is left beside {len(split.eft_eval)} for evaluation and"
            f" {len(split.ift)} examples for IFT; lower --config.data.ift_examples or --config.eft.eval_sets"
        )
    if problems:
        raise UserError(*problems)
