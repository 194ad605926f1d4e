"""What is said of the updates while a run trains: a row of metrics each, a note for the progress line, the bad ones' examples.

Each is looked at one update late, so that the device never waits for the host.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from selfreward_jax import workdir
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.training import step

_TOO_MANY = 10  # updates in a row that are left out: nothing is learnt any more
_SHOWN = ("loss", "accuracy", "margin", "tokens_per_s", "mfu")


class Update(NamedTuple):
    """An update that is under way on the device.

    Attributes:
        at: its number, from 0.
        tokens, wasted, operations: its tokens without padding, the share of its positions that hold none, and its
            floating point operations by formula.
        parts, norm, bad: metrics of its microbatches, the gradient's norm, whether it is left out; on the device.
        items: its examples.
        told: `place.from_each` of the signals that the processes had; None in a job of one process.
    """

    at: int
    tokens: int
    wasted: float
    operations: float
    parts: Sequence[step.Metrics]
    norm: jax.Array
    bad: jax.Array
    items: Sequence[Any]
    told: jax.Array | None


@dataclasses.dataclass
class Updates:
    """The update before the one that the loop is at, and what was seen up to it.

    Attributes:
        name: of the stage.
        on_bad: "stop" or "skip", see `trainer.Plan`.
        left_out: the folder for the examples of updates that are left out.
        write: adds a row of metrics.
        roof: the devices' peak, FLOP/s; None if it is not known.
        asked: the signal that any of the processes had: known to all at the same update; 0: none.
    """

    name: str
    on_bad: str
    left_out: epath.Path
    write: Callable[[Mapping[str, float | int]], None]
    roof: float | None
    asked: int = 0
    _under_way: Update | None = None
    _bad_in_a_row: int = 0
    _since: float = dataclasses.field(default_factory=time.monotonic)

    def begin(self, update: Update) -> None:
        """The device has been given this update; the one before it was looked at."""
        assert self._under_way is None
        self._under_way = update

    def look(self) -> str:
        """Waits for the update that is under way: writes its row, and gives the note for the progress line ("": none is).

        Raises:
            UserError: if it is bad and bad ones stop the run, or it is the tenth in a row.
        """
        update, self._under_way = self._under_way, None
        if update is None:
            return ""
        if update.told is not None:
            self.asked = self.asked or int(step.largest(update.told))
        row = {"step": update.at, **means(update.parts), "grad_norm": float(update.norm)}
        before, self._since = self._since, time.monotonic()
        seconds = max(self._since - before, 1e-9)
        row |= {"tokens": update.tokens, "wasted": update.wasted, "tokens_per_s": update.tokens / seconds}
        row["tflops"] = update.operations / seconds / 1e12
        if self.roof:
            row["mfu"] = update.operations / seconds / self.roof
        self._bad_in_a_row = self._bad_in_a_row + 1 if update.bad else 0
        if update.bad:
            self._leave_out(update, row)
        self.write({key: value for key, value in row.items() if np.isfinite(value)} | {"left_out": int(update.bad)})
        return " ".join(f"{key} {row[key]:.3g}" for key in _SHOWN if key in row)

    def _leave_out(self, update: Update, row: Mapping[str, float]) -> None:
        where = self.left_out / f"{update.at}.jsonl"
        workdir.write_text(where, _examples(update.items))
        said = f"[{self.name}] update {update.at}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        if self.on_bad == "stop" or self._bad_in_a_row == _TOO_MANY:
            raise UserError(
                f"{said}: not done{', as those before' if self._bad_in_a_row > 1 else ''}; its examples are in {where}."
                " Lower the lr, or leave such updates out by on_bad=skip"
            )
        say(f"{said}: left out; its examples are in {where}")


def means(parts: Sequence[step.Metrics]) -> dict[str, float]:
    """The metrics of an update's microbatches as means over all of it."""
    sums: dict[str, tuple[float, float]] = {}
    for part in jax.device_get(parts):
        for key, (value, weight) in part.items():
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + float(value), before[1] + float(weight))
    return {key: value / weight for key, (value, weight) in sums.items()}


def summary(rows: Sequence[Mapping[str, float]], epoch: int) -> dict[str, float]:
    """A training run for its stage's record: updates done and left out, and means over the last `epoch` rows of metrics."""
    found = {"updates": float(len(rows)), "left_out": float(sum(row["left_out"] for row in rows))}
    for key in ("loss", "accuracy", "margin", "grad_norm"):
        if some := [row[key] for row in rows[-epoch:] if key in row]:
            found[key] = sum(some) / len(some)
    return found


def _examples(items: Sequence[Any]) -> str:
    """A line a sequence."""
    lines = [
        json.dumps({"item": index, "start": row.start, "weight": row.weight, "tokens": row.tokens})
        for index, item in enumerate(items)
        for row in item.rows
    ]
    return "\n".join(lines) + "\n"
