"""Token rows to padded batches; the order is a function of (seed, step), so resuming needs a step number only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

# The position of padding; equal to `model.attention.NOWHERE` (a test holds them equal, so that data needs no jax).
NOWHERE = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """A token sequence whose tail is the target: `tokens[start:]` are predicted, end of turn included.

    Its targets count `weight` times in a weighted mean (paper A.4: the mixing weight of self-made examples).
    """

    tokens: tuple[int, ...]
    start: int
    weight: float = 1.0

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self,)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How rows are padded: to multiples, so that few shapes are compiled.

    Attributes:
        time: T is a multiple of this many tokens.
        targets: M is a multiple of this many tokens.
    """

    time: int = 64
    targets: int = 32


@dataclasses.dataclass(frozen=True)
class Rows:
    """Right-padded numpy arrays of B rows; see `training.logprobs.Batch` for the fields.

    Fields: tokens, positions `[B,T]` int32; at, targets `[B,M]` int32; weights `[B,M]` float32.
    """

    tokens: np.ndarray
    positions: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def pad_rows(rows: Sequence[Row], count: int, shape: Shape) -> Rows:
    """Pads to `count` rows (missing ones weigh 0) and to the next multiples of `shape`."""
    longest = max(len(row.tokens) for row in rows)
    most = max(len(row.tokens) - row.start for row in rows)
    time = -(-longest // shape.time) * shape.time
    width = -(-most // shape.targets) * shape.targets
    tokens = np.zeros((count, time), np.int32)
    positions = np.full((count, time), NOWHERE, np.int32)
    at = np.zeros((count, width), np.int32)
    targets = np.zeros((count, width), np.int32)
    weights = np.zeros((count, width), np.float32)
    for index, row in enumerate(rows):
        length, here = len(row.tokens), len(row.tokens) - row.start
        tokens[index, :length] = row.tokens
        positions[index, :length] = np.arange(length)
        at[index, :here] = np.arange(row.start - 1, length - 1)
        targets[index, :here] = row.tokens[row.start :]
        weights[index, :here] = row.weight
    positions[len(rows) :, 0] = 0  # a padding row sees its first token, so that its softmax is defined
    return Rows(tokens, positions, at, targets, weights)


def order(count: int, epochs: int, seed: int) -> Sequence[int]:
    """Random-access order of examples: `order(...)[i]` is the i-th example seen; each epoch is shuffled anew.

    Args:
        count: number of examples.
        epochs: how often each is seen.
    """
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)  # type: ignore[return-value]


def batch_indices(count: int, epochs: int, seed: int, batch: int, step: int) -> list[int]:
    """Examples of update `step`; the last batch of all may be short."""
    indices = order(count, epochs, seed)
    return [int(indices[i]) for i in range(step * batch, min((step + 1) * batch, len(indices)))]


def updates(count: int, epochs: int, batch: int) -> int:
    """Number of updates that see every example `epochs` times."""
    return -(-count * epochs // batch)


def microbatches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Splits a batch into microbatches of at most `size`, neighbours in length, so that little is padded.

    Args:
        lengths: tokens of each item of the batch.

    Returns:
        Lists of indices into the batch, longest first (the shape that needs most memory is compiled first).
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]
