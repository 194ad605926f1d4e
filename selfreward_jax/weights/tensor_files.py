"""The safetensors format: eight bytes with the length of a JSON header, the header, then the tensors' bytes.

The header is read here since the library maps whole files into memory, which works on local disks only and counts as
resident. What is read is checked as the library checks it: the tensors fill the file without gap or overlap.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from selfreward_jax.stores import Ranges

# The dtypes that this package reads and writes: the file's name to numpy's.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
METADATA = {"format": "pt"}  # transformers refuses files without it
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LENGTH = 8
_HEADER_LIMIT = 100_000_000  # the library's
_FIRST_READ = 1 << 18  # holds the header of most files: one request where it fits


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: in the file's bytes `start` to `stop`, rows in order."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_entries(read: Ranges, size: int) -> dict[str, Entry]:
    """Reads and checks the header of a file of `size` bytes.

    Raises:
        ValueError: says what is wrong with the file.
    """
    first = read(0, min(size, _FIRST_READ))
    if size < _LENGTH:
        raise ValueError(f"{size} bytes are too few")
    length = int.from_bytes(first[:_LENGTH], "little")
    if length > _HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes is too long")
    if _LENGTH + length > size:
        raise ValueError(f"the header has {length} bytes, the file {size}: it is cut")
    text = first[_LENGTH : _LENGTH + length]
    if len(text) < length:
        text += read(_LENGTH + len(text), length - len(text))
    return parse(text, size)


def parse(text: bytes, size: int) -> dict[str, Entry]:
    """The tensors that a header names.

    Args:
        text: the header's JSON.
        size: of the file, bytes.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not text.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("the header is nested too deep") from error
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is no table of texts")
    start = _LENGTH + len(text)
    entries = {name: _entry(name, fields, start) for name, fields in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"tensor {name} begins at byte {entry.start}, the one before it ends at {end}")
        end = entry.stop
    if end != size:
        raise ValueError(
            f"its tensors end at byte {end}, the file has {size}: it is {'cut' if end > size else 'long'}"
        )
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("the header names something twice")
    return names


def _entry(name: str, fields: Any, start: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} has no dtype, shape and data_offsets")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(kind, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has a dtype, shape or data_offsets of another form")
    held = offsets[1] - offsets[0]
    if held < 0 or (kind in _BITS and 8 * held != _BITS[kind] * math.prod(shape)):
        raise ValueError(f"tensor {name} of shape {shape} and dtype {kind} does not fill bytes {offsets}")
    return Entry(kind, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def header(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The first bytes of a file of these tensors (name to shape) of one dtype; their bytes follow, sorted by name.

    Byte for byte what the library writes.

    Args:
        dtype: numpy's name, one of `DTYPES`' values.
    """
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    content: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, shape in sorted(tensors.items()):
        start, end = end, end + math.prod(shape) * _BITS[kind] // 8
        content[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text
