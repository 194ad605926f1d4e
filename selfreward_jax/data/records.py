"""Records: every row that one stage writes and another reads, as a frozen dataclass and one line of JSON.

A record has one spelling: fields in the order of the class, no spaces, text as UTF-8. So equal records are
equal bytes, and a run that was killed and resumed can be compared with one that was not. Reading is strict: a
missing, extra or wrong-typed field is a `UserError` with file and line.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from selfreward_jax.data.rows import PathLike, describe, raise_problems, scan
from selfreward_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An instruction without a response (paper 2.2, step 1)."""

    id: str
    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Example:
    """An instruction and the response to train on: one IFT example (paper 2.1)."""

    id: str
    prompt: str
    response: str
    source: str


@dataclasses.dataclass(frozen=True)
class RankedSet:
    """A prompt with human-ranked replies (paper 3.1.1): `replies[i]` has `ranks[i]`, rank 0 is the best."""

    id: str
    prompt: str
    replies: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Response:
    """Candidate `index` of a prompt (paper 2.2, step 2), with the sampled ids and their log-probabilities."""

    prompt_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Judgment:
    """Judgment `sample` of one candidate (paper 2.2, step 3).

    `score` is the text of a Fraction, such as "4" or "7/2"; None means that the text holds no score, for the
    `reason` given, which is never the same as a score of 0. `expected` is the probability-weighted score where it
    was asked for (`judge.score=expected`), as the text of a decimal number.
    """

    prompt_id: str
    response_index: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    score: str | None
    reason: str | None = None
    expected: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair (paper 2.3); ids are the sampled ones, scores the text of Fractions (None: people chose)."""

    prompt_id: str
    prompt: str
    chosen_index: int
    rejected_index: int
    chosen: str
    rejected: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_score: str | None
    rejected_score: str | None


@dataclasses.dataclass(frozen=True)
class Preference:
    """A person's choice between two answers to a prompt, from the user's own data (paper 2.3, without a judge)."""

    id: str
    prompt: str
    chosen: str
    rejected: str


Record = Prompt | Example | RankedSet | Response | Judgment | Pair | Preference
R = TypeVar("R", bound=Record)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return type(value) is int  # not bool, which Python counts as an int


def _is_number(value: object) -> bool:
    return type(value) is float or type(value) is int


def _list_of(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


# For each field type: what an error calls it, the test of a JSON value, and the change from JSON to the
# field.
_KINDS: dict[Any, tuple[str, Callable[[object], bool], Callable[[Any], Any]]] = {
    str: ("a string", _is_str, str),
    int: ("an integer", _is_int, int),
    str | None: (
        "a string or null",
        lambda value: value is None or isinstance(value, str),
        lambda value: value,
    ),
    tuple[str, ...]: ("a list of strings", _list_of(_is_str), tuple),
    tuple[int, ...]: ("a list of integers", _list_of(_is_int), tuple),
    tuple[float, ...]: ("a list of numbers", _list_of(_is_number), lambda value: tuple(map(float, value))),
}


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def to_json(record: Record) -> str:
    """The record's one canonical line, without the line end.

    Floats are written in full, so reading gives the same record back. Raises ValueError for a NaN or an
    infinity and TypeError for a value that JSON has no form for (a numpy scalar, say): both are mistakes of
    the writer.
    """
    return json_line({name: getattr(record, name) for name in _fields(type(record))})


def json_line(row: dict[str, Any]) -> str:
    """A row as one line of JSON that has a UTF-8 form, whatever its texts."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8 form: such a row is written as ASCII escapes
        line = json.dumps(row, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return line


def from_json(cls: type[R], row: Mapping[str, object], where: str) -> R:
    """The record that a decoded JSON object spells; `where` (file and line) opens the error.

    Raises UserError, in one line, naming every missing, extra or wrong-typed field.
    """
    kinds = _fields(cls)
    problems = [f"missing field '{name}'" for name in kinds if name not in row]
    problems += [f"unknown field '{name}'" for name in row if name not in kinds]
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        wanted, test, convert = _KINDS[kind]
        if name not in row:
            continue
        if test(row[name]):
            values[name] = convert(row[name])
        else:
            problems.append(f"'{name}' must be {wanted}, {describe(row[name])} found")
    if problems:
        raise UserError(f"{where}: not a {cls.__name__}: {'; '.join(problems)}")
    return cls(**values)


def read_records(path: PathLike, cls: type[R]) -> list[R]:
    """All records of a file of rows (see rows.py; our own are jsonl).

    Raises UserError for a file that is missing, unreadable or empty, and otherwise one line for each bad row
    (the first ten, then a count), whether it is no object or does not have the fields of `cls`.
    """
    rows, problems = scan(path)
    records: list[R] = []
    for number, row in rows:
        try:
            records.append(from_json(cls, row, f"{path}:{number}"))
        except UserError as error:
            problems.append((number, str(error)))
    raise_problems(path, problems)
    return records
