"""Where a judgment is over: the corpus is read alike with and without the stop, and so is any text without a second score."""

import json
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.judging.score_line import START, step
from selfreward_jax.judging.scores import read_score

CORPUS = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "score_corpus.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
]


def over_at(data):
    """How many bytes of a judgment are there when it is over; None if it goes on to its end."""
    line = START
    for count, byte in enumerate(data, 1):
        after = step(line, byte)
        if after is None:
            return count
        line = after
    return None


def until(text):
    """The judgment up to where it is over; None if it goes on to its end."""
    count = over_at(text.encode())
    return None if count is None else text.encode()[:count].decode()


def of_case(case, text, finished=None):
    return read_score(text, case["low"], case["high"], case["finished"] if finished is None else finished)


@pytest.mark.parametrize("end", ["", "\n", "\n\nThat is all.", "\r\n```\n"])
def test_every_text_of_the_corpus_is_read_alike_with_and_without_the_stop(end):
    stopped = 0
    for case in CORPUS:
        if end and not case["finished"]:
            continue  # cut off where it ends
        text = case["text"] + end
        short = until(text)
        if short is not None:
            stopped += 1
            assert of_case(case, short, True) == of_case(case, short.rstrip(), True) == of_case(case, text), text
    assert stopped >= (50 if end else 3)


def test_below_words_only_a_second_score_further_down_makes_a_difference():
    stopped, different = 0, []
    for case in CORPUS:
        if not case["finished"]:
            continue
        text = f"It is fine.\n\n{case['text']}\n"
        short = until(text)
        if short is not None:
            stopped += 1
            if of_case(case, short) != of_case(case, text):
                different.append(case["text"])
                assert of_case(case, text.removeprefix(short)).reason != "no_statement", text
    assert stopped > 300
    assert len(different) == 21  # of a first conclusion and what a judge that goes on says, the first counts
    assert {"Score: 3\nScore: 4", "Score: 4\nFinal score: five", "Score: 3\nOK.\n\nScore: 4"} <= set(different)


def test_no_sign_behind_the_number_can_end_a_judgment():
    """Stopping at the first sign that continues no number would misread these; so it is the line feed that ends one."""
    sign = re.compile(r"score[\s*_\"]*[:=][\s*_\"(<\[]*[0-9][0-9.,/]*[^0-9.,/]", re.IGNORECASE)
    one_score = [case for case in CORPUS if case["finished"] and case["text"].casefold().count("score") == 1]
    found = [(case, match) for case in one_score if (match := sign.search(case["text"]))]
    wrong = [
        case for case, match in found if of_case(case, case["text"][: match.end()]) != of_case(case, case["text"])
    ]
    assert len(wrong) > 40
    for case in wrong:
        short = until(f"It is fine.\n{case['text']}\nAnd so on.\n")
        assert short is None or short.endswith(f"{case['text']}\n")


LINES = [
    "Score: 4", "score: 4", "SCORE : 4.5", "Score:4/5", "Score = 4", "**Score:** 4", "**Score: 4**", "**Score**: 4",
    "_Score:_ _4_", "### Score: 4", "> Score: 4", "> **Final Score:** 4", "Total score: 4", "My final score: 4",
    "The total score: 4", "__Overall__ Score: 4", "Score: <4>", "Score: [4/5]", "Score: $4$", "Score: 4 out of 5", "Score: 4 points.",
    "Score: 4 - clear, but it's short", "Score: 4 → 5", "Score: 4 (très bien)", "Score: 9", "Score: 4 or 5", "Score: 4\r",
    "“Score: 4”", '"Score: 4"', "‘Score: 4/5’", "「Score: 4」", "«Score: 4»", "`Score: 4`", '"Score": 4', "“Final score: 4”.",
    "“**Score: 4**”", "Score: '4'", 'Score: 4"', "Score: 4 is what I give”", "(Score: 4)", "Score: 4</s>", "Score: 4 ’",
]  # fmt: skip
OTHERS = [
    "Score: five", "Score:", "Score", "Score: <total points>", "Score: -4", "Score: about 4", "Scores: 4", "subscore: 4",
    "Final-Score: 4", "Final3 score: 4", "A score: 4", "Relevance score: 4", "I give it Score: 4", "It says: Score: 4", "Underscore: 4",
    "- Score: 4", "* Score: 4", "+ Score: 4", "1. Score: 4", "  Score: 4", "\tScore: 4", "| Score: | 4 |", "3Score: 4", "1-Score: 4",
    "“Score: 5” is what it says.", '"Score: 5," it says.', "'Score: 5' it is not", "Score: 5” it says", "“Score: 5”, 漢字",
    "Score: 4 Score:", "Score: 4, total score:", "Score: 4 ſcore:", "Score: 4 ｓｃｏｒｅ：", "Final “Score: 4”", "Score: 4＂ it says",
    "<b>Score:</b> 4", "\\*\\*Score: 4", "Score\u2028: 4", "Score:\x0b4", "Score\r: 4", "\u2028Score: 4", "Score (0-5): 4", "4", "« Score: 4 »",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_states_a_score_ends_a_judgment_with_its_line_feed(line):
    for above in (
        "It is fine.\n",
        "It is fine.\n\n---\n\n",
        "Score:\n- Good:\n",
        "```json\n",
        "Ça va.\n",
        "1. Good\n\n",
    ):
        text = above + line
        assert until(text) is None
        assert until(f"{text}\n") == until(f"{text}\n\nScore: 1\n") == f"{text}\n"
        assert read_score(f"{text}\n", 0, 5).reason != "no_statement"


@pytest.mark.parametrize("line", OTHERS)
def test_another_line_does_not(line):
    assert until(f"It is fine.\n{line}\nIt is.\n") is None
    assert until(f"It is fine.\n{line}\nScore: 2\nIt is.\n") == f"It is fine.\n{line}\nScore: 2\n"


@pytest.mark.parametrize(
    "above",
    [
        "",
        "\n\n",
        "---\n",
        "```\n",
        "**\n",
        "\r\n",
        "Score: 3\n",
        "Score:\n",
        "12.\n",
        "Score: five\n",
        "Final score: 4/5\n\n",
    ],
)
def test_a_score_above_all_words_does_not(above):
    assert until(f"{above}Score: 2\nIt is fine, but short.\n") is None
    assert (
        until(f"{above}Score: 2\nIt is fine, but short.\nScore: 3\nx")
        == f"{above}Score: 2\nIt is fine, but short.\nScore: 3\n"
    )


PIECES = [
    "Score", "score", "Total score", "Final ", "My ", "the ", "overall-", "1", "4", "-", "_", "*", "**", "#", ": ", ":", "=", "：", "|",
    " ", "\n", "\t", "<", ">", "(", ")", "/5", "/10", ".", ",", " or ", " because ", "<br>", "<b>", "</b>", "five", "<total points>",
    "Reason for the ", "Score: 4", "Score: 3\n", "Score (0-5): ", "４", "½", "\r", "\u2028", "\x0b", '"', "“", "”", "„", "'", "’", "`",
    "«", "‹", "「", "not a ", "It says ", " answer", "\\", "ſcore:", "ｓｃｏｒｅ：", "＂", "core", "é", "…", "</s>", "<span x=\"", "{", "$",
]  # fmt: skip
PARTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
STATEMENTS = st.sampled_from(
    ["Score: 4", "**Score:** 3/5", '"Score": 2', "“Score: 1", "Final score = 4", "# Score: 2 or 3"]
)


@given(before=PARTS, statement=STATEMENTS, behind=PARTS, after=PARTS)
def test_what_follows_without_another_score_is_never_missed(before, statement, behind, after):
    text = f"It is fine.\n{before}{statement}{behind}\n{after}"
    short = until(text)
    if short is None:
        return
    reading = read_score(short, 0, 5)
    assert reading.reason not in ("no_statement", "cut_off")
    assert reading == read_score(short.rstrip(), 0, 5)
    assert short.endswith("\n")
    if read_score(text.removeprefix(short), 0, 5).reason == "no_statement":
        assert read_score(text, 0, 5) == reading
        limited = read_score(text, 0, 5, finished=False)
        assert limited == reading or limited.reason == "cut_off"  # the length limit only takes readings away


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_bytes_that_are_no_text_end_nothing_that_has_no_score(one, two):
    data = b"fine\n" + one + b"Score: 4" + two + b"\n"
    if over_at(data) is not None:
        assert read_score(data.decode("utf-8", "replace"), 0, 5).reason != "no_statement"


def test_the_states_are_few():
    found, new = {START}, [START]
    while new:
        after = {line for state in new for byte in range(256) if (line := step(state, byte)) is not None} - found
        found |= after
        new = list(after)
    assert len(found) < 500
