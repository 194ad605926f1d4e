"""Which generated instructions become prompts: the filters of Self-Instruct (Wang et al., 2023; paper 3.1.3).

In order, each with the reason under which a drop is counted:

    empty            nothing is left
    too_short        3 words or fewer
    too_long         more than 150 words
    keyword          speaks of what a language model cannot see or do: images, graphs, files, ... (`KEYWORDS`)
    write_a_program  starts with "Write a program"
    punctuation      starts with an ASCII punctuation mark
    non_ascii        starts with a character outside ASCII
    similar          ROUGE-L F above 0.7 with a seed or an instruction accepted before

An instruction is normalised first, in one of two ways: `faithful` as the original does, `chat` for prompts as
people write them.
"""

import re
import string
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

REASONS = (
    *("empty", "too_short", "too_long", "keyword", "write_a_program"),
    *("punctuation", "non_ascii", "similar"),
)
KEYWORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files"),
    *("map", "maps", "draw", "plot", "go to"),
)
FEWEST_WORDS = 4
MOST_WORDS = 150
SIMILAR_ABOVE = 0.7

_KEYWORD = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z0-9]+")


def faithful(text: str) -> str:
    """On one line and capitalised as Python does it: every letter but the first becomes small, names too."""
    return " ".join(text.split()).capitalize()


def chat(text: str) -> str:
    """Without space at both ends; case and line breaks stay as the model wrote them."""
    return text.replace("\r\n", "\n").strip()


def reason_against(instruction: str) -> str | None:
    """The first of `REASONS` but "similar" that speaks against a normalised instruction, or None.

    Line breaks count as spaces and "Write a program" in any case is refused, so both normalisations get the
    same verdict.
    """
    words = instruction.split()
    line = " ".join(words)
    if not words:
        return "empty"
    if len(words) < FEWEST_WORDS:
        return "too_short"
    if len(words) > MOST_WORDS:
        return "too_long"
    if _KEYWORD.search(line):
        return "keyword"
    if line.capitalize().startswith("Write a program"):
        return "write_a_program"
    if line[0] in string.punctuation:
        return "punctuation"
    if not line[0].isascii():
        return "non_ascii"
    return None


class RougeIndex:
    """Instructions so far, and whether a new one is too close to any of them.

    The verdict is that of rouge_score's rougeL F measure (`use_stemmer=False`), `max(F) > threshold`, to the
    last bit. It takes one pass over posting lists where the original compares with every instruction: only
    those that share enough tokens, counted with multiplicity, get their longest common subsequence computed.

    Tokens are runs of a-z and 0-9, so text in other scripts has none and is never similar to anything, itself
    included, and an accented letter splits a word. That is the original's blindness, kept.
    """

    def __init__(self, threshold: float = SIMILAR_ABOVE, texts: Iterable[str] = ()) -> None:
        self._threshold = threshold
        self._ids: dict[str, int] = {}
        self._entries: list[tuple[int, ...]] = []
        self._lengths = array("q")
        # (token, k) -> the entries that hold the token more than k times: multiset overlap is a plain count.
        self._postings: dict[tuple[int, int], array[int]] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, text: str) -> None:
        """Adds an instruction; it need not be a novel one."""
        tokens = tuple(self._ids.setdefault(token, len(self._ids)) for token in _tokens(text))
        for key in _numbered(tokens):
            self._postings.setdefault(key, array("q")).append(len(self._entries))
        self._entries.append(tokens)
        self._lengths.append(len(tokens))

    def is_similar(self, text: str) -> bool:
        """Whether any instruction of the index has a ROUGE-L F with `text` above the threshold."""
        tokens = [self._ids.get(token, -1) for token in _tokens(text)]  # -1: a token that no entry has
        lists = [self._postings[key] for key in _numbered(tokens) if key in self._postings]
        if not lists:
            return False
        overlap = np.bincount(np.concatenate([np.array(entries) for entries in lists]), minlength=len(self))
        # F = 2 LCS / (sum of lengths) and LCS <= overlap; the margin leaves equality to the formula below.
        bound = 2.0 * overlap >= (self._threshold - 1e-9) * (np.array(self._lengths) + len(tokens))
        close = np.flatnonzero(bound & (overlap > 0))
        close = close[np.argsort(-overlap[close], kind="stable")]  # the likeliest first: one hit is enough
        positions: dict[int, int] = {}
        for place, token in enumerate(tokens):
            positions[token] = positions.get(token, 0) | 1 << place
        for entry in map(self._entries.__getitem__, close.tolist()):
            lcs = _lcs_length(positions, len(tokens), entry)
            if _f_measure(lcs, len(entry), len(tokens)) > self._threshold:
                return True
        return False


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _numbered(tokens: Iterable[int]) -> list[tuple[int, int]]:
    """Each token with the number of times it has come before: distinct keys for repeated tokens."""
    seen: Counter[int] = Counter()
    keys = []
    for token in tokens:
        keys.append((token, seen[token]))
        seen[token] += 1
    return keys


def _lcs_length(positions: dict[int, int], length: int, other: Sequence[int]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one integer.

    `positions` has for each token of the first sequence (of `length` tokens) the bits of its places. A bit of
    `row` turns 0 where the table steps up (Hyyro 2004, "Bit-parallel LCS-length computation revisited").
    """
    full = (1 << length) - 1
    row = full
    for token in other:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return length - row.bit_count()


def _f_measure(lcs: int, length_a: int, length_b: int) -> float:
    """F in rouge_score's float operations: 2 * lcs / (a + b) rounds differently, which shows at 0.7."""
    if lcs == 0:
        return 0.0
    precision, recall = lcs / length_b, lcs / length_a
    return 2 * precision * recall / (precision + recall)


def filter_batch(
    candidates: Iterable[str], index: RougeIndex, normalise: Callable[[str], str] = chat
) -> tuple[list[str], Counter[str]]:
    """The candidates that pass, normalised, and the number of drops by reason.

    `index` holds the seeds and all that was accepted before; what is accepted joins it at once, so that later
    candidates of the same batch are compared with it. `normalise` is `faithful` or `chat`.
    """
    accepted: list[str] = []
    drops: Counter[str] = Counter()
    for candidate in candidates:
        instruction = normalise(candidate)
        reason = reason_against(instruction)
        if reason is None and index.is_similar(instruction):
            reason = "similar"
        if reason is None:
            index.add(instruction)
            accepted.append(instruction)
        else:
            drops[reason] += 1
    return accepted, drops
