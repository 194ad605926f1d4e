"""DPO (paper sections 2.3 and 3.1.3): M(t+1) starts from M(t), against frozen M(t), on AIFT(M(t)) only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from selfreward_jax import stores
from selfreward_jax.data import batches, packing
from selfreward_jax.data.records import Pair, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import compute, fresh_params, params_of, take_params
from selfreward_jax.model import llama
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Held, Run, pair_rows, plan
from selfreward_jax.sharding.place import fetch
from selfreward_jax.training import checkpoint, step, trainer

# Largest |margin| before the first update, nats, by compute dtype: policy and reference are the same weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def _cached(run: Run, model: str, pairs: Sequence[Pair]) -> list[trainer.PairRow]:
    """Pairs with the summed reference log-probs from disk; every pair must be there, token for token."""
    path = run.root / model / "reference.jsonl"
    lines = [json.loads(line) for line in stores.read_whole(path).decode().splitlines()]
    items = []
    for index, pair in enumerate(pairs):
        line = lines[index] if index < len(lines) else {}
        same = line.get("prompt_id") == pair.prompt_id
        if not same or len(line["chosen"]) != len(pair.chosen_ids) or len(line["rejected"]) != len(pair.rejected_ids):
            raise UserError(
                f"{path}:{index + 1}: not the log-probs of pair {pair.prompt_id}; delete it to redo the stage"
            )
        sums = [
            float(np.sum(np.asarray(line[name], np.float32), dtype=np.float32)) for name in ("chosen", "rejected")
        ]
        items.append(trainer.PairRow(*pair_rows(run, pair), *sums))
    return items


def _collate_live(
    run: Run,
    frozen: llama.Params,
    items: Sequence[trainer.PairRow],
    part: packing.Microbatch,
    how: trainer.Plan,
    mesh: Mesh,
) -> step.PairBatch:
    """A microbatch whose reference log-probs come from the frozen model beside the policy."""
    batch = trainer.collate_pairs(items, part, how, mesh)
    return batch._replace(reference=step.sequence_pass(run.source.config, compute(run), how.chunk, frozen, batch))


def _check_start(
    run: Run, model: str, how: trainer.Plan, params: llama.Params, items: Sequence[Any], collate: Any
) -> float:
    """The largest |margin| of the first batch through the step's own log-prob function, without dropout.

    Raises:
        UserError: if it is not zero up to rounding: the reference is not the log-probs of this model on these pairs.
    """
    first = [items[i] for i in batches.batch_indices(len(items), how.epochs, how.seed, how.batch, 0)]
    worst = 0.0
    for part in packing.microbatches([item.rows for item in first], how.shape):
        batch = collate(first, part, how, run.mesh)
        policy = step.sequence_pass(run.source.config, compute(run), how.chunk, params, batch)
        chosen, rejected = step.split_pairs(policy - batch.reference)
        margins = fetch((chosen - rejected) * batch.weights, run.mesh)
        worst = max(worst, float(np.max(np.abs(margins))))
    limit = TOLERANCE[run.config.model.compute_dtype]
    if worst >= limit:
        raise UserError(
            f"[{model}/train] before the first update the margin is {worst:.3g}, not below {limit:g}: the reference"
            f" log-probs are not those of these weights; delete {run.root / model / 'stages' / 'reference.json'}"
        )
    say(f"[{model}/train] largest margin before the first update {worst:.2g} (limit {limit:g})")
    return worst


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Trains `model` from `before`'s parameters at training precision; writes `MODEL/params/`."""
    config = run.config
    pairs = read_records(run.root / model / "pairs.jsonl", Pair)
    if config.dpo.reference == "live":
        frozen = fresh_params(run, before)
        items = [trainer.PairRow(*pair_rows(run, pair), 0.0, 0.0) for pair in pairs]
        collate: Any = partial(_collate_live, run, frozen)
    else:
        items = _cached(run, model, pairs)
        collate = trainer.collate_pairs
    how = plan(run, f"{model}/train", config.dpo, items)
    margin = _check_start(run, model, how, params_of(run, before), items, collate)
    objective = partial(step.dpo_objective, beta=config.dpo.beta)
    params, summary = trainer.train(
        f"{model}/train", run.source.config, compute(run), how, run.mesh, take_params(run, before), items, collate,
        objective, run.root / model,
    )  # fmt: skip
    checkpoint.save_params(run.root / model / "params", params)
    run.held = Held(model, "training", params)
    return {"pairs": len(pairs), "margin_before": margin, **summary}
