"""Where seed data comes from (paper 3.1.1): the packaged files, files of the user, data sets of the hub."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from etils import epath

from selfreward_jax.config import EftConfig
from selfreward_jax.data.records import RankedSet
from selfreward_jax.data.rows import Rows, plain, read_rows
from selfreward_jax.errors import UserError

_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?")
_PROMPT_FIELDS = "'prompt', 'text', 'instruction' or 'turns'"
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".gz")


def packaged(name: str) -> epath.Path:
    """A file of the packaged seed data, e.g. "trees.jsonl"."""
    return epath.Path(str(resources.files("selfreward_jax") / "data" / "seed" / name))


def rows_of(name: str, option: str) -> Rows:
    """The rows that a user's option names: a file (see rows.py), or a hub data set, with a network.

    Args:
        name: a file, "owner/name" (its train split) or "owner/name:split". An existing file wins, and what ends as a
            data file is one.
        option: the option that named it, as errors spell it: "--config.data.ift".

    Raises:
        UserError: as `hub_rows` and `rows.read_rows` do.
    """
    found = _HUB_NAME.fullmatch(name)
    if found and not name.endswith(_FILE_ENDINGS) and not epath.Path(name).exists():
        return hub_rows(found[1], option, found[2] or "train")
    return read_rows(name)


def hub_rows(name: str, option: str, split: str = "train") -> Rows:
    """Rows of one split of a hub data set as (row number from 1, row), as a file of them would read.

    Raises:
        UserError: one line, which says how to give a file instead: without a connection, without such a data set or
            split, and for a split without rows.
    """
    import datasets  # takes a second to import, and most runs read files
    from datasets.exceptions import DatasetsError

    instead = f"to read a file instead, give {option}=FILE (jsonl, json, gz or parquet)"
    try:
        loaded: Any = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = (
            "no connection to the hub" if isinstance(error, ConnectionError) else f"the hub gave no split '{split}'"
        )
        raise UserError(f"{option}={name}: {what} ({reason}); {instead}") from error
    rows = [(number, plain(row)) for number, row in enumerate(loaded, start=1)]
    if not rows:
        raise UserError(f"{option}={name}: split '{split}' of this data set is empty; {instead}")
    return rows


def judge_rows(file: str, low: int, high: int) -> list[dict[str, Any]]:
    """Judge examples: instruction, response, justification, score, and (by default) set and split.

    Args:
        file: path of a file of rows, or "seed" for the packaged examples, which have scores from 0 to 5.
        low, high: range of the scores of a user's file.

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
        if not wrong and file != "seed" and not low <= row["score"] <= high:
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


def measuring_sets(eft: EftConfig, low: int, high: int) -> list[RankedSet]:
    """The held-out sets of `eft.file`, if one is named, whatever `eft.source`: judges of all sources are compared."""
    return held_out_sets(judge_rows(eft.file, low, high)) if eft.file else []


def prompt_texts(file: str, default: str) -> list[tuple[str, str]]:
    """Prompts of a file of rows as (id, text), under `prompt`, `text`, `instruction` or `turns` (its first).

    Args:
        file: its path; empty: the packaged `default`.

    Raises:
        UserError: a line for each row without a prompt or with an id that was there before, at most ten.
    """
    path = epath.Path(file) if file else packaged(default)
    out, problems, seen = [], [], set()
    for line, row in read_rows(path):
        text = next(iter(_texts(row)), "")
        key = f"line-{line}" if row.get("id") is None else str(row["id"])
        if not text.strip():
            problems.append(f"{path}:{line}: no text under {_PROMPT_FIELDS}")
        elif key in seen:  # answers are found again by their prompt's id
            problems.append(f"{path}:{line}: id {key!r} was there before")
        else:
            out.append((key, text))
        seen.add(key)
    if problems:
        raise UserError(*problems[:10])
    return out


def evaluation_texts(file: str) -> list[str]:
    """Every text of an evaluation's prompts: all turns, where it has several (MT-Bench).

    Raises:
        UserError: a line for each row without a prompt, at most ten.
    """
    rows = [(line, _texts(row)) for line, row in read_rows(file)]
    problems = [f"{file}:{line}: no text under {_PROMPT_FIELDS}" for line, texts in rows if not texts]
    if problems:
        raise UserError(*problems[:10])
    return [text for _, texts in rows for text in texts]


def _texts(row: dict[str, Any]) -> list[str]:
    """The row's prompt, or its turns; [] for none."""
    found = next((row[name] for name in ("prompt", "text", "instruction") if isinstance(row.get(name), str)), None)
    turns = row.get("turns") if found is None else [found]
    return [text for text in turns if isinstance(text, str)] if isinstance(turns, list) else []
