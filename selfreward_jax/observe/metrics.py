"""Metrics of a training run: one jsonl segment a process start (object stores cannot append)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from etils import epath

from selfreward_jax import processes, stores

_REMOTE_EVERY = 30.0  # seconds


def writer(directory: epath.Path) -> tuple[Callable[[Mapping[str, float | int]], None], Callable[[], None]]:
    """Opens the next segment `segment-00000.jsonl` of a metrics folder.

    Returns:
        `write(row)`, which adds one line and flushes, and `close()`.
    """
    if processes.index():
        return lambda row: None, lambda: None
    index = sum(name.startswith("segment-") for name in stores.listing(directory) or ())
    path = directory / f"segment-{index:05d}.jsonl"
    if stores.is_remote(directory):
        return _remote(path)
    directory.mkdir(parents=True, exist_ok=True)
    file = path.open("w")

    def write(row: Mapping[str, float | int]) -> None:
        file.write(json.dumps(dict(row)) + "\n")
        file.flush()

    return write, file.close


def _remote(path: epath.Path) -> tuple[Callable[[Mapping[str, float | int]], None], Callable[[], None]]:
    """A segment on an object store, which cannot append: written whole every half minute and at the end."""
    lines: list[str] = []
    last = time.monotonic()

    def close() -> None:
        nonlocal last
        with stores.writing(path) as send:
            send("".join(lines).encode())
        last = time.monotonic()

    def write(row: Mapping[str, float | int]) -> None:
        lines.append(json.dumps(dict(row)) + "\n")
        if time.monotonic() - last > _REMOTE_EVERY:
            close()

    return write, close


@processes.for_all
def read(directory: epath.Path) -> list[dict[str, float]]:
    """All rows of a metrics folder by step; a step that a later process did again counts once, as redone.

    All processes of a job call this in step.
    """
    rows: dict[int, dict[str, float]] = {}
    for name in sorted(stores.listing(directory) or ()):
        for line in stores.read_whole(directory / name).decode().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed process may be cut; its step was or will be redone
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]
