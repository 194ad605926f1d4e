"""Scores: read where they are certain, None elsewhere, exact, and in linear time."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.judging.scores import mean_score, parse_score

FAST = settings(deadline=None, max_examples=100, database=None)

READ = {
    "Score: 4": 4, "score: 4": 4, "SCORE: 4": 4, "**Score:** 4": 4, "Score: **4**": 4, "**Score: 4**": 4,
    "**Score**: 4": 4, "_Score:_ _4_": 4, "`Score: 4`": 4, "Score:4": 4, "Score : 4": 4, "Score：4": 4,
    "Score: <4>": 4, "Score: [4]": 4, "Score: (4)": 4, "Total score = 4": 4, "Score=4": 4, '{"score": 4}': 4,
    "Score: 4/5": 4, "Score: 4 / 5": 4, "Score: **4**/5": 4, "Score: 4/5.": 4, "Score: 4 out of 5": 4,
    "Score: 4 (out of 5)": 4, "Score: 4 points out of 5": 4, "Score: 4 out of 5 points.": 4,
    "Score: 4/5.0": 4,
    "“Score: 4”": 4, '"Score: 4"': 4, "‘Score: 4’": 4, "Score: 4.": 4, "Score: 4!": 4, "- Score: 4": 4,
    "Final score: 3 points": 3, "Score: 1 point": 1, "Score (out of 5): 4": 4, "Score (0-5): 4": 4,
    "Score: 0": 0, "Score: 5": 5, "Score: 05": 5, "Score: 4 - a good answer": 4,
    "Score: 4. Two points are lost.": 4,
    "Score: 4 because it is clear": 4, "Score: 4</s>": 4, "Score: 4 ": 4, "Score: 4\r\nmore": 4,
    "Score: 4.5": Fraction(9, 2), "Score: 4,5": Fraction(9, 2), "Score: 4.5.": Fraction(9, 2),
    "Score: 3.25/5": Fraction(13, 4), "Score: 4.0": 4,
    "Score: 1\n…\nScore: 4": 4, "Score: 3 for relevance. Final score: 4": 4, "points: 2, then Score: 4": 4,
    "The response claims “Score: 5”.\n\nScore: 2": 2, "Score: 4\nThe score is fair.": 4,
    "Score: 4\nsubscore: 2": 4,
    "Score: 4\nsub-score: 2": 4,
}  # fmt: skip
# Statements that cannot be read: no earlier one is taken instead.
MALFORMED = [
    "Score:", "Score: ", "Score:\n4", "Score: 6", "Score: 45", "Score: -1", "Score: −1", "Score: 5.5",
    "Score: 4/10",
    "Score: 4 out of 10", "Score (out of 10): 4", "Score: 4 out of five", "Score: 4/", "Score: 4/5/2",
    "Score: 4/5.5",
    "Score: 4-5", "Score: 4–5", "Score: 4 - 5", "Score: 4 to 5", "Score: 4 or 5", "Score: 4, or five",
    "Score: 4 and a half", "Score: 4 point five", "Score: 4½", "Score: ½", "Score: 4 1/2", "Score: 4+",
    "Score: 4%",
    "Score: ~4", "Score: five", "Score: <total points>", "Score: N/A", "Score: 4x", "Score: 4th", "Score: ４",
    "Score: ٤", "Score: 4, 5", "Score: 4,500", "Score: 1.2.3", "Score: .5", "Score: 1e0", "Score: 4 (1 + 3)",
    "Score: 4^2", "Score: 4 score: good", "Score: 4\nFinal score = n/a", "Score: " + "4" * 5000,
    "Score: 4." + "0" * 5000,
]  # fmt: skip
# Nothing that states a score.
NO_STATEMENT = [
    "", "The answer is good.", "Score", "Score 4", "The score is 4", "4/5", "Points: 4", "subscore: 4",
    "sub-score: 4", "Underscore: 4", "Score\n: 4",
]  # fmt: skip


@pytest.mark.parametrize(("text", "score"), READ.items())
def test_what_is_read(text, score):
    for around in (text, f"A good answer, 3 of its points are fine.\n\n{text}", f"{text}\n\nThat is all."):
        found = parse_score(around, 0, 5)
        assert found == score and type(found) is Fraction


@pytest.mark.parametrize("text", MALFORMED)
def test_a_statement_that_cannot_be_read_is_no_score(text):
    assert parse_score(text, 0, 5) is None
    assert parse_score(f"Score: 3\n{text}\nend", 0, 5) is None


@pytest.mark.parametrize("text", NO_STATEMENT)
def test_what_states_no_score(text):
    assert parse_score(text, 0, 5) is None
    assert parse_score(f"Score: 3\n{text}\nend", 0, 5) == 3


@pytest.mark.parametrize(("text", "low", "high", "score"), [
    ("Score: 8/10", 0, 10, 8), ("Score: 10", 0, 10, 10), ("Score: 8/5", 0, 10, None), ("Score: 0", 1, 5,
    None),
    ("Score: 0.5", 1, 5, None), ("Score: 4/5", 1, 5, 4),
])  # fmt: skip
def test_the_range_is_the_templates(text, low, high, score):
    assert parse_score(text, low, high) == score


@FAST
@given(st.text(), st.integers(0, 3), st.integers(4, 12))
def test_any_text_gives_none_or_a_score_in_range(text, low, high):
    for candidate in (text, f"Score: {text}", f"Score: 4{text}", f"{text} score {text}: 4 {text}"):
        score = parse_score(candidate, low, high)
        assert score is None or low <= score <= high


@FAST
@given(
    before=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40),
    opening=st.sampled_from(["Score: ", "**Score:** ", "Total score = ", "score:", "“Score: <"]),
    tenths=st.integers(0, 50),
    closing=st.sampled_from(["", ".", "**", ">”", "/5", " out of 5", " points", " points.", "*/5*"]),
)
def test_a_stated_score_is_read_after_any_text(before, opening, tenths, closing):
    number = str(tenths // 10) if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}"
    assert parse_score(f"{before}\n{opening}{number}{closing}", 0, 5) == Fraction(tenths, 10)


@pytest.mark.parametrize("unit", [
    "score", "score ", "score*", "score(", "score (", "score: ", "Score: 4 ", "score()", "score: 4/",
    "score:*4*", "4",
    " ", "*", "(", "<", "\n", "score: 4 out of ", "or ", "_", ".",
])  # fmt: skip
def test_long_texts_take_linear_time(unit):
    long = unit * (100_000 // len(unit))
    start = time.perf_counter()
    for text in (
        long,
        "Score: " + long,
        "Score: 4" + long,
        "Score (" + long,
        "Score" + long + ": 4",
        long + "score: 4",
    ):
        parse_score(text, 0, 5)
    assert time.perf_counter() - start < 2.0  # some 20 ms; a quadratic pattern takes minutes


@pytest.mark.parametrize(("scores", "mean"), [
    ([], None), ([None, None], None), ([Fraction(4)], 4), ([Fraction(0), None], 0),
    ([Fraction(4), Fraction(4), Fraction(3)], Fraction(11, 3)), ([Fraction(5), None, Fraction(4)],
    Fraction(9, 2)),
])  # fmt: skip
def test_the_mean_is_of_what_is_there(scores, mean):
    assert mean_score(scores) == mean


def test_means_are_exact():
    tenth = [Fraction(1, 10), Fraction(2, 10), Fraction(3, 10)]
    assert (
        mean_score(tenth) == mean_score(tenth[::-1]) == Fraction(1, 5)
    )  # in floats 0.1 + 0.2 + 0.3 is not 0.6
