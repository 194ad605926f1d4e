"""The preference pair: best against worst, and a reason where there is none."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.judging.pairs import DROP_REASONS, Candidate, PairChoice, choose_pair


def candidates(*scores, cut=(), same=()):
    return [
        Candidate(
            index,
            None if score is None else Fraction(score),
            index not in cut,
            (0,) if index in same else (index,),
        )
        for index, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        (candidates(3, 5, 1, 4), PairChoice(1, 2)),
        (candidates("11/3", "4", "7/2", "4"), PairChoice(1, 2)),  # ties at the top: the lowest index
        (candidates(1, 5, 1), PairChoice(1, 0)),  # and at the bottom
        (candidates(None, 5, None, 0), PairChoice(1, 3)),
        (candidates(5, 4, 0, cut=[0]), PairChoice(1, 2)),  # the best was cut off: the best that ended
        (candidates(5, 4, 0, cut=[2]), PairChoice(0, 2)),  # what was cut off can be rejected
        (candidates(5, 5, 0, cut=[0]), PairChoice(1, 2)),
        (candidates(), "unscored"),
        (candidates(4), "unscored"),
        (candidates(4, None, None), "unscored"),
        (candidates(4, 4, 4), "equal_scores"),
        (candidates(4, 4, None, cut=[0, 1]), "equal_scores"),
        (candidates(5, 3, cut=[0]), "no_finished_best"),
        (candidates(5, 3, 3, 4, cut=[0, 3]), "no_finished_best"),
        (candidates(5, 3, same=[0, 1]), "identical_text"),
    ],
)
def test_choices(given_, wanted):
    assert choose_pair(given_) == wanted


def test_thirds_are_compared_exactly():
    third = [Candidate(i, sum([Fraction(a, 3) for a in parts], Fraction(0)), True, (i,))
             for i, parts in enumerate([(1, 1, 2), (2, 1, 1)])]  # fmt: skip
    assert choose_pair(third) == "equal_scores"


def test_indices_must_differ():
    with pytest.raises(ValueError, match="repeat"):
        choose_pair([Candidate(0, Fraction(1), True, ()), Candidate(0, Fraction(2), True, ())])


@settings(deadline=None, max_examples=100, database=None)
@given(
    st.lists(st.tuples(st.none() | st.fractions(0, 5, max_denominator=3), st.booleans(), st.integers(0, 3))),
    st.randoms(use_true_random=False),
)
def test_what_always_holds(rows, rng):
    given_ = [Candidate(index, score, ended, (token,)) for index, (score, ended, token) in enumerate(rows)]
    choice = choose_pair(given_)
    shuffled = given_[:]
    rng.shuffle(shuffled)
    assert choose_pair(shuffled) == choice
    if isinstance(choice, str):
        assert choice in DROP_REASONS
        return
    chosen, rejected = given_[choice.chosen], given_[choice.rejected]
    scores = [candidate.score for candidate in given_ if candidate.score is not None]
    assert chosen.score is not None and rejected.score is not None
    assert chosen.finished and chosen.score > rejected.score == min(scores)
    assert chosen.token_ids != rejected.token_ids
    assert chosen.score == max(c.score for c in given_ if c.score is not None and c.finished)
