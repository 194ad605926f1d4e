"""The score in a judgment (paper 2.2; Figure 2 asks for the format "Score: <total points>").

A score that cannot be read with certainty is no score (None): never 0, never the lowest, never a guess. An
unread score that counted as a low one would teach the model to write answers that its judge can parse.
"""

import collections
import re
from collections.abc import Iterable
from fractions import Fraction

# Every pattern here is a chain of parts that begin with different characters and never nest, so matching
# takes time linear in the text whatever the judge wrote.
_OPEN = r"[ \t*_`\"'“”‘’<\[({]*"  # what may stand before a number: spaces, Markdown, quotes, brackets
_CLOSE = r"[ \t*_`\"'“”‘’>\])}]*"
# Lengths are bounded: int() refuses very long digit strings. A comma is a decimal sign before one or two
# digits; before three it is a thousands mark.
_NUMBER = r"(?P<{0}>[0-9]{{1,9}}(?:\.[0-9]{{1,9}}|,[0-9]{{1,2}})?)(?![^\W_])"

# "Score:", "**Score:**", "Total score =", "Score (out of 5):"; not "subscore:", "sub-score:", "the score is".
_STATEMENT = re.compile(
    r"(?<![^\W_])(?<![^\W_]-)score[ \t*_`\"'”’]*(?:\((?P<note>[^()\n]{0,40})\)[ \t*_`\"'”’]*)?[:=：]",
    re.IGNORECASE,
)
_VALUE = re.compile(_OPEN + _NUMBER.format("value"))
_UNIT = re.compile(_CLOSE + r"(?:points?|pts)\b", re.IGNORECASE)
_SCALE = re.compile(_CLOSE + r"\(?(?:/|out\s+of\b)" + _OPEN + _NUMBER.format("scale"), re.IGNORECASE)
_LAST_NUMBER_OF_NOTE = re.compile(r"([0-9]{1,9})\D*$")
# After the number: a sign that changes it, or words that make it one of several or a part of a longer number.
_OPERATOR = re.compile(_CLOSE + r"[/+%^~×]")
_CONTINUED = re.compile(
    r"(?:[^\w.;!?]|_)*(?:or|to|and|minus|plus|through|out|of|points?|half|quarter"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten)\b",
    re.IGNORECASE,
)


def parse_score(generated_text: str, low: int, high: int) -> Fraction | None:
    """The score that a judgment states, from `low` to `high`, or None.

    Give it generated text only: the judge's prompt holds "Score: <total points>" and may hold a response that
    says "Score: 5". The last statement ("Score:" or "score =", to the end of its line) counts. If that one
    cannot be read, no earlier one is taken. Read: "Score: 4", "**Score:** 4", "Score: <4>", "Score: 4/5", "4
    out of 5", "3 points", "4.5", "4,5". Refused: a value outside the range, another scale ("4/10"), a range
    or a choice ("4-5", "4 or 5"), a word ("five"), any further number on the line.
    """
    statements = collections.deque(_STATEMENT.finditer(generated_text), maxlen=1)
    if not statements:
        return None
    statement = statements[0]
    if note := statement["note"]:  # "(out of 10)", "(0-5)": the last number is the top of the scale
        top = _LAST_NUMBER_OF_NOTE.search(note)
        if top and int(top[1]) != high:
            return None
    rest = re.split(r"[\n\r]", generated_text[statement.end() :], maxsplit=1)[0]
    value = _VALUE.match(rest)
    if not value:
        return None
    rest = rest[value.end() :]
    if unit := _UNIT.match(rest):
        rest = rest[unit.end() :]
    if scale := _SCALE.match(rest):
        if _fraction(scale["scale"]) != high:
            return None
        rest = rest[scale.end() :]
    if unit := None if unit else _UNIT.match(rest):
        rest = rest[unit.end() :]
    if _OPERATOR.match(rest) or _CONTINUED.match(rest) or any(map(str.isnumeric, rest)):
        return None
    score = _fraction(value["value"])
    return score if low <= score <= high else None


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace(",", "."))


def mean_score(scores: Iterable[Fraction | None]) -> Fraction | None:
    """The exact mean of the scores that are there (paper 3.1.3: 3 judgments, averaged), or None if none is.

    A Fraction, since the mean of three integers has no exact float, and equal scores must compare equal.
    """
    present = [score for score in scores if score is not None]
    return sum(present, Fraction(0)) / len(present) if present else None
