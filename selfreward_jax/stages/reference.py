"""Reference log-probs: one pass of the frozen model over the pairs, before the optimizer exists, without dropout."""

from __future__ import annotations

import json
from typing import Any

from selfreward_jax import workdir
from selfreward_jax.data import batches
from selfreward_jax.data.records import Pair, read_records
from selfreward_jax.loaded import compute, params_of
from selfreward_jax.observe.progress import progress
from selfreward_jax.run import Run, pair_rows, plan
from selfreward_jax.sharding.place import fetch, padded_rows
from selfreward_jax.training import step, trainer


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/reference.jsonl`: a line a pair, log-probs of each token (nats, float32) under `before`."""
    pairs = read_records(run.root / model / "pairs.jsonl", Pair)
    rows = [row for pair in pairs for row in pair_rows(run, pair)]
    how = plan(run, run.config.dpo, len(pairs))
    size = padded_rows(2 * how.microbatch, run.mesh)
    params = params_of(run, before)
    found: dict[int, list[float]] = {}
    with progress(f"{model}/reference", len(rows), "responses") as advance:
        for members in batches.microbatches([len(row.tokens) for row in rows], size):
            batch = trainer.place_rows([rows[i] for i in members], size, how.shape, run.mesh)
            logps = step.logprob_pass(run.source.config, compute(run), how.chunk, params, batch)
            values = fetch(logps, run.mesh)
            for place, i in enumerate(members):
                count = len(rows[i].tokens) - rows[i].start
                found[i] = [float(value) for value in values[place, :count]]
            advance(len(members))
    lines = [
        json.dumps({"prompt_id": pair.prompt_id, "chosen": found[2 * i], "rejected": found[2 * i + 1]})
        for i, pair in enumerate(pairs)
    ]
    workdir.write_text(run.root / model / "reference.jsonl", "\n".join(lines) + "\n")
    return {"pairs": len(pairs), "tokens": sum(map(len, found.values()))}
