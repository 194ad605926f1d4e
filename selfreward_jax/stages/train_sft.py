"""Supervised fine-tuning (paper sections 2.3 and 3.1.3): the SFT baseline on IFT, M1 on IFT and EFT, both from M0."""

from __future__ import annotations

from collections import Counter
from typing import Any

from selfreward_jax.data.batches import Row
from selfreward_jax.data.chat import encode_example
from selfreward_jax.data.records import Example, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, compute, plan, take_params
from selfreward_jax.training import checkpoint, step, trainer


def encode(run: Run, examples: list[Example]) -> tuple[list[Row], dict[str, int]]:
    """Token rows, and what was dropped by reason: a target over the limit is dropped, never cut (a cut one teaches
    no end of turn)."""
    rows, drops = [], Counter[str]()
    limit = min(run.config.data.max_length, run.source.config.context)
    for example in examples:
        ids, start = encode_example(run.chat, example.prompt, example.response)
        if len(ids) > limit:
            drops[f"over {limit} tokens"] += 1
        else:
            rows.append(Row(tuple(ids), start))
    return rows, dict(drops)


def make(run: Run, model: str) -> dict[str, Any]:
    """Trains "sft" or "m1" from M0; writes `MODEL/params/`."""
    config = run.config
    ift = read_records(run.root / "seed" / "ift.jsonl", Example)
    eft = read_records(run.root / "m1" / "eft_train.jsonl", Example) if model == "m1" else []
    rows, drops = encode(run, ift + eft)
    if not rows:
        raise UserError(f"[{model}/train] no example is left ({drops}); raise --config.data.max_length")
    lengths = [len(row.tokens) for row in rows]
    targets = [len(row.tokens) - row.start for row in rows]
    say(
        f"[{model}/train] {len(rows)} examples, mean {sum(lengths) / len(rows):.0f} tokens of which"
        f" {sum(targets) / len(rows):.0f} targets, longest {max(lengths)}; dropped {drops or 'none'}"
    )
    params, summary = trainer.train(
        f"{model}/train", run.source.config, compute(config), plan(run, config.sft, len(rows)), run.mesh,
        take_params(run, "m0"), rows, trainer.collate_rows, step.sft_objective, run.root / model,
    )  # fmt: skip
    checkpoint.save_params(run.root / model / "params", params)
    run.held = (model, params)
    return {"examples": len(rows), "tokens": sum(lengths), "drops": drops, **summary}
