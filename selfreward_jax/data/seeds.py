"""Where seed data comes from (paper 3.1.1): the packaged files, files of the user, data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
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


def on_hub(name: str) -> bool:
    """Whether a name is "owner/name" or "owner/name:split" of the hub: an existing file wins, and a file's ending."""
    named = _HUB_NAME.fullmatch(name) is not None
    return named and not name.endswith(_FILE_ENDINGS) and not epath.Path(name).exists()


def rows_of(name: str, option: str) -> Rows:
    """The rows that a user's option names: a file (see rows.py), or a hub data set, with a network.

    Args:
        name: a file, "owner/name" (its train split) or "owner/name:split"; `on_hub` tells which.
        option: the option that named it, as errors spell it: "--config.data.ift".

    Raises:
        UserError: as `hub_rows` and `rows.read_rows` do.
    """
    found = _HUB_NAME.fullmatch(name)
    if found and on_hub(name):
        return hub_rows(found[1], option, found[2] or "train")
    return read_rows(name)


def hub_rows(name: str, option: str, split: str = "train") -> Rows:
    """Rows of one split of a hub data set as (row number from 1, row), as a file of them would read.

    Raises:
        UserError: one line: why there are none (no login, no connection, no such data set or split, a proxy's page,
            a split without rows), what to do about it, and how to give a file instead.
    """
    import datasets  # takes a second to import, and most runs read files

    instead = f"to read a file instead, give {option}=FILE (jsonl, json, gz or parquet)"
    try:
        loaded: Any = datasets.load_dataset(name, split=split)
    except Exception as error:  # of three libraries and their HTTP client, which share no class; the cause is chained
        raise UserError(f"{option}={name}: {_trouble(error, split)}; {instead}") from error
    rows = [(number, plain(row)) for number, row in enumerate(loaded, start=1)]
    if not rows:
        raise UserError(f"{option}={name}: split '{split}' of this data set is empty; {instead}")
    return rows


def _trouble(error: BaseException, split: str) -> str:
    """What a failure of the hub means and what to do, by the first error of its chain that tells."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def called(*names: str) -> Callable[[BaseException], bool]:
        return lambda some: type(some).__name__ in names

    def status(some: BaseException) -> int:
        return getattr(getattr(some, "response", None), "status_code", None) or 0

    login = "log in by `hf auth login`"
    offline = called("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError")
    kinds: tuple[tuple[Callable[[BaseException], bool], str, str], ...] = (
        (lambda some: status(some) in (401, 403) or "gated dataset" in str(some),
         "the hub shows it to a login only", f"{login} with an account that may read it"),
        (called("FileMetadataError", "JSONDecodeError"),
         "what answered is not the hub", "a proxy's page? See to the proxy and to HF_ENDPOINT"),
        (lambda some: status(some) >= 500, "the hub failed", "try again later"),
        (lambda some: isinstance(some, (ConnectionError, TimeoutError)) or offline(some),
         "no connection to the hub", ""),
        (called("DatasetNotFoundError"), "the hub has no such data set, or shows it to a login only",
         f"check the name, or {login}"),
        (lambda some: isinstance(some, ValueError) and "split" in str(some), f"it has no split '{split}'", ""),
    )  # fmt: skip
    found = ((some, what, to_do) for tells, what, to_do in kinds for some in chain if tells(some))
    some, what, to_do = next(found, (error, "the hub's data set cannot be read", ""))
    reason = (str(some).strip() or type(some).__name__).splitlines()[0]
    return f"{what} ({reason})" + (f"; {to_do}" if to_do else "")


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
