"""Agreement with human ranks: counts, acceptance, intervals and thinning."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.judging.agreement import PairCounts, against_chance, agrees, interval, pairwise, thin_most_common

FAST = settings(deadline=None, max_examples=100, database=None)


def scores(*values):
    return [None if value is None else Fraction(value) for value in values]


@pytest.mark.parametrize(
    ("given_", "ranks", "counts", "strict", "lenient"),
    [
        (scores(5, 3, 1), [0, 1, 2], PairCounts(3, 0, 0, 3), True, True),
        (
            scores(1, 5, 3),
            [2, 0, 1],
            PairCounts(3, 0, 0, 3),
            True,
            True,
        ),  # the order of the replies is no matter
        (scores(5, 3, 4), [0, 1, 2], PairCounts(2, 0, 0, 3), False, False),
        (scores(5, 4, 4), [0, 1, 2], PairCounts(2, 1, 0, 3), False, True),
        (scores(4, 4), [0, 1], PairCounts(0, 1, 0, 1), False, False),
        (scores(1, 5), [0, 1], PairCounts(0, 0, 0, 1), False, False),
        (scores(5, None, 1), [0, 1, 2], PairCounts(1, 0, 2, 3), False, False),
        (
            scores(5, 3, 4),
            [0, 1, 1],
            PairCounts(2, 0, 0, 2),
            True,
            True,
        ),  # humans saw no difference in the last two
        (scores(5, 5), [0, 0], PairCounts(), False, False),
        (scores(5), [0], PairCounts(), False, False),
        (scores(), [], PairCounts(), False, False),
    ],
)
def test_one_set(given_, ranks, counts, strict, lenient):
    assert pairwise(given_, ranks) == counts
    assert agrees(given_, ranks) is strict
    assert agrees(given_, ranks, ties="lenient") is lenient


def test_mistakes_of_the_caller():
    with pytest.raises(ValueError, match="zip"):
        pairwise(scores(1), [0, 1])
    with pytest.raises(ValueError, match="ties='loose'"):
        agrees(scores(2, 1), [0, 1], ties="loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_share=0"):
        thin_most_common([1], 0, 0)


@FAST
@given(st.lists(st.tuples(st.none() | st.integers(0, 5).map(Fraction), st.integers(0, 3)), max_size=6))
def test_counts_against_the_definition(rows):
    given_, ranks = [row[0] for row in rows], [row[1] for row in rows]
    pairs = [(a, b) for a, rank_a in rows for b, rank_b in rows if rank_a < rank_b]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    counts = pairwise(given_, ranks)
    assert counts.total == len(pairs) and counts.missing == len(pairs) - len(whole)
    assert counts.right == sum(a > b for a, b in whole) and counts.tied == sum(a == b for a, b in whole)
    assert agrees(given_, ranks) == (bool(pairs) and None not in given_ and all(a > b for a, b in whole))


def test_counts_add_and_divide():
    both = PairCounts(1, 0, 1, 3) + PairCounts(1, 1, 0, 1)
    assert both == PairCounts(2, 1, 1, 4) and both.accuracy == 0.5
    assert PairCounts().accuracy is None


def test_the_interval_of_many_sets():
    rng = np.random.default_rng(5)
    sets = [PairCounts(int(right), 0, 0, 3) for right in rng.binomial(3, 0.7, size=200)]
    low, high = interval(sets, seed=1)
    mean = sum(sets, PairCounts()).accuracy
    assert mean is not None and low < mean < high
    assert abs((high - low) - 2 * 1.96 * np.sqrt(0.7 * 0.3 / 600)) < 0.02  # independent pairs: the normal width
    assert interval(sets, seed=1) == (low, high)
    assert len({interval(sets, seed, n=50) for seed in range(5)}) > 1
    assert interval([*sets, PairCounts()], seed=1) == (low, high)  # a set without pairs says nothing


def test_whole_sets_are_drawn():
    # Six pairs of a set are all right or all wrong together: the evidence is that of 40 draws, not of 240.
    together = [PairCounts(6 * (n % 2), 0, 0, 6) for n in range(40)]
    apart = [PairCounts(3, 0, 0, 6) for _ in range(40)]
    assert interval(together, 0)[1] - interval(together, 0)[0] > 0.25
    assert interval(apart, 0) == (0.5, 0.5)


@pytest.mark.parametrize(
    "sets", [[PairCounts(2, 0, 0, 3)] * 7, [PairCounts(3, 0, 0, 3)] * 30, [PairCounts(0, 3, 0, 3)] * 9]
)
def test_where_wilson_stands_in(sets):
    pooled = sum(sets, PairCounts())
    wilson = scipy.stats.binomtest(pooled.right, pooled.total).proportion_ci(method="wilson")
    assert interval(sets, 0) == pytest.approx((wilson.low, wilson.high))
    assert interval(sets, 0)[0] < interval(sets, 0)[1]


def test_no_pairs_no_knowledge():
    assert interval([], 0) == interval([PairCounts()], 0) == (0.0, 1.0)


def test_thinning():
    given_ = [4] * 80 + [3] * 15 + [5] * 5
    thin = thin_most_common(given_, 0.5, 0)
    assert thin.before == {3: 15, 4: 80, 5: 5} and thin.after == {3: 15, 4: 20, 5: 5}
    assert thin.kept[-20:] == tuple(range(80, 100)) and thin.kept != tuple(range(60, 100))
    assert thin_most_common(given_, 0.5, 0) == thin and thin_most_common(given_, 0.5, 1) != thin
    assert thin_most_common(given_, 0.8, 0).kept == tuple(range(100))  # already at the share
    assert thin_most_common(given_, 1.0, 0).kept == tuple(range(100))
    assert thin_most_common([], 0.5, 0).kept == ()


def test_the_most_common_score_is_not_thinned_below_the_next():
    given_ = [4] * 50 + [3] * 45 + [1] * 5
    thin = thin_most_common(given_, 0.4, 0)  # to hold 3 to 40 % as well would leave 25 of 100
    assert thin.after == {1: 5, 3: 45, 4: 45} and thin.share == 45 / 95
    assert thin_most_common(given_, 0.4, 0) == thin and thin_most_common(given_, 0.4, 1).kept != thin.kept
    assert thin_most_common(given_, 0.5, 0).after == {1: 5, 3: 45, 4: 50}
    assert thin_most_common([4] * 9, 0.5, 0).after == {4: 9}  # nothing to set against it
    assert thin_most_common([4] * 3 + [3] * 3, 0.1, 0).after == {3: 3, 4: 3}


@FAST
@given(st.lists(st.integers(0, 3), max_size=14), st.integers(1, 10), st.integers(0, 3))
def test_only_the_most_common_is_thinned_and_no_more_than_needed(given_, tenths, seed):
    thin = thin_most_common(given_, tenths / 10, seed)
    assert Counter(given_[position] for position in thin.kept) == thin.after
    assert list(thin.kept) == sorted(set(thin.kept)) and thin.before == Counter(given_)
    changed = [score for score in thin.before if thin.after.get(score, 0) != thin.before[score]]
    assert len(changed) <= 1
    for score in changed:
        count, others = thin.after[score], [thin.before[other] for other in thin.before if other != score]
        assert thin.before[score] > max(others) and count >= max(others)
        assert count == max(others) or Fraction(count, count + sum(others)) <= Fraction(tenths, 10)
        more = count + 1
        assert count == max(others) or Fraction(more, more + sum(others)) > Fraction(tenths, 10)
    if not changed and len(thin.before) > 1:
        top = sorted(thin.before.values())
        assert top[-1] == top[-2] or Fraction(top[-1], len(given_)) <= Fraction(tenths, 10)


def test_a_judge_that_gives_all_the_same_score_is_at_chance() -> None:
    lazy = [PairCounts(right=0, tied=3, missing=0, total=3)] * 10
    assert against_chance(lazy, seed=0) == (0.5, 0.5, 0.5)
    assert interval(lazy, seed=0)[1] < 0.5  # counted as wrong it looks worse than a guess
    good = [PairCounts(right=3, total=3)] * 9 + [PairCounts(right=1, tied=1, missing=1, total=3)]
    accuracy, low, high = against_chance(good, seed=0)
    assert accuracy == pytest.approx((27 + 1 + 1) / 30)
    assert 0.5 < low <= accuracy <= high <= 1.0


def test_too_few_sets_say_nothing_about_chance() -> None:
    assert against_chance([PairCounts(right=3, total=3)] * 3, seed=0) == (0.5, 0.0, 1.0)
    assert against_chance([PairCounts()] * 10, seed=0) == (0.5, 0.0, 1.0)
