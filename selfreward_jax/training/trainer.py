"""The training loop: rows in, parameters out, resumable at any update.

The order of examples and every dropout key are functions of (seed, step), so a checkpoint is (step, params,
optimizer state) and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath

from selfreward_jax import heap, processes, signals
from selfreward_jax.data import batches, packing
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe import metrics as metric_files
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sharding import place
from selfreward_jax.sharding.rules import check_alike
from selfreward_jax.training import checkpoint, flops, optimizer, step, updates
from selfreward_jax.training.logprobs import Batch
from selfreward_jax.training.verdicts import OnCheckpoint, Verdicts


@dataclasses.dataclass(frozen=True)
class PairRow:
    """A preference pair as sequences, and the frozen reference's summed log-probs of both responses, nats."""

    chosen: batches.Row
    rejected: batches.Row
    ref_chosen: float
    ref_rejected: float

    @property
    def rows(self) -> tuple[batches.Row, ...]:
        return (self.chosen, self.rejected)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one stage trains.

    Attributes:
        epochs, batch, seed: how often each example is seen, examples (or pairs) an update, and the order's seed.
        shape: the rows that they are packed into, a microbatch of which has its gradient computed at once.
        dropout: residual dropout rate.
        chunk: target tokens a row that meet the head at once.
        checkpoint_every, keep: updates between checkpoints (0: none), and how many are kept.
        on_bad: what follows an update that `optimizer.watch` leaves out: "stop", or "skip": the next one, as long as
            there are not ten in a row.
    """

    optimizer: optimizer.Optimizer
    epochs: int
    batch: int
    shape: packing.Shape
    seed: int
    dropout: float
    chunk: int
    checkpoint_every: int
    keep: int
    on_bad: str = "stop"


_ROUNDING = 2**32 - 1  # no microbatch has this number: what is folded into an update's key for `apply_gradient`

Item = Any  # anything with `rows`: batches.Row for SFT, PairRow for DPO


def collate_rows(items: Sequence[Item], part: packing.Microbatch, plan: Plan, mesh: jax.sharding.Mesh) -> Batch:
    """A microbatch of an update's items on the mesh."""
    rows = packing.lay([item.rows for item in items], part, plan.shape)
    return Batch(*(place.place(getattr(rows, field), mesh) for field in Batch._fields))


def collate_pairs(
    items: Sequence[PairRow], part: packing.Microbatch, plan: Plan, mesh: jax.sharding.Mesh
) -> step.PairBatch:
    """A microbatch of an update's pairs on the mesh, and what the reference says of them; P is the update's pairs."""
    reference = np.zeros((2 * plan.batch,), np.float32)
    weights = np.zeros((plan.batch,), np.float32)
    for index, pair in enumerate(part.members):
        reference[2 * index : 2 * index + 2] = (items[pair].ref_chosen, items[pair].ref_rejected)
        weights[index] = 1.0
    return step.PairBatch(
        collate_rows(items, part, plan, mesh), place.replicate(reference, mesh), place.replicate(weights, mesh)
    )


def train(
    name: str,
    config: LlamaConfig,
    compute: llama.Compute,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    params: llama.Params,
    items: Sequence[Item],
    collate: Callable,
    objective: step.Objective,
    directory: epath.Path,
    on_checkpoint: OnCheckpoint | None = None,
) -> tuple[llama.Params, dict[str, float]]:
    """Trains from `params` (donated) and resumes from the newest checkpoint under `directory`, if there is one.

    Args:
        name: shown in the progress line.
        items: encoded examples.
        collate: an update's items and one of its microbatches -> device batch, `collate_rows` or `collate_pairs`.
        objective: `step.sft_objective` or a partial of `step.dpo_objective`.
        directory: the model's folder; `checkpoints/` and `metrics/` are kept there.
        on_checkpoint: called with (step, params) after each checkpoint, the last update's apart, which is none. Its verdict is
            stored, and a resume repeats it.

    A signal to end (Ctrl-C, SIGTERM: a preemption) to any of the processes has all of them save the state after the same
    update, and leave by KeyboardInterrupt; without checkpoints it ends at once.

    Returns:
        The trained parameters, those of the best checkpoint if a verdict stopped training, and {updates, loss (mean over the last epoch), ...} for the stage's record.

    Raises:
        UserError: if the gradient norm is not finite or a spike (see `Plan.on_bad`), with the file that the
            update's examples were written to; or if the optimizer does not lie as the parameters.
    """
    total_steps = batches.updates(len(items), plan.epochs, plan.batch)
    state = step.State(params, *step.first_state(plan.optimizer, params))
    del params  # donated
    first = 0
    checkpoints = checkpoint.open_folder(directory / "checkpoints", plan.keep) if plan.checkpoint_every else None
    if checkpoints:
        found = checkpoint.restore(checkpoints, state)
        if found:
            first, state = found
            say(f"[{name}] continues after update {first} of {total_steps}")
    total = step.no_gradient(state.params)
    check_alike(state.params, (state.moments, total))
    write, close = metric_files.writer(directory / "metrics")
    peak = flops.peak(jax.devices()[0].device_kind)
    seen = updates.Updates(
        name, plan.on_bad, directory / "left_out", write, peak * jax.device_count() if peak else None
    )
    base = jax.random.key(plan.seed)

    def due(number: int) -> bool:
        return number < total_steps and number % plan.checkpoint_every == 0

    verdicts = Verdicts(directory / "verdicts.json")
    stopped = False
    if first and on_checkpoint and due(first):
        stopped = verdicts.of(first, state.params, on_checkpoint).stop
    note = ""
    with contextlib.ExitStack() as closing, progress(name, total_steps, "updates", done=first) as advance:
        closing.callback(close)
        own = signals.Asked()
        if checkpoints:
            own = closing.enter_context(signals.deferred())
            closing.callback(checkpoint.close, checkpoints)  # also when an update failed

        def leave(number: int) -> NoReturn:
            assert checkpoints
            checkpoint.save(checkpoints, number, state, verdicts.best())
            own.number = own.number or seen.asked  # another process' signal is this one's too
            say(f"[{name}] saved after update {number} of {total_steps}")
            raise KeyboardInterrupt

        for number in range(first, 0 if stopped else total_steps):
            indices = batches.batch_indices(len(items), plan.epochs, plan.seed, plan.batch, number)
            chosen = [items[i] for i in indices]
            key = jax.random.fold_in(base, number)
            measured = []
            parts = packing.microbatches([item.rows for item in chosen], plan.shape)
            for index, part in enumerate(parts):
                batch = collate(chosen, part, plan, mesh)
                total, metrics = step.add_gradient(
                    config, compute, objective, plan.chunk, plan.dropout, state.params, total, batch,
                    jax.random.fold_in(key, index),
                )  # fmt: skip
                measured.append(metrics)
            rounding = jax.random.fold_in(key, _ROUNDING)
            state, total, norm, bad = step.apply_gradient(plan.optimizer, state, total, rounding)
            if number == first:
                heap.trim()  # what compiling left
            note = seen.look() or note
            if checkpoints:
                checkpoint.check(checkpoints)
            told = place.from_each(own.number, mesh) if processes.count() > 1 else None
            sequences = [row for item in chosen for row in item.rows]
            operations = flops.step_operations(
                config, sum(part.tokens for part in parts), sum(part.seen for part in parts),
                sum(len(row.tokens) - row.start for row in sequences),
            )  # fmt: skip
            tokens, wasted = sum(len(row.tokens) for row in sequences), packing.wasted(parts, plan.shape)
            seen.begin(updates.Update(number, tokens, wasted, operations, measured, norm, bad, chosen, told))
            ending = seen.asked if processes.count() > 1 else own.number
            if checkpoints and (ending or due(number + 1)):
                note = seen.look() or note  # what is left out by a stop is never saved
                if ending:
                    leave(number + 1)
                checkpoint.save(checkpoints, number + 1, state, verdicts.best())
                if on_checkpoint:
                    stopped = verdicts.of(number + 1, state.params, on_checkpoint).stop
            advance(1, note)
            if stopped:
                break
        seen.look()
        if checkpoints and not stopped:  # a signal in the last update
            seen.asked = int(step.largest(place.from_each(own.number, mesh)))
            if seen.asked:
                leave(total_steps)
    if stopped and checkpoints and (best := verdicts.best()):
        like = checkpoint.shapes_of(state)
        del state, total  # no room for two
        at, state = checkpoint.restore(checkpoints, like, best) or (0, None)
        if state is None:
            raise UserError(
                f"{checkpoints.directory}: no checkpoint is left; start again to train from the beginning"
            )
        say(f"[{name}] stopped early: the best parameters are those after update {at}")
    rows = metric_files.read(directory / "metrics")
    return state.params, updates.summary(rows, max(1, batches.updates(len(items), 1, plan.batch)))
