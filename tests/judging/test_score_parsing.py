"""Scores: a corpus of written judgments, properties that hold for any text, and linear time.

The expectations of `score_corpus.jsonl` were decided by hand from the rules in the docstring of scores.py.
"""

import json
import pathlib
import time
import unicodedata
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfreward_jax.judging.scores import REASONS, Reading, mean_score, read_score

FAST = settings(deadline=None, max_examples=200, database=None)
CORPUS = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "score_corpus.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
]
# Texts made of what statements are made of, and of anything.
PIECES = [
    "Score", "score", "Total score", ":", "=", " - ", "|", " ", "\n", "**", "<", ">", "(", ")", "/", "/5", "/10",
    " out of ", "4", "5", "3", "0", ".", ",", "-", "+", "%", " points", " or ", " because ", "<br>", "</b>", "five",
    "<total points>", "Reason for the ", "Score: 4", "Score: 3\n", "Score (0-5): ", "：", "４", "½", "\r", "\u2028",
    '"', "“", "”", "'", "`", "«", "not a ", "It says ", " answer",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
QUOTES = [
    ('"', '"'), ("“", "”"), ("„", "“"), ("”", "”"), ("'", "'"), ("‘", "’"), ("«", "»"), ("« ", " »"), ("`", "`"), ("「", "」"),
]  # fmt: skip
APOSTROPHES = [
    "the users’", "isn't", "it’s", "users' ", "don’t,", "the boss'", "rock’n’roll", "a", "good.", "(can't)", "James’s",
]  # fmt: skip
PROSE = st.text(max_size=40).filter(
    lambda text: "score" not in unicodedata.normalize("NFKC", text).casefold() and not any(map(str.isnumeric, text))
)
TENTHS = st.integers(0, 50).map(lambda tenths: Fraction(tenths, 10))


def decimal(score: Fraction, comma: bool = False) -> str:
    text = str(score) if score.denominator == 1 else str(float(score))
    return text.replace(".", ",") if comma else text


@pytest.mark.parametrize("case", CORPUS, ids=[f"line{number}" for number in range(1, len(CORPUS) + 1)])
def test_corpus(case):
    reading = read_score(case["text"], case["low"], case["high"], case["finished"])
    assert reading == Reading(None if case["score"] is None else Fraction(case["score"]), case["reason"])
    assert reading.score is None or type(reading.score) is Fraction


@FAST
@given(
    marks=st.sampled_from(QUOTES),
    score=TENTHS,
    words=st.sampled_from(["The response has {} in it.", "{} is its claim, not mine.", "Its {}", "{}, it has", "**It has {}**"]),
    inside=st.sampled_from(["Score: {}", "**Score: {}**", "Good. Final score: {}/5", "Score - {}", "Score: {} points."]),
)  # fmt: skip
def test_a_quoted_statement_is_another_s(marks, score, words, inside):
    line = words.format(marks[0] + inside.format(decimal(score)) + marks[1])
    assert read_score(line, 0, 5) == Reading(None, "no_statement")
    for text in (f"Score: 2\n\nPoor.\n{line}", f"Score: 2\n{line}", f"{line}\nScore: 2"):
        assert read_score(text, 0, 5) == Reading(Fraction(2), None), text


@FAST
@given(
    marks=st.sampled_from(QUOTES),
    score=TENTHS,
    around=st.sampled_from(["{}", "- {}", "2. {}.", "**{}**", "> {}", "{}</s>", "({})", "| {} |"]),
)
def test_a_line_that_is_all_quotation_is_the_judge_s(marks, score, around):
    line = around.format(f"{marks[0]}Score: {decimal(score)}{marks[1]}")
    assert read_score(f"Good.\n\n{line}", 0, 5) == Reading(score, None)
    assert read_score(f"Good.\n\n{line}", 0, 5, finished=False) == Reading(None, "cut_off")
    assert read_score(f"Good.\n\n{line}\n", 0, 5, finished=False) == Reading(score, None)


@FAST
@given(st.lists(st.sampled_from(APOSTROPHES), max_size=8).map(" ".join), TENTHS)
def test_apostrophes_are_no_quotation_marks(prose, score):
    for text in (f"{prose} clear. Score: {decimal(score)}", f"Score: {decimal(score)}. Well, {prose} clear."):
        assert read_score(text, 0, 5) == Reading(score, None)


def test_the_corpus_is_what_it_should_be():
    assert len({(c["text"], c["low"], c["high"], c["finished"]) for c in CORPUS}) == len(CORPUS) >= 240
    assert all(set(case) == {"text", "low", "high", "finished", "score", "reason"} for case in CORPUS)
    assert all((case["score"] is None) != (case["reason"] is None) for case in CORPUS)
    counts = Counter(case["reason"] for case in CORPUS)
    assert set(counts) == {None, *REASONS} and min(counts.values()) >= 10
    assert Counter((case["low"], case["high"]) for case in CORPUS)[1, 5] >= 20
    assert sum(not case["finished"] for case in CORPUS) >= 40


def test_a_statement_that_is_cut_anywhere_gives_its_own_score_or_none():
    cases = [case for case in CORPUS if case["reason"] in (None, "other_scale", "out_of_range")]
    cases = [case for case in cases if case["text"].casefold().count("score") == 1 and len(case["text"]) < 120]
    assert len(cases) > 200
    cases += [case for case in CORPUS if case["reason"] == "no_statement"]
    for case in cases:
        whole = None if case["score"] is None else Fraction(case["score"])
        for end in range(len(case["text"])):
            reading = read_score(case["text"][:end], case["low"], case["high"], finished=False)
            assert reading.score in (None, whole), case["text"][:end]


@FAST
@given(TEXTS, st.integers(0, 3), st.integers(4, 12), st.booleans())
def test_any_text_gives_a_score_in_range_or_a_reason(text, low, high, finished):
    for candidate in (text, f"Score: {text}", f"Score: 4{text}", f"{text} score {text}: 4 {text}"):
        reading = read_score(candidate, low, high, finished)
        assert (reading.score is None) != (reading.reason is None)
        assert reading.score is None or low <= reading.score <= high
        assert reading.reason is None or reading.reason in REASONS


@FAST
@given(
    before=PROSE,
    opening=st.sampled_from(
        ["Score: ", "**Score:** ", "Total score = ", "score:", "“Score: ", "> Score : ", "Score (out of 5): ", "Score："]
    ),
    score=TENTHS,
    comma=st.booleans(),
    marks=st.sampled_from([("", ""), ("**", "**"), ("<", ">"), ("[", "]"), ("`", "`"), ("$\\boxed{", "}$"), ("<b>", "</b>")]),
    closing=st.sampled_from(["", ".", "”", "/5", " / 5", " out of 5", " points", " points.", "/5.0 points", " (good)"]),
    after=PROSE,
)  # fmt: skip
def test_a_stated_score_is_read(before, opening, score, comma, marks, closing, after):
    text = f"{before}\n{opening}{marks[0]}{decimal(score, comma)}{marks[1]}{closing}\n{after}"
    assert read_score(text, 0, 5) == read_score(text + "\n", 0, 5, finished=False) == Reading(score, None)


@FAST
@given(TEXTS, PROSE)
def test_prose_behind_a_finished_judgment_changes_nothing(text, prose):
    assert read_score(f"{text}\n{prose}", 0, 5) == read_score(text, 0, 5)


@FAST
@given(TEXTS, TEXTS, st.booleans())
def test_what_states_nothing_changes_nothing_in_front(before, text, finished):
    assume(read_score(before, 0, 5).reason == "no_statement")
    assert read_score(f"{before}\n{text}", 0, 5, finished) == read_score(text, 0, 5, finished)


@FAST
@given(TEXTS)
def test_the_length_limit_only_takes_scores_away(text):
    finished, cut = read_score(text, 0, 5), read_score(text, 0, 5, finished=False)
    assert cut in (finished, Reading(None, "cut_off"))
    if finished.reason == "no_statement":
        assert cut.reason == "cut_off"
    else:  # the line is complete and is not the last one
        assert read_score(text + "\nend", 0, 5, finished=False) == read_score(text + "\nend", 0, 5)


@FAST
@given(st.lists(TENTHS, min_size=1, max_size=4), st.sampled_from(["\n", "\n\n", "\n---\n", " ", "; "]))
def test_final_statements_must_agree(scores, between):
    text = between.join(f"Score: {decimal(score)}" for score in scores)
    wanted = Reading(scores[0], None) if len(set(scores)) == 1 else Reading(None, "contradicting")
    assert read_score(f"Good.\n\n{text}", 0, 5) == wanted
    assert read_score(f"{text}\nAll things considered:\nScore: 2", 0, 5) == Reading(Fraction(2), None)


@FAST
@given(TENTHS, st.sampled_from(["-", "–", " - ", " or ", " to ", ", ", "+", " + ", "*", " (", "|", " and "]), TENTHS)
def test_two_numbers_are_no_score(first, between, second):
    assert read_score(f"Score: {decimal(first)}{between}{decimal(second)}.", 0, 5) == Reading(None, "ambiguous")


@FAST
@given(st.integers(0, 10**60), st.integers(0, 5), st.integers(6, 100))
def test_integers_against_the_range(number, low, high):
    wanted = Reading(Fraction(number), None) if low <= number <= high else Reading(None, "out_of_range")
    assert read_score(f"Score: {number}", low, high) == wanted


@pytest.mark.parametrize("unit", [
    "score", "score ", "score*", "score(", "score (", "score [", "score: ", "Score: 4 ", "score()", "score: 4/",
    "score|", "score |", "score -", "the ", "the score ", "score is ", "score out of ", "score/1", "for the ", "reason ",
    "score:*4*", "4", "4.", "4,", ".4", "1 point", " of", "out of a ", "on a scale ", "on a 5", "of a possible ",
    " ", "*", "(", "<", "<b ", "<b>", "</", "<br", "<br ", "\\", "\\(", "\\text", "|", "| ", "\n", "Score:\n", "4\n",
    "Score: 4\n", "score:\n4\n", "score: 4 out of ", "or ", "_", ".", "-", "- ", "：", "４", "½", "分", "word ",
    '"', '" ', ' "', '"a ', "“", "'a ", "' ", "`", "` ", "«", '"score: 4" ', 'it says "score: 4" ', '"score: 4 ', "`score: 4",
    "not a score: 4 ", "not it ", "not a score: 4 answer ", "says ", "a score: 4 ", "'score: 4' a",
])  # fmt: skip
def test_long_texts_take_linear_time(unit):
    long = unit * (30_000 // len(unit))
    start = time.process_time()
    for text in (
        long,
        "Score: " + long,
        "Score: 4" + long,
        "Score: 4 out of 5" + long,
        "Score (" + long,
        "Score" + long + ": 4",
        "Score" + long + "x",
        "Score: 4" + long + "x",
        "Score:\n" + long + "x",
        long + "score: 4",
    ):
        read_score(text, 0, 5, finished=False)
    assert time.process_time() - start < 4  # well below one; a quadratic pattern takes many


@pytest.mark.parametrize(("scores", "mean"), [
    ([], None), ([None, None], None), ([Fraction(4)], 4), ([Fraction(0), None], 0),
    ([Fraction(4), Fraction(4), Fraction(3)], Fraction(11, 3)), ([Fraction(5), None, Fraction(4)], Fraction(9, 2)),
])  # fmt: skip
def test_the_mean_is_of_what_is_there(scores, mean):
    assert mean_score(scores) == mean


def test_means_are_exact():
    tenth = [Fraction(1, 10), Fraction(2, 10), Fraction(3, 10)]
    assert mean_score(tenth) == mean_score(tenth[::-1]) == Fraction(1, 5)  # in floats 0.1 + 0.2 + 0.3 is not 0.6
