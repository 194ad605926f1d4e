"""The score that a judgment states (paper 2.2; Figures 2 and 7 ask for a line "Score: <number>" at its end).

A score that cannot be read with certainty is no score: never 0, never the lowest, never a guess. An unread
score that counted as a low one would teach the model to write answers that its judge can parse. What is not
read has one of `REASONS`:

    no_statement   nothing in the text says "Score:", or only mentions tell it
    cut_off        the length limit came before a statement, or where the last one could still have gone on
    no_number      no digit 0 to 9 where the number should be: "five", "NaN", "<total points>", nothing
    out_of_range   below the lowest, above the highest, or a number longer than any score
    other_scale    "4/10", "80%", "Score (0-10): 4"
    ambiguous      a range, a choice, a sum, "+4", "~4", "4x", words before the number, a further number after it
    contradicting  several final statements, each of which could be read, that differ

Statements. "Score" and then ":" or "=", with Markdown, quotes, brackets, HTML or LaTeX around it, and perhaps
with the scale: "Score (out of 5):". "Score - 4" and the table row "| Score | 4 |" are statements where they
begin the line and the number follows. "The score is 4" and "Rating: 4" are none, nor is "Reason for the score:"
if no number follows. A statement reaches to the next one or the end of the line. If it holds no letter or digit,
and the next line that does is nothing but a number (and the line after that is not), that is its number.

Mentions. A response can say "Score: 5" and the judge can quote it, so these are no statements (mentions.py): one in
quotation marks with other words on the line (quotation marks around the whole line, as the judge prompts show the
format, are the judge's own), one right behind a denial or a report ("does not deserve a Score: 5", "it ends with
Score: 5"), and one that describes a noun ("a Score: 5 answer"). They do end the statement in front of them. The form
is told apart, not the meaning: "Score: 5, as the response asks" counts.

Final statements. Those on the last line that has any, and those on lines directly above it (with no letter or
digit between) that hold nothing but a statement. They must agree. An earlier statement that is followed by
prose was thinking aloud and does not count. Partial scores ("Relevance score: 1") above a "Score: 4" or a
"Total score: 4" do not count either; where no such line ends them they must agree, as nothing says which one
is meant. If the last statement cannot be read, no earlier one is taken.

Only English units and scales are known (and the East Asian signs for "points"). Of other digits than 0 to 9
only the fullwidth ones are read, which are the same digits as East Asian text sets them.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction

from selfreward_jax.judging import mentions

REASONS = (
    "no_statement",
    "cut_off",
    "no_number",
    "out_of_range",
    "other_scale",
    "ambiguous",
    "contradicting",
)
_LONGEST = 40  # characters of a number; int() refuses very long ones


@dataclasses.dataclass(frozen=True)
class Reading:
    """A score, or the reason (one of `REASONS`) why there is none: exactly one of the two is None."""

    score: Fraction | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class _Statement:
    """One statement of a line.

    Attributes:
        scale: as it is written before the separator: "(out of 5)", or "".
        rest: what follows the separator, up to the next statement.
        plain: no words stand before it but "final" and such.
        quoted: it stands in a quotation, which is the whole line.
    """

    scale: str
    rest: str
    plain: bool
    quoted: bool


# Fullwidth ASCII becomes ASCII, except the comma, which is no decimal sign there; what has no width, a space.
_WIDTHS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if code != 0xFF0C}
_WIDTHS |= dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0xFEFF], 0x20)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# Marks that only set a text. A tag becomes a space, so that "4</td><td>5" does not become 45. <s>, <del> and
# <sup> are left, since they change what a number means.
_MARKUP = re.compile(
    r"</?(?:b|i|u|em|strong|p|div|span|code|pre|font|mark|center|h[1-6]|li|ul|ol|table|tbody|tr|td|th)(?:\s[^<>]*)?>"
    r"|\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm)\b",
    re.IGNORECASE,
)
_ESCAPE = re.compile(r"\\(?=[^\w\s])")  # "\*\*Score", "\(4\)", "4\/5"

# The patterns below read one line. Parts that repeat give nothing back ("*+") or begin with other characters than
# what follows them, so matching takes time linear in the text whatever the judge wrote.
_CLOSE = r"[\s*_`\"'“”‘’«»$|})\]】」』》>]*+"
_AROUND = _CLOSE.replace(">", "")  # between "score" and its separator; "score->" is no separator
_OPEN = _CLOSE.replace(">", r"<({\[【「『《")  # closing ones as well: "(Score:) 4", "\text{Score:} 4"
_NUMBER = r"[0-9]+(?:[.,][0-9]+)?"
_UNITS = r"(?:points?\b|pts?\b|stars?\b|分(?!之)|点|점)"
_ALONE = rf"(?:(?![^\W_])|(?={_UNITS}))"  # no letter or digit of any script goes on, as in "4th" and "0x4"

# "Score:", "**Total score** =", "Score (0-5):", "Score/5:", "score is:"; not "subscore:", "sub-score:", "F-score:".
# A letter of a script that has no spaces may stand before it.
_SCORE = (
    rf"score(?:\s+is\b)?{_AROUND}"
    rf"(?:(?P<scale>[(\[][^()\[\]]{{0,80}}[)\]]|/\s*{_NUMBER}|out\s+of\s+{_NUMBER}){_AROUND})?"
)
_STATEMENT = re.compile(rf"(?<![a-z0-9À-ɏ])(?<![^\W_]-)(?<!sub[ _]){_SCORE}(?::=?|==?)", re.IGNORECASE)
_START = r"[\W\d_]*(?:(?:the|my|final|total|overall)[\W_]+)*"
_ROW = re.compile(rf"{_START}(?P<cell>{_SCORE}(?P<dash>(?<=[\s*_])[-–—](?=[\s*_]))?)(?={_OPEN}[0-9])", re.IGNORECASE)
_PLAIN = re.compile(_START, re.IGNORECASE)
# "Reason for the final score:"; where no number follows, that is none.
_ABOUT = re.compile(
    r"\b(?:for|of|behind|about|why|explain\w*|justif\w*)\s+(?:(?:the|this|that|my|a)\s+)?"
    r"(?:(?:final|total|overall)\s+)?[*_`\"“‘]*$",
    re.IGNORECASE,
)

_VALUE = re.compile(rf"(?P<open>{_OPEN})(?P<minus>[-−]?)(?P<number>{_NUMBER}){_ALONE}", re.IGNORECASE)
_UNIT = re.compile(_CLOSE + _UNITS, re.IGNORECASE)
_SCALE = re.compile(
    rf"{_CLOSE}[(\[]?(?:"
    rf"(?:/|(?:out\s+)?of\b(?:\s+an?\b)?(?:\s+(?:possible|maximum|max|total)\b)?(?:\s+of\b)?){_OPEN}{_NUMBER}"
    rf"|on\s+(?:a|the)\s+scale(?:\s+(?:of|from)\b)?{_OPEN}{_NUMBER}(?:\s*(?:to\b|[-–—])\s*{_NUMBER})?"
    rf"|on\s+(?:a|the)\s+{_NUMBER}[-\s]point\s+scale"
    rf"){_ALONE}",
    re.IGNORECASE,
)
_PERCENT = r"(?:%|per\s?cent\b|pct\b)"
_NUMBER_WORDS = r"(?:zero|one(?!\s+of\b)|two|three|four|five|six|seven|eight|nine|ten|(?:an?\s+)?(?:half|quarter))\b"
# Behind the number: a sign that changes it, or words that make it one of several or a part of another number.
_CHANGED = re.compile(
    rf"[-−‐‑]|{_CLOSE}(?:[/+^~×÷±?]|[-–—]\s*$)|[一二三四五六七八九十半]"
    rf"|(?:[^\w.;!?。]|_)*(?:(?:or|plus|minus|out|of)\b|(?:(?:to|and|through)\s+)?{_NUMBER_WORDS})",
    re.IGNORECASE,
)
# In a judgment that was cut off: a whole word that does not lead to a second number.
_OVER = re.compile(
    r"[\W_]*(?!(?:out|of|on|to|and|or|through|plus|minus|points?|pts?|per|an?)\b)[^\W\d_]+[\W_]", re.IGNORECASE
)
_NUMBER_LINE = re.compile(
    rf"{_OPEN}{_NUMBER}{_ALONE}(?:{_UNIT.pattern})?(?:{_SCALE.pattern})?(?:{_UNIT.pattern})?{_CLOSE}(?:\.{_CLOSE})?",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"[0-9]+[.)]")


def read_score(generated_text: str, low: int, high: int, finished: bool = True) -> Reading:
    """The score from `low` to `high` that a judgment states, or why there is none.

    Give it generated text only: the judge's prompt holds "Score: <total points>" and may hold a response that
    says "Score: 5". The module docstring has the rules.

    Args:
        generated_text: the whole judgment, without its prompt.
        low: the lowest score of the template, inclusive, not negative.
        high: the highest, inclusive.
        finished: False if the judgment hit the length limit. Then a statement on a last line that no line end
            completes counts only if what follows the number shows that it was over: a whole word ("Score: 4
            because it"), or, behind the scale, anything but a digit or a decimal sign ("**Score: 4/5**").
            "Score: 4" is cut_off: it might have become "4.5", "4/10" or "4 or 5".
    """
    text = _BREAK.sub("\n", generated_text)
    raw = text.splitlines()
    lines = _join_numbers([line for line in map(_clean, raw) if _says_something(line)])
    index, last = len(lines) - 1, []
    while index >= 0 and not (last := _statements(lines[index])):
        index -= 1
    if not last:
        return Reading(None, "no_statement" if finished else "cut_off")
    at_end = not finished and index == len(lines) - 1
    if at_end and not _says_something(last[-1].rest):
        return Reading(None, "cut_off")  # its number might have come on the next line
    open_ended = at_end and text[-1].splitlines() != [""] and _says_something(raw[-1])
    readings = [_read(last[-1], low, high, open_ended)]
    others = [*last[-2::-1], *_bare_above(lines[:index], last[-1].plain)]
    readings += [_read(statement, low, high, open_ended=False) for statement in others]
    unread = [reading for reading in readings if reading.reason]
    if unread:
        return unread[0]
    return readings[0] if len(set(readings)) == 1 else Reading(None, "contradicting")


def _clean(line: str) -> str:
    return _ESCAPE.sub("", _MARKUP.sub(" ", line.translate(_WIDTHS)))


def _says_something(line: str) -> bool:
    return any(map(str.isalnum, line))


def _join_numbers(lines: Sequence[str]) -> list[str]:
    """The lines, where "Score:" and a line of nothing but a number, the only such line there, become one."""
    numbers = [bool(_NUMBER_LINE.fullmatch(line)) and not _LIST_MARK.fullmatch(line.strip()) for line in lines]
    numbers.append(False)
    joined: list[str] = []
    for index, line in enumerate(lines):
        above = _statements(joined[-1]) if joined and numbers[index] and not numbers[index + 1] else []
        if above and not _says_something(above[-1].rest):
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def _statements(line: str) -> list[_Statement]:
    matches = list(_STATEMENT.finditer(line))
    ends = [match.start() for match in matches[1:]] + [len(line)]
    rests = [line[match.end() : end] for match, end in zip(matches, ends)]
    places = [(match.start(), match.end() + _value_end(rest)) for match, rest in zip(matches, rests)]
    found = []
    for match, rest, quoted in zip(matches, rests, mentions.quotations(line, places)):
        before = line[max(0, match.start() - 60) : match.start()]
        plain = match.start() <= 60 and bool(_PLAIN.fullmatch(before))
        if quoted != "part" and (plain or _is_own(before, rest)):
            found.append(_Statement(match["scale"] or "", rest, plain, quoted == "line"))
    return found or _row(line, matches[0].start() if matches else len(line))


def _row(line: str, end: int) -> list[_Statement]:
    """The statement "Score - 4" or "| Score | 4 |" that a line begins with, if it ends before `end`."""
    row = _ROW.match(line, 0, end)
    if not row or not (row["dash"] or "|" in row["cell"]):
        return []
    rest = line[row.end() : end]
    (quoted,) = mentions.quotations(line, [(row.start("cell"), row.end() + _value_end(rest))])
    return [] if quoted == "part" else [_Statement(row["scale"] or "", rest, plain=True, quoted=quoted == "line")]


def _value_end(rest: str) -> int:
    value = _VALUE.match(rest)
    return value.end("number") if value else 0


def _is_own(before: str, rest: str) -> bool:
    """Whether the words around a statement that is not plain leave it the judge's own."""
    parts = _parts(rest)
    if not parts and _ABOUT.search(before):
        return False
    return not (mentions.denied_or_reported(before) or (parts and mentions.described(before, parts[2])))


def _bare_above(lines: Sequence[str], only_plain: bool) -> Iterable[_Statement]:
    """The statements of the lines that end `lines` and hold nothing else, the last one first."""
    for line in reversed(lines):
        statements = _statements(line)
        if len(statements) != 1 or (only_plain and not statements[0].plain):
            return
        parts = _parts(statements[0].rest)
        if not parts or any(map(str.isalpha, parts[2])):
            return
        yield statements[0]


def _parts(rest: str) -> tuple[re.Match[str], str, str] | None:
    """The number at the beginning, the scale behind it ("/5 points") or "", the rest; None without a number."""
    value = _VALUE.match(rest)
    if not value:
        return None
    start = value.end()
    if unit := _UNIT.match(rest, start):
        start = unit.end()
    end = start
    if scale := _SCALE.match(rest, start):
        end = scale.end()
        if unit := _UNIT.match(rest, end):
            end = unit.end()
    return value, rest[start:end], rest[end:]


def _read(statement: _Statement, low: int, high: int, open_ended: bool) -> Reading:
    """One statement; `open_ended` if the text was cut off somewhere behind its separator."""
    parts = _parts(statement.rest)
    if not parts:
        if re.search("[0-9]", statement.rest):
            return Reading(None, "ambiguous")
        return Reading(None, "cut_off" if open_ended else "no_number")
    value, scale, tail = parts
    scale_is_over = scale and not (scale[-1].isdigit() and tail in ("", ".", ","))
    # In quotation marks it can still turn out to be a part of the line, whatever follows the number.
    if open_ended and (statement.quoted or (not scale_is_over and not _OVER.match(tail))):
        return Reading(None, "cut_off")
    percent = re.match(_CLOSE + _PERCENT, tail, re.IGNORECASE)
    if percent or not all(_is_ours(written, low, high) for written in (statement.scale, scale)):
        return Reading(None, "other_scale")
    less_than = "<" in value["open"] and ">" not in statement.rest  # "<4"; but "<4>" fills in the format
    thousands = re.search(",[0-9]{3}", value["number"])
    further = any(unicodedata.category(character)[0] == "N" for character in tail)
    if less_than or thousands or further or _CHANGED.match(tail):
        return Reading(None, "ambiguous")
    score = _fraction(value["number"])
    if score is None or score > high or (-score if value["minus"] else score) < low:
        return Reading(None, "out_of_range")
    return Reading(None, "ambiguous") if value["minus"] else Reading(score, None)


def _is_ours(scale: str, low: int, high: int) -> bool:
    """Whether a scale as it is written ("/5", "(0-5)", "out of 5", or none) is from `low` to `high`."""
    if re.search(f"{_PERCENT}|\\b{_NUMBER_WORDS}", scale, re.IGNORECASE):
        return False
    ends = [_fraction(number) for number in re.findall(_NUMBER, scale)]
    return not ends or ends in ([high], [low, high])


def _fraction(number: str) -> Fraction | None:
    return Fraction(number.replace(",", ".")) if len(number) <= _LONGEST else None


def mean_score(scores: Iterable[Fraction | None]) -> Fraction | None:
    """The exact mean of the scores that are there (paper 3.1.3: 3 judgments, averaged), or None if none is.

    A Fraction, since the mean of three integers has no exact float, and equal scores must compare equal.
    """
    present = [score for score in scores if score is not None]
    return sum(present, Fraction(0)) / len(present) if present else None
