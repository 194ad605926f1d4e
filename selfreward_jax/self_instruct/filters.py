"""Which generated instructions become prompts: the filters of Self-Instruct (Wang et al., 2023; paper 3.1.3).

In order, each with the reason under which a drop is counted:

    empty            nothing is left
    too_short        3 words or fewer
    too_long         more than 150 words
    keyword          speaks of what a language model cannot see or do: images, graphs, files, ... (`KEYWORDS`)
    write_a_program  starts with "Write a program"
    punctuation      starts with an ASCII punctuation mark
    non_ascii        starts with a character outside ASCII
    near_evaluation  ROUGE-L F above 0.7 with a held-out prompt; not in the original
    similar          ROUGE-L F above 0.7 with a seed or an instruction accepted before

An instruction is normalised first, in one of two ways: `faithful` as the original does, `chat` for prompts as
people write them.
"""

import math
import re
import string
from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

REASONS = (
    *("empty", "too_short", "too_long", "keyword", "write_a_program"),
    *("punctuation", "non_ascii", "near_evaluation", "similar"),
)
KEYWORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files"),
    *("map", "maps", "draw", "plot", "go to"),
)
FEWEST_WORDS = 4
MOST_WORDS = 150
SIMILAR_ABOVE = 0.7
HITS = 4  # rare tokens that two instructions must share to be compared: the fastest at 1,000 to 100,000

_KEYWORD = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z0-9]+")
_NOWHERE = array("q")


def faithful(text: str) -> str:
    """On one line and capitalised as Python does it: every letter but the first becomes small, names too."""
    return " ".join(text.split()).capitalize()


def chat(text: str) -> str:
    """Without space at both ends; case and line breaks stay as the model wrote them."""
    return text.replace("\r\n", "\n").strip()


def reason_against(instruction: str) -> str | None:
    """The first of `REASONS` that speaks against a normalised instruction by itself, or None.

    Line breaks count as spaces and "Write a program" in any case is refused, so both normalisations get the
    same verdict, but for the few first letters whose capital is ASCII and they are not, like the German sharp s.
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
    last bit. Where the original compares with every instruction, this reads short parts of the posting lists of
    the rarest tokens (`_may_pass`) and computes few longest common subsequences.

    Tokens are runs of a-z and 0-9, so text in other scripts has none and is never similar to anything, itself
    included, and an accented letter splits a word. That is the original's blindness, kept.
    """

    def __init__(self, threshold: float = SIMILAR_ABOVE, texts: Iterable[str] = ()) -> None:
        self._threshold = threshold
        # What prunes has a margin: equality is left to the exact formula. Above 0, as it divides.
        self._limit = max(threshold * (1 - 1e-9), 1e-9)
        self._ids: dict[str, int] = {}
        self._entries: list[tuple[int, ...]] = []
        # (token, k) -> the entries that hold the token more than k times, so that multiset overlap is a plain
        # count. An entry is written `length << 32 | number`: a range of lengths is a slice of the sorted list.
        self._postings: dict[tuple[int, int], array[int]] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, text: str) -> None:
        """Adds an instruction; it need not be a novel one."""
        tokens = tuple(self._ids.setdefault(token, len(self._ids)) for token in _tokens(text))
        for key in _numbered(tokens):
            insort(self._postings.setdefault(key, array("q")), len(tokens) << 32 | len(self._entries))
        self._entries.append(tokens)

    def is_similar(self, text: str) -> bool:
        """Whether any instruction of the index has a ROUGE-L F with `text` above the threshold."""
        tokens = [self._ids.get(token, -1) for token in _tokens(text)]  # -1: a token that no entry has
        positions: dict[int, int] = {}
        for place, token in enumerate(tokens):
            positions[token] = positions.get(token, 0) | 1 << place
        for entry in map(self._entries.__getitem__, self._may_pass(tokens)):
            lcs = _lcs_length(positions, len(tokens), entry)
            if _f_measure(lcs, len(entry), len(tokens)) > self._threshold:
                return True
        return False

    def _may_pass(self, tokens: Sequence[int]) -> list[int]:
        """Numbers of the entries whose shared tokens leave an F above the threshold possible.

        F = 2 LCS / (a + b) for a query of a tokens and an entry of b. So an entry must share
        `need = threshold * (a + b) / 2` of the query's tokens with it, and `hits` of any `a - need + hits` of
        them. We take the rarest, and read of each list the lengths b for which it is one of so many: `need` grows
        with b, so a frequent word's list is read for short entries only, and those of the most frequent not at
        all. More hits read more and leave fewer entries to compare.
        """
        length = len(tokens)
        shortest = max(1, math.ceil(self._limit * length / (2 - self._limit)))  # as LCS <= b
        hits = min(HITS, shortest)  # no `need` is below `shortest`
        lists = sorted((self._postings.get(key, _NOWHERE) for key in _numbered(tokens)), key=len)
        met = array("q")
        for rank, entries in enumerate(lists):
            need = min(length, length - rank + hits - 1)  # the greatest with which this list is one of so many
            longest = int(2 * need / self._limit) - length
            if longest < shortest:
                break
            met += entries[bisect_left(entries, shortest << 32) : bisect_left(entries, longest + 1 << 32)]
        first = np.sort(np.array(met), kind="stable")  # merges the slices, each of which is sorted
        last = first[hits - 1 :]
        return (np.unique(last[last == first[: len(last)]]) & 0xFFFFFFFF).tolist()


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _numbered(tokens: Iterable[int]) -> list[tuple[int, int]]:
    """Each token with the number of times it has come before: distinct keys for repeated tokens."""
    seen: dict[int, int] = {}
    keys = []
    for token in tokens:
        seen[token] = seen.get(token, -1) + 1
        keys.append((token, seen[token]))
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
    candidates: Iterable[str],
    index: RougeIndex,
    normalise: Callable[[str], str] = chat,
    held_out: RougeIndex | None = None,
) -> tuple[list[str], Counter[str]]:
    """The candidates that pass, normalised, and the number of drops by reason.

    Args:
        candidates: raw instructions.
        index: the seeds and all that was accepted before; what is accepted joins it at once, so that later
            candidates of the same batch are compared with it.
        normalise: `faithful` or `chat`.
        held_out: evaluation prompts that no new prompt may come near. It has a threshold of its own.
    """
    accepted: list[str] = []
    drops: Counter[str] = Counter()
    for candidate in candidates:
        instruction = normalise(candidate)
        reason = reason_against(instruction)
        if reason is None and held_out is not None and held_out.is_similar(instruction):
            reason = "near_evaluation"
        if reason is None and index.is_similar(instruction):
            reason = "similar"
        if reason is None:
            index.add(instruction)
            accepted.append(instruction)
        else:
            drops[reason] += 1
    return accepted, drops
