"""The preference pair: best against worst, and a reason where there is none."""

import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.judging.pairs import DROP_REASONS, Candidate, PairChoice, Rule, choose_pair


def candidates(*scores, cut=(), same=()):
    """One judgment each; None: it gave no score."""
    return [
        Candidate(
            index, () if score is None else (Fraction(score),), index not in cut,
            (0,) if index in same else (index,), "same" if index in same else f"text {index}",
        )
        for index, score in enumerate(scores)
    ]  # fmt: skip


def judged(*rows):
    """(scores, length in tokens) of candidates that ended by themselves."""
    return [
        Candidate(index, tuple(map(Fraction, scores)), True, (index,) * length, f"text {index}")
        for index, (scores, length) in enumerate(rows)
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


def test_one_text_in_two_spellings_of_tokens_makes_no_pair():
    pair = [Candidate(0, (Fraction(5),), True, (1, 2), "ab"), Candidate(1, (Fraction(3),), True, (3,), "ab")]
    assert choose_pair(pair) == "identical_text"


def test_thirds_are_compared_exactly():
    third = judged(((1, 1, 2), 1), ((2, 1, 1), 1))
    assert choose_pair(third) == "equal_scores"


def test_a_candidate_with_too_few_judgments_takes_no_part():
    given_ = judged(((5,), 1), ((4, 4), 1), ((3, 2), 1), ((0,), 1))
    assert choose_pair(given_) == PairChoice(0, 3)
    assert choose_pair(given_, Rule(min_judgments=2)) == PairChoice(1, 2)
    assert choose_pair(given_, Rule(min_judgments=3)) == "unscored"


def test_among_equal_means_the_less_disputed_one_may_be_taken():
    given_ = judged(((5, 3), 1), ((4, 4), 1), ((0, 2), 1), ((1, 1), 1))
    assert choose_pair(given_) == PairChoice(0, 2)
    assert choose_pair(given_, Rule(tie_break="variance")) == PairChoice(1, 3)


def test_length_control_takes_the_shortest_of_the_good_and_the_longest_of_the_bad():
    given_ = judged(((5,), 90), (("4.6",), 20), (("4.4",), 10), ((3,), 1), (("0.4",), 99), (("0.6",), 200), ((0,), 5))
    assert choose_pair(given_) == PairChoice(0, 6)
    assert choose_pair(given_, Rule(length_control=Fraction(1, 10))) == PairChoice(1, 4)  # 4.5 and 0.5 are the borders
    assert choose_pair(given_, Rule(length_control=Fraction(12, 100))) == PairChoice(2, 5)  # 4.4 and 0.6, included


def test_indices_must_differ_and_rules_must_make_sense():
    same = [Candidate(0, (Fraction(1),), True, (), ""), Candidate(0, (Fraction(2),), True, (), "a")]
    with pytest.raises(ValueError, match="repeat"):
        choose_pair(same)
    for rule in (Rule(min_judgments=0), Rule(tie_break="mood"), Rule(length_control=Fraction(1, 2))):
        with pytest.raises(ValueError, match="min_judgments at least 1"):
            choose_pair(same[:1], rule)


SCORES = st.lists(st.fractions(0, 5, max_denominator=3), max_size=3)
RULES = st.builds(
    Rule, st.integers(1, 3), st.sampled_from(["index", "variance"]), st.fractions(0, Fraction(4, 9), max_denominator=9)
)


@settings(deadline=None, max_examples=200, database=None)
@given(
    st.lists(st.tuples(SCORES, st.booleans(), st.lists(st.integers(0, 3), max_size=4))),
    RULES,
    st.randoms(use_true_random=False),
)
def test_what_always_holds(rows, rule, rng):
    given_ = [
        Candidate(index, tuple(scores), ended, tuple(tokens), f"{tokens}")
        for index, (scores, ended, tokens) in enumerate(rows)
    ]
    choice = choose_pair(given_, rule)
    shuffled = given_[:]
    rng.shuffle(shuffled)
    assert choose_pair(shuffled, rule) == choice
    if isinstance(choice, str):
        assert choice in DROP_REASONS
        return
    chosen, rejected = given_[choice.chosen], given_[choice.rejected]
    means = {c.index: statistics.mean(c.scores) for c in given_ if len(c.scores) >= rule.min_judgments}
    assert chosen.finished and chosen.text != rejected.text
    assert means[chosen.index] > means[rejected.index]
    best = max(mean for index, mean in means.items() if given_[index].finished)
    if not rule.length_control:
        assert means[chosen.index] == best and means[rejected.index] == min(means.values())
    if rule.tie_break == "variance" and not rule.length_control:
        rivals = [given_[i] for i, mean in means.items() if mean == best and given_[i].finished]
        assert statistics.pvariance(chosen.scores) == min(statistics.pvariance(c.scores) for c in rivals)
