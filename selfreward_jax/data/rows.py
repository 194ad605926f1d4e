"""Rows: the objects that a file holds, as jsonl, as one JSON list or as parquet, each plain or gzip, local or remote.

The form is told by the content and never by the name, so `data.jsonl.gz`, `train.json` and a file without an ending
all read. Whatever the form, a row is what JSON would give: text, numbers, booleans, None, lists and dicts.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from typing import Any

from etils import epath

from selfreward_jax.errors import UserError

PathLike = str | os.PathLike[str]
Rows = list[
    tuple[int, dict[str, Any]]
]  # a number from 1 (the line of jsonl, else the place in the list or table), a row
Problems = list[tuple[int, str]]  # the same number, a message
MAX_PROBLEMS = 10  # problems shown of one file; the rest is a count

_GZIP, _PARQUET, _BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
_JSON_NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list",
               dict: "an object", type(None): "null"}  # fmt: skip


def read_rows(path: PathLike) -> Rows:
    """The (number, object) rows of a file, whose fields are the caller's to check.

    Blank lines of jsonl are passed over, but count. Raises UserError for a file that is missing, unreadable, damaged
    or empty, and otherwise one line for each row that is no object (the first ten, then a count).
    """
    rows, problems = scan(path)
    raise_problems(path, problems)
    return rows


def scan(path: PathLike) -> tuple[Rows, Problems]:
    """As `read_rows`, but the bad rows come back as (number, message), for a caller that finds more of them."""
    content = _read_bytes(path)
    if content.startswith(_PARQUET):
        found, problems = _parquet(path, content), []
    elif re.match(rb"\s*\[", content):
        found, problems = _array(path, content)
    else:
        found, problems = _lines(path, content)
    if not found and not problems:
        raise UserError(f"{path}: the file is empty")
    rows: Rows = []
    for number, row in found:
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append((number, f"{path}:{number}: an object a line is needed, {describe(row)} found"))
    return rows, problems


def raise_problems(path: PathLike, problems: Problems) -> None:
    """Raises the (number, message) problems of a file, if any, as one UserError in the order of the rows."""
    if not problems:
        return
    lines = [message for _, message in sorted(problems)]
    if len(lines) > MAX_PROBLEMS:
        lines = [*lines[:MAX_PROBLEMS], f"{path}: {len(lines) - MAX_PROBLEMS} more bad lines"]
    raise UserError(*lines)


def describe(value: object) -> str:
    """What an error calls a value of the wrong type."""
    found = _JSON_NAMES.get(type(value), type(value).__name__)
    return found if not isinstance(value, list) else "a list with something else"


def plain(value: object) -> Any:
    """A value of a table as JSON would give it: NaN, which tables write for "none", is None, and arrays are lists.

    Bytes that are UTF-8 become text (some writers do not mark their text columns), others stay bytes. What JSON has
    no form for, such as a date, becomes its text.
    """
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # an image, say: only a reader of this very field has to care
            return value
    if (convert := getattr(value, "tolist", None)) is not None:  # a numpy array or scalar
        return plain(convert())
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _lines(path: PathLike, content: bytes) -> tuple[list[tuple[int, Any]], Problems]:
    rows: list[tuple[int, Any]] = []
    problems: Problems = []
    # Split at "\n" alone: text may hold U+2028 and other marks that str.splitlines takes for line ends.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, wrong = _parse(line)
        if wrong:
            problems.append((number, f"{path}:{number}: {wrong[1]}"))
        else:
            rows.append((number, row))
    return rows, problems


def _array(path: PathLike, content: bytes) -> tuple[list[tuple[int, Any]], Problems]:
    rows, wrong = _parse(content)
    if wrong:
        return [], [(wrong[0], f"{path}:{wrong[0]}: {wrong[1]}")]
    return list(enumerate(rows, start=1)), []


def _parse(text: bytes) -> tuple[Any, tuple[int, str] | None]:
    """The value, or None with the line of the text and what is wrong there."""
    try:
        return json.loads(text.decode(), parse_constant=_refuse_constant), None
    except UnicodeDecodeError as error:
        return None, (text.count(b"\n", 0, error.start) + 1, f"not UTF-8 ({error.reason} at byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return None, (error.lineno, f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return None, (1, "not JSON that can be read (nested too deep)")
    except ValueError as error:
        return None, (1, f"not JSON ({error})")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parquet(path: PathLike, content: bytes) -> list[tuple[int, Any]]:
    import pyarrow  # takes a moment to import, and most runs read jsonl
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist(maps_as_pydicts="lossy")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged parquet ({reason})") from error
    return [(number, plain(row)) for number, row in enumerate(rows, start=1)]


def _read_bytes(path: PathLike) -> bytes:
    """What is in the file, unpacked, without a byte order mark."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such file")
    if file.is_dir():
        raise UserError(f"{path}: is a folder, a file is needed")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip ({error})") from error
    return content.removeprefix(_BOM)
