"""Finite automata over the bytes of a text: what a text must hold to be over.

An automaton is an int32 array `[Q,256]`: the state after a byte. State 0 is the start. State Q - 1 is the end: it is
reached with the byte that completes what is looked for, and never left.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

S = TypeVar("S", bound=Hashable)


def never() -> np.ndarray:
    """Ends nowhere."""
    return np.repeat(np.arange(2, dtype=np.int32)[:, None], 256, axis=1)


def explore(start: S, step: Callable[[S, int], S | None]) -> np.ndarray:
    """The automaton of a rule that is written as a function.

    Args:
        start: the state before the first byte.
        step: (state, byte) -> the next state, or None where the text is over; finitely many states.
    """
    numbers = {start: 0}
    found = [start]
    rows = []
    for state in found:  # grows while it is read
        row = [step(state, byte) for byte in range(256)]
        for after in row:
            if after is not None and after not in numbers:
                numbers[after] = len(found)
                found.append(after)
        rows.append(row)
    end = len(found)
    rows = [[end if after is None else numbers[after] for after in row] for row in rows]
    return _smallest(np.array([*rows, [end] * 256], np.int32))


def _smallest(table: np.ndarray) -> np.ndarray:
    """The automaton without states that no continuation tells apart (Moore 1956)."""
    kinds = np.zeros(len(table), np.int32)
    kinds[-1] = 1
    while True:
        _, first, finer = np.unique(
            np.column_stack([kinds, kinds[table]]), axis=0, return_index=True, return_inverse=True
        )
        if len(first) == kinds.max() + 1:
            break
        kinds = finer
    place = np.argsort(np.argsort(first))  # in the order of their first states: the start first, the end last
    return place[kinds][table[np.sort(first)]].astype(np.int32)


def of_strings(strings: Sequence[bytes]) -> np.ndarray:
    """Ends where the first of the strings is complete, wherever it began (Aho and Corasick 1975).

    A state is the longest end of the text that one of the strings begins with.

    Args:
        strings: at least one, none empty.
    """
    whole = set(strings)
    starts = sorted({string[:length] for string in whole for length in range(len(string))}, key=len)
    number = {start: place for place, start in enumerate(starts)}
    end = len(starts)
    following: dict[bytes, set[int]] = {start: set() for start in starts}
    for string in whole:
        for place, byte in enumerate(string):
            following[string[:place]].add(byte)
    table = np.zeros((end + 1, 256), np.int32)
    table[end] = end
    shorter = dict.fromkeys(starts, 0)  # the state of the same text without its first byte
    for start in starts:  # the short ones first: the row of what is shorter is there
        if len(start) > 1:
            shorter[start] = int(table[shorter[start[:-1]], start[-1]])
        row = table[shorter[start]].copy()
        for byte in following[start]:
            longer = start + bytes([byte])
            if row[byte] != end:  # else a string that lies inside of this one is complete here
                row[byte] = end if longer in whole else number[longer]
        table[number[start]] = row
    return table


def either(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ends where one of two automata does."""
    one, two = first.tolist(), second.tolist()
    ends = (len(one) - 1, len(two) - 1)

    def step(state: tuple[int, int], byte: int) -> tuple[int, int] | None:
        after = (one[state[0]][byte], two[state[1]][byte])
        return None if after[0] == ends[0] or after[1] == ends[1] else after

    return explore((0, 0), step)
