"""Sequences packed into fixed rows as prefix trees: what the sequences of a row have in common at their start lies there once.

The prompt of a chosen and a rejected response, the rubric that judge prompts begin with: a transformer computes the
same for it each time, so a row holds it once and the sequences branch off behind it. The sequences of a row are
written in the order of their tokens, so that the places which see a token (itself and all that follows it in any of
its sequences) are one range: from its own to before `ends` of it. That range is the whole mask; a row without common
prefixes is the special case whose ranges are its sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from selfreward_jax.data.batches import NOWHERE, Row

Group = Sequence[Row]  # sequences that lie in one row: an example, or a pair's chosen and rejected response

_CANDIDATES, _LOOKED_AT = 24, 32  # row lengths that are compared, and updates that they are compared on


@dataclasses.dataclass(frozen=True)
class Shape:
    """The rows of a stage.

    Attributes:
        time: tokens of its longest rows. Those of each quarter of it exist too, for what is left of an update.
        rows: B, rows of a microbatch: those of all devices that compute different ones.
        pad: row lengths are multiples of it.
        shared: whether common prefixes lie in a row once. Without, its sequences follow each other whole, as kernels
            need it that know segments only.
    """

    time: int
    rows: int
    pad: int
    shared: bool

    @property
    def times(self) -> tuple[int, ...]:
        """All row lengths, ascending."""
        return tuple(sorted({_up(-(-self.time * part // 4), self.pad) for part in (1, 2, 3, 4)}))


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows of one length.

    Attributes:
        time: T.
        rows: for each the indices of its groups; at most `Shape.rows`.
        tokens: that they hold, the common ones counted once.
        seen: keys that these see, summed: what attention has to compute.
    """

    time: int
    rows: list[list[int]]
    tokens: int
    seen: int

    @property
    def members(self) -> list[int]:
        """Its groups, in the order in which their sequences are numbered."""
        return [index for some in self.rows for index in some]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numpy arrays of B packed rows; see `training.logprobs.Batch` for the fields.

    Fields: tokens, positions, ends `[B,T]` int32; at, targets, sequences `[B,M]` int32; weights `[B,M]` float32.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    sequences: np.ndarray


def microbatches(groups: Sequence[Group], shape: Shape) -> list[Microbatch]:
    """Packs the groups of an update into rows, longest rows first.

    Raises:
        ValueError: if a group is longer than `shape.time`.
    """
    found = _packed(_measure(groups, shape.shared), shape)
    if found is None:
        raise ValueError(f"a group of sequences does not fit a row of {shape.time} tokens")
    return found


def wasted(parts: Sequence[Microbatch], shape: Shape) -> float:
    """The share of computed positions that hold no token."""
    return 1 - sum(part.tokens for part in parts) / sum(shape.rows * part.time for part in parts)


def choose_time(updates: Sequence[Sequence[Group]], shape: Shape, limit: int, quadratic: float) -> int:
    """The row length (`Shape.time`) with which the updates of a stage cost least.

    Args:
        updates: the groups of each update.
        shape: all but its `time`.
        limit: longest rows that are allowed; those that the longest group needs are taken anyway.
        quadratic: what attention adds to a token's cost for each token of its row, as a share of all else.
    """
    sizes = [_measure(groups, shape.shared) for groups in updates]
    least = _up(max(max(one.alone) for one in sizes), shape.pad)
    most = max(least, limit // shape.pad * shape.pad)
    steps = (most - least) // shape.pad
    candidates = sorted({least + shape.pad * (steps * i // _CANDIDATES) for i in range(_CANDIDATES + 1)})
    some = [sizes[len(sizes) * i // _LOOKED_AT] for i in range(_LOOKED_AT)] if len(sizes) > _LOOKED_AT else sizes

    def cost(time: int) -> float:
        tried = dataclasses.replace(shape, time=time)
        parts = [part for one in some for part in _packed(one, tried) or ()]
        return sum(shape.rows * part.time * (1 + quadratic * part.time) for part in parts)

    return min(candidates, key=cost)


def lay(groups: Sequence[Group], part: Microbatch, shape: Shape) -> Rows:
    """The arrays of a microbatch; its sequences are numbered group by group, in the order of its rows.

    M is T, or a multiple of it where sequences share so much that a row has more targets than tokens.
    Rows that only fill the batch are empty. Padding is seen by itself alone, so that its softmax is defined.
    """
    rows = [[row for index in members for row in groups[index]] for members in part.rows]
    count, time = shape.rows, part.time
    width = _up(max(sum(len(row.tokens) - row.start for row in some) for some in rows), time)
    tokens = np.zeros((count, time), np.int32)
    positions = np.full((count, time), NOWHERE, np.int32)
    ends = np.broadcast_to(np.arange(1, time + 1, dtype=np.int32), (count, time)).copy()
    at, targets, sequences = (np.zeros((count, width), np.int32) for _ in range(3))
    weights = np.zeros((count, width), np.float32)
    first = 0
    for place, some in enumerate(rows):
        paths, used = _paths(some, shape.shared)
        for path, row in zip(paths, some, strict=True):
            tokens[place, path] = row.tokens
            positions[place, path] = np.arange(len(path))
        for path in sorted(paths, key=lambda path: int(path[-1])):  # a common token ends with its last sequence
            ends[place, path] = path[-1] + 1
        filled = 0
        for number, (path, row) in enumerate(zip(paths, some, strict=True), first):
            here = slice(filled, filled + len(path) - row.start)
            at[place, here] = path[row.start - 1 : -1]
            targets[place, here] = row.tokens[row.start :]
            weights[place, here] = row.weight
            sequences[place, here] = number
            filled = here.stop
        first += len(some)
        assert used <= time, (used, time)
    return Rows(tokens, positions, ends, at, targets, weights, sequences)


def _paths(rows: Sequence[Row], shared: bool) -> tuple[list[np.ndarray], int]:
    """The places of each sequence's tokens in their row, and how many are used."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens) if shared else range(len(rows))
    paths: dict[int, np.ndarray] = {}
    before, used = -1, 0
    for index in order:
        ids = rows[index].tokens
        same = _common(rows[before].tokens, ids) if shared and before >= 0 else 0
        new = np.arange(used, used + len(ids) - same)
        paths[index] = np.concatenate([paths[before][:same], new]) if same else new
        before, used = index, used + len(new)
    return [paths[index] for index in range(len(rows))], used


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Groups as indices into all their sequences; of those the lengths and how much each two have in common `[n,n]`;
    and how many tokens each group takes in a row of its own."""

    members: list[range]
    lengths: list[int]
    common: np.ndarray
    alone: list[int]


def _measure(groups: Sequence[Group], shared: bool) -> _Sizes:
    sequences = [row.tokens for group in groups for row in group]
    starts = np.cumsum([0, *(len(group) for group in groups)]).tolist()
    members = [range(*ends) for ends in itertools.pairwise(starts)]
    common = _all_common(sequences) if shared else np.zeros((len(sequences),) * 2, np.int32)
    sizes = _Sizes(members, [len(ids) for ids in sequences], common, [])
    return dataclasses.replace(sizes, alone=[_added(sizes, (), i)[0] for i in range(len(groups))])


def _added(sizes: _Sizes, there: Sequence[int], group: int) -> tuple[int, int]:
    """Tokens that a group adds to a row with these sequences, and the keys that they see."""
    known, tokens, seen = list(there), 0, 0
    for index in sizes.members[group]:
        length = sizes.lengths[index]
        common = max((int(sizes.common[index, other]) for other in known), default=0)
        tokens += length - common
        seen += (length * (length + 1) - common * (common + 1)) // 2
        known.append(index)
    return tokens, seen


def _packed(sizes: _Sizes, shape: Shape) -> list[Microbatch] | None:
    """The packing that computes the fewest positions, of those into rows of each length; None if nothing fits."""
    best: list[Microbatch] | None = None
    for time in reversed(shape.times):
        rows = _into_rows(sizes, time)
        if rows is None:
            break
        parts = []
        for start in range(0, len(rows), shape.rows):  # longest first
            some = rows[start : start + shape.rows]
            shortest = min(length for length in shape.times if length >= some[0][1])
            tokens, seen = sum(used for _, used, _ in some), sum(seen for _, _, seen in some)
            parts.append(Microbatch(shortest, [members for members, _, _ in some], tokens, seen))
        if best is None or sum(part.time for part in parts) < sum(part.time for part in best):
            best = parts
    return best


def _into_rows(sizes: _Sizes, time: int) -> list[tuple[list[int], int, int]] | None:
    """Rows of at most `time` tokens as (groups, tokens, keys that they see): each group where most of it is there already, longest first."""
    if max(sizes.alone) > time:
        return None
    rows: list[tuple[list[int], list[int], int, int]] = []
    for group in sorted(range(len(sizes.alone)), key=lambda i: (-sizes.alone[i], i)):
        options = []
        for place, (_, sequences, used, _) in enumerate(rows):
            more, _ = _added(sizes, sequences, group)
            if used + more <= time:
                options.append((more, time - used - more, place))
        if options:
            place = min(options)[2]
            groups, sequences, used, seen = rows[place]
        else:
            place, (groups, sequences, used, seen) = len(rows), ([], [], 0, 0)
            rows.append((groups, sequences, used, seen))
        more, new = _added(sizes, sequences, group)
        rows[place] = ([*groups, group], [*sequences, *sizes.members[group]], used + more, seen + new)
    return [(groups, used, seen) for groups, _, used, seen in sorted(rows, key=lambda row: -row[2])]


def _all_common(sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`[n,n]` lengths of common prefixes: in the order of the tokens, the least of those between neighbours."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    out = np.zeros((len(sequences),) * 2, np.int32)
    for place, one in enumerate(order):
        least = len(sequences[one])
        out[one, one] = least
        for before, other in zip(order[place:], order[place + 1 :]):
            if least:
                least = min(least, _common(sequences[before], sequences[other]))
            out[one, other] = out[other, one] = least
    return out


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    least = min(len(one), len(other))
    if one[:least] == other[:least]:
        return least
    first, second = np.asarray(one[:least]), np.asarray(other[:least])
    return int(np.argmax(first != second))


def _up(value: int, multiple: int) -> int:
    return value + -value % multiple
