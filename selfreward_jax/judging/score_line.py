"""Where a judgment is over while it is still being written: at the end of the line of its score (paper 2.2, Figure 2).

The prompt asks for a justification and then, as its conclusion, for "Score: <total points>". So a judgment is over at
the line feed of the first line that states a score below a line of words. What stands on that line can change how the
score is read ("Score: 4 out of 10", "Score: 4 or 5", "Score: 4. It has 3 faults"), so no sign behind the number ends a
judgment but the line feed. A score above all words is no conclusion, as the justification that follows may come to
another; nor is one in a list, which is a criterion's.

The rule knows fewer statements than scores.py, on purpose: whatever line it ends, `read_score` finds the statement,
so the text up to there and one that goes on without another statement give the same reading. "Score (0-5): 4", a
table, HTML, or words beside quotation marks do not end a judgment; its end of turn does.

The rule is a function from a state and a byte to the next state, of which there are finitely many: an automaton.
"""

from __future__ import annotations

from typing import NamedTuple

# Places on a line: before "score", behind it, behind the separator, behind a digit; of a line that is no statement: no
# letter yet, a line of words, one that decides nothing.
LEAD, SCORE, OPEN, TAIL, SIGNS, WORDS, IGNORED = range(7)

_WORDS = (b"the", b"my", b"final", b"total", b"overall", b"score")
_SINGLE = tuple(mark.encode() for mark in "'`‘’‚‛")
_DOUBLE = tuple(mark.encode() for mark in '"“”„‟«»‹›「」『』')  # these close a quotation that nothing opened
_MARKS = _SINGLE + _DOUBLE
_ASCII_MARKS = b"\"'`"
_BLANK = b" \t"
_SETTING = b"*_"
# In the rest of a line: another statement, whose number may stand on the next line. "ſ" is read as an s too.
_AGAIN = b"core"
_FULLWIDTH = 0xEF  # begins fullwidth letters and quotation marks


class Line(NamedTuple):
    """What a line has been so far.

    Attributes:
        below: a line above has words.
        place: LEAD, SCORE, ...
        seen: the bytes of an unfinished word or quotation mark.
        gap: a blank may stand here: behind "#", ">" or a word. Behind "*" it makes a list.
        spoken: a word stands in front of "score".
        marks: a quotation mark stands on the line: words behind the number would make the statement someone else's.
    """

    below: bool = False
    place: int = LEAD
    seen: bytes = b""
    gap: bool = False
    spoken: bool = False
    marks: bool = False


START = Line()


def step(line: Line, byte: int) -> Line | None:
    """The line after one more byte of the judgment; None where the judgment is over."""
    if byte == ord("\n"):
        over = line.place == TAIL and line.below
        return None if over else Line(line.below or line.place == WORDS)
    letter = bytes([byte]).lower()
    if line.place == LEAD:
        return _lead(line, letter)
    if line.place == SCORE:
        return _score(line, letter)
    if line.place == OPEN:
        return _open(line, letter)
    if line.place == TAIL:
        return _tail(line, letter)
    return _at(line, WORDS) if line.place == SIGNS and (letter.isalpha() or byte >= 0x80) else line


def _at(line: Line, place: int, marks: bool = False) -> Line:
    return Line(line.below, place, marks=marks)


def _begins(seen: bytes, known: tuple[bytes, ...]) -> bool:
    return any(whole.startswith(seen) for whole in known)


def _lead(line: Line, letter: bytes) -> Line:
    """Markup, quotation marks, then "the", "my", "final", "total", "overall", up to "score"."""
    if letter.isalpha():
        word = line.seen + letter
        return line._replace(seen=word, gap=False) if _begins(word, _WORDS) else _at(line, WORDS)
    if line.seen == b"score":
        return _score(_at(line, SCORE, line.marks), letter)
    if line.seen.isalpha():
        if line.seen not in _WORDS or letter not in _BLANK + _SETTING:
            return _at(line, WORDS)
        return line._replace(seen=b"", gap=True, spoken=True)
    mark = line.seen + letter
    if _begins(mark, _MARKS) and not line.spoken:
        return line._replace(seen=b"" if mark in _MARKS else mark, gap=False, marks=True)
    if line.seen or not letter.isascii():
        return _at(line, WORDS)
    if letter in _SETTING + b"([{<":
        return line._replace(gap=line.spoken)
    if letter in b"#>":
        return line._replace(gap=True)
    return line if letter in _BLANK and line.gap else _at(line, SIGNS)


def _score(line: Line, letter: bytes) -> Line:
    """Between "score" and its separator."""
    if letter in b":=":
        return line._replace(place=OPEN)
    if letter in _BLANK + _SETTING + _ASCII_MARKS:
        return line._replace(marks=line.marks or letter in _ASCII_MARKS)
    return _at(line, WORDS)


def _open(line: Line, letter: bytes) -> Line:
    """Between the separator and the number."""
    if letter.isdigit():
        return line._replace(place=TAIL)
    if letter in _BLANK + _SETTING + _ASCII_MARKS + b"([{<$":
        return line._replace(marks=line.marks or letter in _ASCII_MARKS)
    return _at(line, IGNORED)


def _tail(line: Line, letter: bytes) -> Line:
    """The number and the rest of its line: anything but another statement, or words beside quotation marks."""
    if letter[0] == _FULLWIDTH or (line.marks and letter.isalpha()):
        return _at(line, IGNORED)
    known = (*(_MARKS if line.marks else _DOUBLE), _AGAIN)
    seen = line.seen + letter
    if line.marks and not letter.isascii() and not _begins(seen, known):
        return _at(line, IGNORED)
    while not _begins(seen, known):
        seen = seen[1:]
    if seen == _AGAIN:
        return _at(line, IGNORED)
    return line._replace(seen=b"", marks=True) if seen in known else line._replace(seen=seen)
