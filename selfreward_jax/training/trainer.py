"""The training loop: rows in, parameters out, resumable at any update.

The order of examples and every dropout key are functions of (seed, step), so a checkpoint is (step, params,
optimizer state) and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from etils import epath

from selfreward_jax import processes, signals, stores, workdir
from selfreward_jax.data import batches, packing
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe import metrics as metric_files
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sharding import place
from selfreward_jax.sharding.rules import check_alike
from selfreward_jax.training import checkpoint, flops, optimizer, step
from selfreward_jax.training.logprobs import Batch


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


_TOO_MANY = 10  # updates in a row that are left out: nothing is learnt any more
_ROUNDING = 2**32 - 1  # no microbatch has this number: what is folded into an update's key for `apply_gradient`

Item = Any  # anything with `rows`: batches.Row for SFT, PairRow for DPO


class Verdict(NamedTuple):
    """What is said of a checkpoint (early stopping).

    Attributes:
        better: it is the best so far: kept beside the newest, and what training returns when it is stopped.
        stop: training ends here.
    """

    better: bool
    stop: bool


OnCheckpoint = Callable[[int, llama.Params], Verdict]


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
    base = jax.random.key(plan.seed)
    pending: _Pending | None = None
    reported, left_out = time.monotonic(), 0
    asked = 0  # the signal that any process had: known to all at the same update
    peak = flops.peak(jax.devices()[0].device_kind)
    roof = peak * jax.device_count() if peak else None

    def report() -> str:
        """Fetches the update before this one: one late, so that the device never waits for the host."""
        nonlocal pending, reported, left_out, asked
        if pending is None:
            return ""
        at, counts, parts, norm, bad, chosen, told = pending
        asked = asked or (int(step.largest(told)) if told is not None else 0)
        row = _row(at, parts, float(norm))
        now = time.monotonic()
        seconds = max(now - reported, 1e-9)
        row |= counts | {"tokens_per_s": counts["tokens"] / seconds, "tflops": counts["operations"] / seconds / 1e12}
        if roof:
            row["mfu"] = counts["operations"] / seconds / roof
        del row["operations"]
        pending, reported = None, now
        if bad:
            left_out += 1
            where = _keep(directory / "left_out" / f"{at}.jsonl", chosen)
            said = f"[{name}] update {at}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            if plan.on_bad == "stop" or left_out == _TOO_MANY:
                raise UserError(
                    f"{said}: not done{', as those before' if left_out > 1 else ''}; its examples are in {where}. Lower"
                    " the lr, or leave such updates out by on_bad=skip"
                )
            say(f"{said}: left out; its examples are in {where}")
        else:
            left_out = 0
        write({key: value for key, value in row.items() if np.isfinite(value)} | {"left_out": int(bad)})
        return " ".join(
            f"{key} {row[key]:.3g}" for key in ("loss", "accuracy", "margin", "tokens_per_s", "mfu") if key in row
        )

    def due(number: int) -> bool:
        return number < total_steps and number % plan.checkpoint_every == 0

    verdicts = _Verdicts(directory / "verdicts.json")
    stopped = False
    if first and on_checkpoint and due(first):
        stopped = verdicts.of(first, partial(on_checkpoint, first, state.params)).stop
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
            own.number = own.number or asked  # another process' signal is this one's too
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
            note = report() or note
            if checkpoints:
                checkpoint.check(checkpoints)
            counts = {
                "tokens": sum(len(row.tokens) for item in chosen for row in item.rows),
                "wasted": packing.wasted(parts, plan.shape),
                "operations": flops.step_operations(
                    config,
                    sum(part.tokens for part in parts),
                    sum(part.seen for part in parts),
                    sum(len(row.tokens) - row.start for item in chosen for row in item.rows),
                ),
            }
            told = place.from_each(own.number, mesh) if processes.count() > 1 else None
            pending = _Pending(number, counts, measured, norm, bad, chosen, told)
            ending = asked if processes.count() > 1 else own.number
            if checkpoints and (ending or due(number + 1)):
                note = report() or note  # what is left out by a stop is never saved
                if ending:
                    leave(number + 1)
                checkpoint.save(checkpoints, number + 1, state, verdicts.best())
                if on_checkpoint:
                    stopped = verdicts.of(number + 1, partial(on_checkpoint, number + 1, state.params)).stop
            advance(1, note)
            if stopped:
                break
        report()
        if checkpoints and not stopped:  # a signal in the last update
            asked = int(step.largest(place.from_each(own.number, mesh)))
            if asked:
                leave(total_steps)
    if stopped and checkpoints and (best := verdicts.best()):
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        del state, total  # no room for two
        at, state = checkpoint.restore(checkpoints, like, best) or (0, None)
        if state is None:
            raise UserError(
                f"{checkpoints.directory}: no checkpoint is left; start again to train from the beginning"
            )
        say(f"[{name}] stopped early: the best parameters are those after update {at}")
    rows = metric_files.read(directory / "metrics")
    last = rows[-max(1, batches.updates(len(items), 1, plan.batch)) :]
    summary = {"updates": float(len(rows)), "left_out": float(sum(row["left_out"] for row in rows))}
    for key in ("loss", "accuracy", "margin", "grad_norm"):
        if some := [row[key] for row in last if key in row]:
            summary[key] = sum(some) / len(some)
    return state.params, summary


class _Pending(NamedTuple):
    """An update that is under way: what is asked of it once the next one is."""

    at: int
    counts: dict[str, float]
    parts: list[step.Metrics]
    norm: jax.Array
    bad: jax.Array
    chosen: Sequence[Item]
    told: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Verdicts:
    """Answers of `on_checkpoint` by update in a file, so that a run that goes on repeats them and asks none twice."""

    path: epath.Path

    def of(self, number: int, ask: Callable[[], Verdict]) -> Verdict:
        known = self._known()
        if str(number) not in known:
            known[str(number)] = ask()._asdict()
            workdir.write_text(self.path, json.dumps(known) + "\n")
        return Verdict(**known[str(number)])

    def best(self) -> int:
        """The update of the best checkpoint; 0 if none was called so."""
        return max((int(number) for number, verdict in self._known().items() if verdict["better"]), default=0)

    def _known(self) -> dict[str, dict[str, bool]]:
        read = lambda: json.loads(stores.read_whole(self.path)) if stores.exists(self.path) else {}  # noqa: E731
        return processes.together(read)  # or one would ask, which all do together, and another find the answer


def _keep(path: epath.Path, items: Sequence[Item]) -> epath.Path:
    """Writes the examples of an update for a look: a line a sequence."""
    lines = [
        json.dumps({"item": index, "start": row.start, "weight": row.weight, "tokens": row.tokens})
        for index, item in enumerate(items)
        for row in item.rows
    ]
    workdir.write_text(path, "\n".join(lines) + "\n")
    return path


def _row(at: int, parts: list[step.Metrics], norm: float) -> dict[str, float]:
    sums: dict[str, tuple[float, float]] = {}
    for part in jax.device_get(parts):
        for key, (value, weight) in part.items():
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + float(value), before[1] + float(weight))
    row = {key: value / weight for key, (value, weight) in sums.items()}
    return {"step": at, **row, "grad_norm": norm}
