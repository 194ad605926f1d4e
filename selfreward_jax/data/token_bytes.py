"""The bytes that each token puts into a text, and texts of such bytes.

Text is bytes before it is characters: a token may end in the middle of a character, a stop string may begin in the
middle of a token. So what ends a text is looked for in bytes. They are read from the tokenizer's own description of
how it decodes: byte-level BPE (GPT-2's alphabet: SmolLM2, Llama 3, Qwen2) and sentencepiece with byte fallback
(Llama 2, Mistral).
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_STOP_BYTES = 250  # of all stop strings together: as many states of their automaton as a byte can number
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class TokenBytes:
    """What the ids of a tokenizer become.

    Attributes:
        pieces: the bytes of each id; b"" for special tokens and ids without a token, which no text shows.
        leading: spaces that decoding takes off the beginning of a text (sentencepiece: 1).
    """

    pieces: tuple[bytes, ...]
    leading: int


def read(decoder: Mapping[str, Any] | None, tokens: Sequence[str | None]) -> TokenBytes | None:
    """The bytes of each token.

    Args:
        decoder: the "decoder" of a tokenizer.json.
        tokens: the token of each id as the vocabulary spells it; None for one that no text shows.

    Returns:
        None if the decoder does more than to put bytes together: then no table of bytes tells what it writes.
    """
    steps = _steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return TokenBytes(tuple(map(_byte_level, tokens)), 0)
    kinds = " ".join(step["type"] for step in steps)
    if not re.fullmatch("(Replace )?ByteFallback Fuse( Strip)?", kinds):
        return None
    replaced = steps[0] if kinds.startswith("Replace") else {"pattern": {"String": "▁"}, "content": "▁"}
    strip = steps[-1] if kinds.endswith("Strip") else {"content": " ", "start": 0, "stop": 0}
    old = replaced["pattern"].get("String", "")
    if len(old) != 1 or strip["content"] != " " or strip["stop"]:
        return None
    pieces = (_sentencepiece(token, old, replaced["content"]) for token in tokens)
    return TokenBytes(tuple(pieces), int(strip["start"]))


def text_of(data: bytes) -> str:
    """The text of bytes: invalid ones become U+FFFD, and a character that the end cuts is dropped."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def before_stop(data: bytes, strings: Iterable[str]) -> bytes:
    """What stands before the stop string that is complete first; if several end there, before the longest."""
    found = []
    for string in map(str.encode, strings):
        if (start := data.find(string)) >= 0:
            found.append((start + len(string), start))
    return data[: min(found)[1]] if found else data


def stop_problems(strings: Sequence[str]) -> list[str]:
    """A line for each thing that is wrong with stop strings."""
    problems = [f"stop string {string!r}: empty, so no text could begin" for string in strings if not string]
    broken = [string for string in strings if any("\ud800" <= letter <= "\udfff" for letter in string)]
    problems += [f"stop string {string!r}: not UTF-8" for string in broken]
    size = sum(len(string.encode("utf-8", "surrogatepass")) for string in strings)
    if size > MOST_STOP_BYTES:
        problems.append(
            f"stop strings: {size} bytes of UTF-8, at most {MOST_STOP_BYTES} together; give fewer or shorter ones"
        )
    return problems


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _alphabet() -> dict[str, int]:
    """GPT-2's: bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _alphabet()


def _byte_level(token: str | None) -> bytes:
    if token is None:
        return b""
    # An added token that the alphabet cannot spell is text as it stands.
    return bytes(_BYTES[letter] for letter in token) if all(map(_BYTES.__contains__, token)) else token.encode()


def _sentencepiece(token: str | None, old: str, new: str) -> bytes:
    if token is None:
        return b""
    byte = _FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(old, new).encode()
