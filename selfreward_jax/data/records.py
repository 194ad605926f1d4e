"""Records: every row that one stage writes and another reads, as a frozen dataclass and one line of JSON.

A record has one spelling: fields in the order of the class, no spaces, text as UTF-8. So equal records are
equal bytes, and a run that was killed and resumed can be compared with one that was not. Reading is strict: a
missing, extra or wrong-typed field is a `UserError` with file and line.
"""

import dataclasses
import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from etils import epath

from selfreward_jax.errors import UserError

PathLike = str | os.PathLike[str]
MAX_PROBLEMS = 10  # problems shown of one file; the rest is a count


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
class JudgeExample:
    """One EFT example (paper 3.1.1): `prompt` is the judged instruction, `set` the id of its `RankedSet`."""

    id: str
    prompt: str
    response: str
    justification: str
    score: int
    set: str


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

    `score` is the text of a Fraction, such as "4" or "7/2"; None means that the text holds no score, which is
    never the same as a score of 0.
    """

    prompt_id: str
    response_index: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    score: str | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair (paper 2.3); scores are the text of Fractions, ids are the sampled ones."""

    prompt_id: str
    prompt: str
    chosen_index: int
    rejected_index: int
    chosen: str
    rejected: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_score: str
    rejected_score: str


Record = Prompt | Example | RankedSet | JudgeExample | Response | Judgment | Pair
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
_JSON_NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list",
               dict: "an object", type(None): "null"}  # fmt: skip


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def to_json(record: Record) -> str:
    """The record's one canonical line, without the line end.

    Floats are written in full, so reading gives the same record back. Raises ValueError for a NaN or an
    infinity and TypeError for a value that JSON has no form for (a numpy scalar, say): both are mistakes of
    the writer.
    """
    row = {name: getattr(record, name) for name in _fields(type(record))}
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
            problems.append(f"'{name}' must be {wanted}, {_describe(row[name])} found")
    if problems:
        raise UserError(f"{where}: not a {cls.__name__}: {'; '.join(problems)}")
    return cls(**values)


def _describe(value: object) -> str:
    found = _JSON_NAMES.get(type(value), type(value).__name__)
    return found if not isinstance(value, list) else "a list with something else"


def read_records(path: PathLike, cls: type[R]) -> list[R]:
    """All records of a jsonl file (plain or gzip, local or remote).

    Raises UserError for a file that is missing, unreadable or empty, and otherwise one line for each bad row
    (the first ten, then a count), whether it is not JSON or does not have the fields of `cls`.
    """
    rows, problems = _read(path)
    records: list[R] = []
    for number, row in rows:
        try:
            records.append(from_json(cls, row, f"{path}:{number}"))
        except UserError as error:
            problems.append((number, str(error)))
    raise_problems(path, problems)
    return records


def read_rows(path: PathLike) -> list[tuple[int, dict[str, Any]]]:
    """The (line number, object) rows of a jsonl file, whose fields are the caller's to check.

    gzip is recognised by its content, so `.jsonl.gz` and `.json.gz` both read; line numbers are of the
    unpacked text, from 1. Blank lines are passed over. Raises UserError as `read_records` does.
    """
    rows, problems = _read(path)
    raise_problems(path, problems)
    return rows


def raise_problems(path: PathLike, problems: list[tuple[int, str]]) -> None:
    """Raises the (line number, message) problems of a file, if any, as one UserError in line order."""
    if not problems:
        return
    lines = [message for _, message in sorted(problems)]
    if len(lines) > MAX_PROBLEMS:
        lines = [*lines[:MAX_PROBLEMS], f"{path}: {len(lines) - MAX_PROBLEMS} more bad lines"]
    raise UserError(*lines)


def _read(path: PathLike) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    # Split at "\n" alone: text may hold U+2028 and other marks that str.splitlines takes for line ends.
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            problems.append((number, f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1})"))
        except json.JSONDecodeError as error:
            problems.append((number, f"{path}:{number}: not JSON ({error.msg}, column {error.colno})"))
        except (ValueError, RecursionError) as error:
            problems.append((number, f"{path}:{number}: not JSON ({error})"))
        else:
            if isinstance(row, dict):
                rows.append((number, row))
            else:
                problems.append((number, f"{path}:{number}: an object a line is needed, {_describe(row)} found"))
    if not rows and not problems:
        raise UserError(f"{path}: the file is empty")
    return rows, problems


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _read_bytes(path: PathLike) -> bytes:
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such file")
    if file.is_dir():
        raise UserError(f"{path}: is a folder, a file is needed")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error})") from error
