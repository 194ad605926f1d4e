"""Metrics of a training run: one jsonl segment a process start (object stores cannot append)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from etils import epath


def writer(directory: epath.Path) -> tuple[Callable[[Mapping[str, float | int]], None], Callable[[], None]]:
    """Opens the next segment `segment-00000.jsonl` of a metrics folder.

    Returns:
        `write(row)`, which adds one line and flushes, and `close()`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    index = sum(1 for path in directory.iterdir() if path.name.startswith("segment-"))
    file = (directory / f"segment-{index:05d}.jsonl").open("w")

    def write(row: Mapping[str, float | int]) -> None:
        file.write(json.dumps(dict(row)) + "\n")
        file.flush()

    return write, file.close


def read(directory: epath.Path) -> list[dict[str, float]]:
    """All rows of a metrics folder by step; a step that a later process did again counts once, as redone."""
    rows: dict[int, dict[str, float]] = {}
    if not directory.exists():
        return []
    for path in sorted(directory.iterdir(), key=lambda p: p.name):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed process may be cut; its step was or will be redone
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]
