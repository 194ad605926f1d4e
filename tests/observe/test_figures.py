"""How figures are said: numbers, bins, spreads and the summaries of each kind of row, counted by hand."""

import io
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from selfreward_jax.data.records import Example, Judgment, Pair, Prompt, RankedSet, Response, to_json
from selfreward_jax.observe import figures
from selfreward_jax.observe.artifacts import Size
from selfreward_jax.observe.figures import Line

# Scores of the two candidates of three prompts, two judgments each; None is a judgment without a score.
SCORES = {"a": (("4", "4"), ("1", "2")), "b": (("3", "3"), ("3", "3")), "c": ((None, "2"), ("5", "0"))}


def items(count):
    return Size(count, "items")


def judgment(prompt, index, sample, score):
    reason = "cut_off" if score is None else None
    return {
        "prompt_id": prompt, "response_index": index, "sample": sample, "text": f"Fine.\nScore: {score}",
        "token_ids": items(2), "finish_reason": "stop", "score": score, "reason": reason, "expected": None,
    }  # fmt: skip


def judgments(scores):
    return [
        judgment(key, index, sample, score)
        for key, candidates in scores.items()
        for index, some in enumerate(candidates)
        for sample, score in enumerate(some)
    ]


def said(rows):
    return [" " * line.indent + line.text for line in figures.kind(rows[0]).summary(rows)]


def bar(marks):
    return "█" * marks


def test_judgments_are_counted_as_by_hand():
    assert said(judgments(SCORES)) == [
        "  11 of 12 judgments gave a score (91.7%)",
        "  score",
        f"    0       1   9.1% {bar(8)}",
        f"    1       1   9.1% {bar(8)}",
        f"    2       2  18.2% {bar(15)}",
        f"    3       4  36.4% {bar(30)}",
        f"    4       2  18.2% {bar(15)}",
        f"    5       1   9.1% {bar(8)}",
        "  no score, because",
        f"    cut_off       1 100.0% {bar(30)}",
        "  K agreement: all scores are equal for 3 of 5 candidates (60.0%)",
        "  mean score of a candidate",
        f"    1.50-2.00       1  16.7% {bar(15)}",
        f"    2.00-2.50       1  16.7% {bar(15)}",
        f"    2.50-3.00       1  16.7% {bar(15)}",
        f"    3.00-3.50       2  33.3% {bar(30)}",
        "    3.50-4.00       0   0.0% ",
        f"    4.00-4.50       1  16.7% {bar(15)}",
        "  ties: equal means for 1 of 3 couples of candidates (33.3%); of all candidates in 1 of 3 prompts",
        "  finish_reason: stop 12 (100.0%)",
        "  tokens: min 2  median 2  mean 2  max 2",
        "  text, characters: min 14  median 14  mean 14.25  max 17  |█      ▁|",
    ]


def test_expected_scores_make_the_means_and_stated_ones_the_histogram():
    rows = judgments({"a": (("4", "4"), ("4", "4"))})
    for row, expected in zip(rows, ("3.5", "4.25", "1.5", None), strict=True):
        row["expected"] = expected
    lines = said(rows)
    assert lines[1:3] == ["  score", f"    4       4 100.0% {bar(30)}"]
    at = lines.index("  mean score of a candidate")  # 3.875 and (1.5 + 4) / 2
    counted = [line.split()[:2] for line in lines[at + 1 : at + 5]]
    assert counted == [["2.50-3.00", "1"], ["3.00-3.50", "0"], ["3.50-4.00", "1"], ["ties:", "equal"]]
    assert [figures.worth(row) for row in rows] == [Fraction(7, 2), Fraction(17, 4), Fraction(3, 2), Fraction(4)]


def test_scores_that_are_not_whole_are_listed_each():
    lines = said(judgments({"a": (("4", "1", "2"),), "b": (("3", "7/2", "1/3"),)}))
    at = lines.index("  score")
    assert [line.split()[0] for line in lines[at + 1 : at + 7]] == ["0.3333", "1", "2", "3", "3.5", "4"]


def test_a_judgment_whose_score_is_no_number_has_none():
    rows = judgments({"a": ((None, "not a number", "3"),)})
    del rows[1]["reason"]  # as an older version wrote it
    lines = said(rows)
    assert lines[0] == "  1 of 3 judgments gave a score (33.3%)"
    at = lines.index("  no score, because")
    assert [line.split()[:-2] for line in lines[at + 1 : at + 3]] == [["cut_off", "1"], ["not", "recorded", "1"]]


def test_candidates_are_known_apart_by_their_prompt_too():
    lines = said(judgments({"a": (("4", "4"),), "b": (("1", "1"),)}))
    assert "  K agreement: all scores are equal for 2 of 2 candidates (100.0%)" in lines
    assert not [line for line in lines if line.startswith("  ties")]  # one candidate a prompt


def test_chosen_and_rejected_are_compared():
    row = {"prompt": "?", "chosen": "x" * 14, "chosen_score": "4", "rejected_score": "3/2"}
    rows = [
        row | {"rejected": Size(22, "characters"), "chosen_ids": items(3), "rejected_ids": items(4)},
        row | {"rejected": "x" * 9, "chosen_ids": items(4), "rejected_ids": items(2)}
        | {"chosen_score": "5/2", "rejected_score": "2"},
        row | {"rejected": None, "rejected_score": None},
    ]  # fmt: skip
    lines = said(rows)
    assert [line.split() for line in lines[:4]] == [
        ["mean", "chosen", "rejected", "difference"],
        ["score", "3.25", "1.75", "+1.50"],
        ["tokens", "3.50", "3.00", "+0.50"],
        ["characters", "14.00", "15.50", "-1.50"],
    ]
    assert lines[4] == "  chosen score less rejected score"
    assert lines[5].split()[:2] == ["0.50-1.00", "1"]
    assert lines[-2:] == [
        "  chosen has more tokens in 1 of 2 (50.0%)",
        "  chosen has more characters in 1 of 2 (50.0%)",
    ]


def test_what_is_said_of_other_kinds():
    assert said([{"step": 0, "loss": 0.75}, {"step": 1}, {"step": 2, "loss": 0.5}]) == [
        "  loss 0.7500 at first, 0.5000 at last"
    ]
    assert said([{"replies": items(2), "ranks": items(2)}, {"ranks": 5}])[1].split()[:2] == ["2", "1"]
    many = [{"text": "Why?", "source": f"s{i}"} for i in range(13)]
    assert said(many)[0].endswith(", s11 1 (7.7%), and 1 more values")
    assert said([{"prompt": "Why?", "response": Size(99, "characters")}]) == [
        "  prompt, characters: min 4  median 4  mean 4  max 4",
        "  response, characters: min 99  median 99  mean 99  max 99",
    ]
    assert said([{"a": 1}]) == []


@pytest.mark.parametrize(
    ("record", "noun"),
    [
        (Judgment("p", 0, 0, "Score: 4", (3,), "stop", "4"), "judgment"),
        (Response("p", 0, "So.", (1,), (-1.0,), "stop"), "response"),
        (Pair("p", "Why?", 0, 1, "So.", "No.", (1,), (2,), "4", "1"), "pair"),
        (RankedSet("r", "Who?", ("Me.", "You."), (1, 0)), "ranked set"),
        (Example("i", "Why?", "So.", "oasst"), "example"),
        (Prompt("p", "Why?", "file"), "prompt"),
    ],
)
def test_records_are_known_by_their_fields(record, noun):
    assert figures.kind(json.loads(to_json(record))).noun == noun


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4", 4), ("7/2", Fraction(7, 2)), ("3.25", Fraction(13, 4)), ("-1", -1), (4, 4), (2.5, Fraction(5, 2)),
        ("", None), ("four", None), ("1/0", None), ("1/00", None), ("1e9", None), ("٤", None), ("1" * 10, None),
        (None, None), (True, None), ([4], None), (float("inf"), None), ("4\n", None),
    ],
)  # fmt: skip
def test_what_is_a_number(value, expected):
    assert figures.number(value) == expected


def test_counts_are_listed_by_value_and_without_zeros():
    assert figures.listed({"b": 1, "10": 2, "7/2": 3, "a": 0}) == "7/2 3, 10 2, b 1"
    assert figures.counts_in({"a": 1, "b": "2", "c": True}) == {"a": 1}
    assert figures.counts_in([1]) == figures.counts_in(None) == {}


VALUES = (st.integers(0, 10**6), st.fractions(0, 5, max_denominator=6), st.fractions(-50, 900, max_denominator=7))


@given(st.one_of([st.lists(some, min_size=1, max_size=20) for some in VALUES]))
def test_bins_hold_every_value_once_in_a_few_ranges(values):
    found = figures.binned(values)
    assert sum(found.values()) == len(values)
    assert len(found) <= figures.BINS + 1
    edges = list(found.items())
    assert edges[0][1] and edges[-1][1]  # the ends are not empty
    if all(value == int(value) for value in values):
        for label, count in edges:
            low, _, high = label.rpartition("-") if "-" in label.lstrip("-") else ("", "", "")
            low, high = (int(low), int(high)) if low else (int(label), int(label))
            assert count == sum(low <= value <= high for value in values)


def test_bins_have_round_edges():
    assert figures.binned([0, 3, 3, 5]) == {"0": 1, "1": 0, "2": 0, "3": 2, "4": 0, "5": 1}
    assert figures.binned([3, 12, 96]) == {
        "0-9": 1, "10-19": 1, "20-29": 0, "30-39": 0, "40-49": 0, "50-59": 0, "60-69": 0, "70-79": 0, "80-89": 0,
        "90-99": 1,
    }  # fmt: skip
    assert figures.binned([Fraction(1, 3), Fraction(5)]) == {
        f"{i / 2:.2f}-{i / 2 + 0.5:.2f}": int(i in (0, 10)) for i in range(11)
    }
    assert figures.binned([]) == {}
    assert figures.bars("nothing", {}) == figures.bars("nothing", {"a": 0}) == []


def test_a_spread_is_min_median_mean_max_and_eight_marks():
    assert figures.spread([1, 1, 1, 1, 2, 9]) == "min 1  median 1  mean 2.5  max 9  |█▂     ▂|"
    assert figures.spread([5, 5]) == "min 5  median 5  mean 5  max 5"
    assert figures.spread([0.001, 12345.5]) == "min 0.001  median 6172.8  mean 6172.8  max 12345.5  |█      █|"


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 80 columns gets, in colour."""
    out = io.StringIO()
    console = figures.Console

    def made(**how):
        return console(file=out, force_terminal=True, width=80, color_system="standard", legacy_windows=False, **how)

    monkeypatch.setattr(figures, "Console", made)
    return out


def test_a_terminal_of_80_columns_gets_colour_and_whole_texts(terminal):
    hostile = (
        "[bold]x[/bold] [link=http://a]b[/link] :smile: \x1b[31mred\x1b]0;title\x07\r\b\x9b2J\u202eabc\ud800 [/]"
    )
    harmless = hostile.encode("ascii", "backslashreplace").decode().translate(
        {code: f"\\x{code:02x}" for code in (0x1B, 0x07, 0x08)} | {0x0D: "\\r"}
    )  # fmt: skip
    long = "wide 漢字 " * 60 + "x" * 200
    figures.show([Line("stages", "bold", 0), Line(f"{hostile}\n{long}", "red", 4), Line(bar(99), indent=4)])
    out = terminal.getvalue()
    assert "\x1b[1mstages\x1b[0m" in out
    plain = out
    for style in ("\x1b[0m", "\x1b[1m", "\x1b[31m"):
        plain = plain.replace(style, "")
    assert "\x1b" not in plain  # every other escape is text
    assert max(map(cell_len, plain.splitlines())) <= 80
    assert all(line.startswith("    ") for line in plain.splitlines()[1:])
    assert "".join(plain.split()) == "".join(("stages" + harmless + long + bar(99)).split())


def test_elsewhere_lines_are_plain(capsys):
    figures.show([Line("a\n\n  b [red]", "bold", 2), Line("", indent=4)])
    assert capsys.readouterr().out == "  a\n\n    b [red]\n\n"
