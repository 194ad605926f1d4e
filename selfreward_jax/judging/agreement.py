"""Do a judge's scores agree with human ranks? To accept EFT data and to measure a judge (paper 3.1.1, 3.1.2).

Ranks: 0 is the best. A pair of responses counts when humans ranked them differently. A missing score (None)
is never in agreement.
"""

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import scipy.stats

FEWEST_CLUSTERS = 8  # below this a bootstrap over sets has too few distinct samples to mean anything
_CHUNK = 1 << 20  # draws held in memory at once


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """Pairs of differently ranked responses: `total`, of which the judge has `right` in the human order.

    `tied` got equal scores and `missing` lack a score; both are in `total` and count as not right.
    """

    right: int = 0
    tied: int = 0
    missing: int = 0
    total: int = 0

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(
            self.right + other.right,
            self.tied + other.tied,
            self.missing + other.missing,
            self.total + other.total,
        )

    @property
    def accuracy(self) -> float | None:
        """Pairwise accuracy (paper 3.1.2), or None where there is no pair."""
        return self.right / self.total if self.total else None


@dataclasses.dataclass(frozen=True)
class Thinned:
    """What `thin_most_common` kept.

    Attributes:
        kept: positions, ascending.
        before, after: the count of each score, lowest score first.
    """

    kept: tuple[int, ...]
    before: dict[Fraction | int, int]
    after: dict[Fraction | int, int]

    @property
    def share(self) -> float:
        """Of the score that is most common afterwards."""
        return max(self.after.values(), default=0) / max(1, len(self.kept))


def pairwise(scores: Sequence[Fraction | None], ranks: Sequence[int]) -> PairCounts:
    """The counts of one ranked set. Raises ValueError if there are not as many scores as ranks."""
    counts: Counter[str] = Counter()
    for (score_a, rank_a), (score_b, rank_b) in itertools.combinations(zip(scores, ranks, strict=True), 2):
        if rank_a == rank_b:
            continue
        better, worse = (score_a, score_b) if rank_a < rank_b else (score_b, score_a)
        counts["total"] += 1
        if better is None or worse is None:
            counts["missing"] += 1
        elif better == worse:
            counts["tied"] += 1
        elif better > worse:
            counts["right"] += 1
    return PairCounts(**counts)


def agrees(scores: Sequence[Fraction | None], ranks: Sequence[int], ties: str = "strict") -> bool:
    """Whether the ranking of the scores agrees with the human one, the test of EFT acceptance (paper 3.1.1).

    'strict': every better rank has the strictly higher score. 'lenient': equal scores are let pass, as long
    as no pair is the wrong way round and at least one is the right way (six scores cannot order nine
    replies). The paper does not say which. False if any score is missing or no two ranks differ. Raises
    ValueError if there are not as many scores as ranks, and for another value of `ties`.
    """
    if ties not in ("strict", "lenient"):
        raise ValueError(f"ties={ties!r}: must be 'strict' or 'lenient'")
    counts = pairwise(scores, ranks)
    if counts.right == 0 or any(score is None for score in scores):
        return False
    tied = counts.tied if ties == "lenient" else 0
    return counts.right + tied == counts.total


def interval(sets: Sequence[PairCounts], seed: int, n: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the pairwise accuracy over ranked sets.

    Pairs of one set share a prompt and responses, so whole sets are drawn again (cluster bootstrap, `n`
    samples, percentiles). With fewer than eight sets, or all pairs right, or all wrong, where resampling
    shows no spread, it is Wilson's interval over the pairs. (0, 1) if there is no pair.
    """
    used = [counts for counts in sets if counts.total]
    right = np.array([counts.right for counts in used], dtype=np.int64)
    total = np.array([counts.total for counts in used], dtype=np.int64)
    if not used:
        return 0.0, 1.0
    if len(used) < FEWEST_CLUSTERS or right.sum() in (0, total.sum()):
        wilson = scipy.stats.binomtest(int(right.sum()), int(total.sum())).proportion_ci(0.95, method="wilson")
        return float(wilson.low), float(wilson.high)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(used))
    samples = []
    for start in range(0, n, rows):
        drawn = rng.integers(len(used), size=(min(rows, n - start), len(used)))
        samples.append(right[drawn].sum(axis=1) / total[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(samples), (0.025, 0.975))
    return float(low), float(high)


def against_chance(sets: Sequence[PairCounts], seed: int) -> tuple[float, float, float]:
    """Accuracy with half a point for a tie or a missing score, and its 95 % interval: a guesser gets 50 % in this count.

    Where ties count as wrong, a judge that gives everything the same score lies far below 50 % and looks worse than
    one that guesses. Returns (accuracy, low, high); (0.5, 0, 1) with too few sets to say anything.
    """
    halves = [PairCounts(2 * some.right + some.tied + some.missing, 0, 0, 2 * some.total) for some in sets]
    if len(halves) < FEWEST_CLUSTERS:
        return 0.5, 0.0, 1.0
    accuracy = sum(halves, start=PairCounts()).accuracy
    return 0.5 if accuracy is None else accuracy, *interval(halves, seed)


def thin_most_common(scores: Sequence[Fraction | int], max_share: float, seed: int) -> Thinned:
    """Drops examples of the most common score at random until it has no more than `max_share` (paper 3.1.1).

    The paper discards "some of the data that receives the most common score", so that score alone is thinned, and not
    below the next most common: with few or lopsided scores the share can't be had at all, or only by dropping nearly
    everything (50, 45 and 5 examples hold to 0.4 as 10, 10 and 5). Of two that are equally common the higher is
    thinned, and is so already. Raises ValueError unless 0 < max_share <= 1.
    """
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share={max_share}: must be above 0 and at most 1")
    before = Counter(scores)
    kept = set(range(len(scores)))
    ranked = sorted(((count, score) for score, count in before.items()), reverse=True)
    (count, common), (second, _) = [*ranked, (0, 0), (0, 0)][:2]
    share = Fraction(str(max_share))  # as it is written: 0.3 as a float is a little less than 3/10
    others = len(scores) - count
    height = count if share == 1 else max(second, int(share * others / (1 - share)))
    if others and height < count:
        holders = [position for position, score in enumerate(scores) if score == common]
        kept -= set(holders) - set(random.Random(seed).sample(holders, height))
    after = Counter(scores[position] for position in kept)
    return Thinned(tuple(sorted(kept)), dict(sorted(before.items())), dict(sorted(after.items())))
