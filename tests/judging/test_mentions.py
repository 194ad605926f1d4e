"""Which mentions of a score are not the judge's own, told by hand."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.judging.mentions import denied_or_reported, described, quotations


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("X", "none"),
        ('"X"', "line"),
        ('1. "X".', "line"),
        ('"one, X, two"', "line"),
        ('it says "X"', "part"),
        ('"X" it says', "part"),
        ("l'un dit «X»", "part"),
        ("er sagt »X«", "part"),
        ("er sagt „X“", "part"),
        ("hon säger ”X”", "part"),
        ("il dit « X »", "part"),
        ('it says " X "', "part"),
        ("彼は「X」と", "part"),
        ('他说"X"吗', "part"),
        ("the `X` there", "part"),
        ("the ```X``` there", "part"),
        ("it's 'X' there", "part"),
        ('"a" X "b"', "none"),
        ('"a", X', "none"),
        ("“a” X “b”", "none"),
        ("the dogs' X, the cats' bowl", "none"),
        ("it's X, isn't it", "none"),
        ("a ` X", "none"),  # a backtick without its partner is a slip
        ("a 'b X", "none"),
        ('a "b, X', "part"),  # a quotation that goes on in the next line
        ('X" it ends', "part"),  # and one that began on an earlier one
        ('X"', "line"),
        ('"X', "line"),
        ("\"it says 'X' there\"", "part"),
        ("\"'X'\"", "line"),
        ('{"a": "b", X}', "none"),
        ('{"a":"b",X}', "none"),
        ('{"a": "says "X" twice"}', "part"),  # as a JSON string reads without its backslashes
        ('{"a": "", X}', "none"),
        ('5" wide, X', "none"),
        ('"X"</s>', "line"),
        ('"X" [/INST]', "line"),
    ],
)
def test_where_a_word_stands(line, kind):
    at = line.index("X")
    assert quotations(line, [(at, at + 1)]) == [kind]


def test_a_place_that_reaches_out_of_a_quotation_is_not_inside():
    line = 'so "score": 4'
    assert quotations(line, [(4, 9), (4, len(line))]) == ["part", "none"]


@given(st.text(alphabet="ab \"“”„'’«»`「」.,(", max_size=30))
def test_places_are_independent_of_each_other(line):
    places = [(at, at + 1) for at in range(len(line))]
    assert quotations(line, places) == [quotations(line, [place])[0] for place in places]
    assert set(quotations(line, places)) <= {"none", "line", "part"}


@pytest.mark.parametrize("unit", ['"', '" ', ' "', '"a', "“", "«", "'a ", "' ", "`", "` ", '"a" ', "<", "</a", "[a"])
def test_long_lines_take_linear_time(unit):
    line = unit * (100_000 // len(unit))
    start = time.process_time()
    quotations(line, [(at, at + 1) for at in range(0, len(line), 7)])
    assert time.process_time() - start < 4


@pytest.mark.parametrize("before", [
    "It is not a ", "It isn't ", "It is not **", "not ", "It does not deserve a final ", "I would not give it the full ",
    "rather than ", "Nothing here is far from a ", "It says ", "Its last line reads: ", "It ends with the line ",
    "It contains the words ", "It asks for a ",
])  # fmt: skip
def test_denials_and_reports(before):
    assert denied_or_reported(before)


@pytest.mark.parametrize("before", [
    "", "I give it ", "It is not good. ", "It is not good, ", "It is not good ", "Whether it is right or not: ", "nothing ",
    "It knows no bounds - ", "It does all that the user asks for: ", "It says so. ", "I end with ", "I cannot give more than ",
    "It is a knot ", "What it contains is right. ",
])  # fmt: skip
def test_words_that_deny_and_report_nothing(before):
    assert not denied_or_reported(before)


def test_descriptions():
    assert (
        described("It is a ", " answer.")
        and described("For another **", "** quality response")
        and described("A ", " reply")
    )
    assert (
        not described("It is ", " answer")
        and not described("It is a ", ", an answer")
        and not described("a ", " because")
    )
