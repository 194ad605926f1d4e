"""Supervised fine-tuning (paper sections 2.3 and 3.1.3): the SFT baseline on IFT, M1 on IFT and EFT, both from M0.

Also the positive-only alternative to DPO (A.4), which starts from M0 and adds self-made examples with a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from selfreward_jax.data.batches import Row
from selfreward_jax.data.chat import encode_example
from selfreward_jax.data.records import Example
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import compute, params_of, take_params
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Held, Run, plan, read_ours
from selfreward_jax.training import checkpoint, step, trainer


def encode(run: Run, examples: Sequence[Example], weight: float) -> tuple[list[Row], dict[str, int]]:
    """Token rows, and what was dropped by reason: a target over the limit is dropped, never cut (a cut one teaches
    no end of turn)."""
    rows, drops = [], Counter[str]()
    limit = min(run.config.data.max_length, run.source.config.context)
    for example in examples:
        ids, start = encode_example(run.chat, example.prompt, example.response)
        if len(ids) > limit:
            drops[f"over {limit} tokens"] += 1
        else:
            rows.append(Row(tuple(ids), start, weight))
    return rows, dict(drops)


def make(run: Run, model: str, files: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Trains `model` from M0; writes `MODEL/params/`.

    Args:
        files: (path of Examples under the workdir, loss weight of each of its examples).
    """
    config = run.config
    rows: list[Row] = []
    drops: Counter[str] = Counter()
    for name, weight in files:
        some, dropped = encode(run, read_ours(run.root / name, Example), weight)
        if dropped and not some:
            raise UserError(
                f"[{model}/train] {name}: none of its {sum(dropped.values())} examples is left ({dropped}); raise"
                f" --config.data.max_length={config.data.max_length}, up to the model's {run.source.config.context}"
            )
        rows += some
        drops.update(dropped)
    if not rows:
        raise UserError(f"[{model}/train] no example in {', '.join(name for name, _ in files)}")
    lengths = [len(row.tokens) for row in rows]
    targets = [len(row.tokens) - row.start for row in rows]
    say(
        f"[{model}/train] {len(rows)} examples, mean {sum(lengths) / len(rows):.0f} tokens of which"
        f" {sum(targets) / len(rows):.0f} targets, longest {max(lengths)}; dropped {dict(drops) or 'none'}"
    )
    params, summary = trainer.train(
        f"{model}/train", run.source.config, compute(run), plan(run, f"{model}/train", config.sft, rows), run.mesh,
        take_params(run, "m0"), rows, trainer.collate_rows, step.sft_objective, run.root / model,
    )  # fmt: skip
    checkpoint.save_params(run.root / model / "params", params)
    run.held = Held(model, "training", params)
    return {"examples": len(rows), "tokens": sum(lengths), "drops": dict(drops), **summary}


def copy(run: Run, model: str, of: str) -> dict[str, Any]:
    """Without EFT data (paper A.3) M1 is the SFT baseline: the same parameters, not the same training again."""
    checkpoint.save_params(run.root / model / "params", params_of(run, of))
    say(f"[{model}/train] {model.upper()} is {of.upper()}: --config.eft.source=none")
    return {"copy_of": of}
