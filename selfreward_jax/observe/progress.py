"""A progress line with a rate and an estimate for anything longer than a few seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from selfreward_jax import processes

# Without a terminal (a log file, a pod's log) a line is printed this often, seconds.
LOG_EVERY = float(os.environ.get("SELFREWARD_LOG_EVERY", "5"))

Advance = Callable[..., None]


def say(line: str) -> None:
    """Prints one line at once, by process 0; every message of a run goes through here."""
    if processes.index():
        return
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclasses.dataclass
class _Count:
    done: int = 0
    last: float = 0.0
    note: str = ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def progress(name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Shows the progress of one piece of work.

    Args:
        name: what is being done, e.g. "m2/responses".
        total: how many units there are.
        unit: their name, plural.
        done: units that an earlier process finished; the rate does not count them.

    Yields:
        `advance(count, note="")`: count units more are done; the note is shown at the end of the line.
    """
    if sys.stdout.isatty() and not processes.index():
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(file=sys.stdout)) as bar:
            task = bar.add_task(name, total=total, completed=done, rate="", note="")
            start, count = time.monotonic(), _Count(done)

            def draw(more: int, note: str = "") -> None:
                count.done += more
                rate = (count.done - done) / max(time.monotonic() - start, 1e-9)
                bar.update(task, advance=more, rate=f"{rate:.3g}/s", note=note)

            yield draw
        return
    start, count = time.monotonic(), _Count(done)

    def log(more: int, note: str = "") -> None:
        count.done += more
        now = time.monotonic()
        if now - count.last < LOG_EVERY and count.done < total:
            return
        count.last = now
        rate = (count.done - done) / max(now - start, 1e-9)
        left = _clock((total - count.done) / rate) if rate > 0 else "?"
        say(
            f"[{name}] {count.done}/{total} {unit}  {rate:.3g}/s  elapsed {_clock(now - start)}  eta {left}  {note}".rstrip()
        )

    yield log
