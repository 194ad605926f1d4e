"""Reference log-probs: one pass of the frozen model over the pairs, before the optimizer exists, without dropout."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from selfreward_jax import workdir
from selfreward_jax.data import batches, packing
from selfreward_jax.data.records import Pair, read_records
from selfreward_jax.loaded import compute, params_of
from selfreward_jax.observe.progress import progress
from selfreward_jax.run import Run, pair_rows, plan
from selfreward_jax.sharding.place import fetch
from selfreward_jax.training import step, trainer


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/reference.jsonl`: a line a pair, log-probs of each token (nats, float32) under `before`."""
    pairs = read_records(run.root / model / "pairs.jsonl", Pair)
    items = [trainer.PairRow(*pair_rows(run, pair), 0.0, 0.0) for pair in pairs]
    # The first updates of training, packed as they will be there: its margins then are zero but for the order of a sum.
    how = plan(run, f"{model}/reference", dataclasses.replace(run.config.dpo, epochs=1), items)
    params = params_of(run, before)
    found: dict[int, tuple[list[float], list[float]]] = {}
    with progress(f"{model}/reference", len(items), "pairs") as advance:
        for number in range(batches.updates(len(items), 1, how.batch)):
            indices = batches.batch_indices(len(items), 1, how.seed, how.batch, number)
            some = [items[i] for i in indices]
            for part in packing.microbatches([item.rows for item in some], how.shape):
                batch = trainer.collate_rows(some, part, how, run.mesh)
                logps = step.logprob_pass(run.source.config, compute(run), how.chunk, params, batch)
                values, sequences, weights = fetch((logps, batch.sequences, batch.weights), run.mesh)
                for place, member in enumerate(part.members):
                    of = [values[(sequences == 2 * place + side) & (weights > 0)].tolist() for side in (0, 1)]
                    found[indices[member]] = (of[0], of[1])
                advance(len(part.members))
    lines = [
        json.dumps({"prompt_id": pair.prompt_id, "chosen": found[i][0], "rejected": found[i][1]})
        for i, pair in enumerate(pairs)
    ]
    workdir.write_text(run.root / model / "reference.jsonl", "\n".join(lines) + "\n")
    return {"pairs": len(pairs), "tokens": sum(len(of) for sides in found.values() for of in sides)}
