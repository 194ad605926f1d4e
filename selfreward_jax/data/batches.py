"""Token sequences, and their order as a function of (seed, step): resuming needs a step number only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import grain

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
        """It alone; a pair has two."""
        return (self,)


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
