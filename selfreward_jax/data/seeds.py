"""The packaged seed data, and judge examples from a file."""

from __future__ import annotations

from importlib import resources
from typing import Any

from etils import epath

from selfreward_jax.data.records import RankedSet, read_rows
from selfreward_jax.errors import UserError


def packaged(name: str) -> epath.Path:
    """A file of the packaged seed data, e.g. "trees.jsonl"."""
    return epath.Path(str(resources.files("selfreward_jax") / "data" / "seed" / name))


def hub_rows(name: str) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a hub data set's train split as (row number, row).

    Raises:
        UserError: if the hub can't be reached or has no such data set.
    """
    import datasets  # takes a second to import, and most runs read files
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--config.data.oasst={name}: the hub gave no such data set ({reason}); name a file"
        ) from error
    return [(number, dict(row)) for number, row in enumerate(loaded, start=1)]


def judge_rows(file: str, low: int, high: int) -> list[dict[str, Any]]:
    """Judge examples: instruction, response, justification, score, and (by default) set and split.

    Args:
        file: path of a jsonl file, or "seed" for the packaged examples.
        low, high: range of the scores.

    Raises:
        UserError: a line for each row that lacks a field, has a wrong one or repeats an id, at most ten.
    """
    path = packaged("judge.jsonl") if file == "seed" else epath.Path(file)
    needed = {"instruction": str, "response": str, "justification": str, "score": int}
    problems, rows, seen = [], [], set()
    for line, row in read_rows(path):
        row: dict[str, Any] = {"id": f"line-{line}", "set": f"line-{line}", "split": "train"} | row
        wrong = [
            f"{name} must be {kind.__name__}"
            for name, kind in ({"id": str, "set": str} | needed).items()
            if type(row.get(name)) is not kind
        ]
        if row["split"] not in ("train", "heldout"):
            wrong.append(f"split {row['split']!r} is not train or heldout")
        if not wrong and not low <= row["score"] <= high:
            wrong = [f"score {row['score']} is outside {low}..{high}"]
        if not wrong and row["id"] in seen:
            wrong = [f"id {row['id']!r} was there before"]
        problems += [f"{path}:{line}: {', '.join(wrong)}"] if wrong else []
        seen.add(str(row["id"]))
        rows.append(row)
    if problems:
        raise UserError(*problems[:10])
    return rows


def held_out_sets(rows: list[dict[str, Any]]) -> list[RankedSet]:
    """Held-out judge examples as ranked sets: replies to one instruction, ranked by the score they were given.

    A set whose scores are all the same orders nothing and is left out.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["split"] == "heldout":
            sets.setdefault(row["set"], []).append(row)
    out = []
    for name, members in sorted(sets.items()):
        order = sorted({row["score"] for row in members}, reverse=True)
        ranks = tuple(order.index(row["score"]) for row in members)
        if len(order) > 1:
            out.append(RankedSet(name, members[0]["instruction"], tuple(row["response"] for row in members), ranks))
    return out


def prompt_texts(file: str, default: str) -> list[tuple[str, str]]:
    """Prompts of a jsonl file with a field `prompt` (or `text`, or `instruction`) as (id, text).

    Args:
        file: its path; empty: the packaged `default`.

    Raises:
        UserError: a line for each row without a prompt or with an id that was there before, at most ten.
    """
    path = epath.Path(file) if file else packaged(default)
    out, problems, seen = [], [], set()
    for line, row in read_rows(path):
        text = next((row[name] for name in ("prompt", "text", "instruction") if isinstance(row.get(name), str)), "")
        key = str(row.get("id", f"line-{line}"))
        if not text.strip():
            problems.append(f"{path}:{line}: no text under 'prompt', 'text' or 'instruction'")
        elif key in seen:  # answers are found again by their prompt's id
            problems.append(f"{path}:{line}: id {key!r} was there before")
        else:
            out.append((key, text))
        seen.add(key)
    if problems:
        raise UserError(*problems[:10])
    return out
