"""Mentions of a score that are not the judge's own statement: quoted, denied, reported, or describing a noun (paper 2.2).

A judge quotes what it judges: 'It says "Score: 5", which I ignore.' It also sets its own last line in quotation
marks, as both judge prompts show the format in them. So a quotation that is the whole line is the judge's own,
and one with words beside it is not.

Whether a mark opens or closes is told by what stands on its two sides, not by its shape: „a“, »a« and ”a” are
quotations too, and in JSON the same mark nests. Where the sides do not tell, the shape does, and for straight
marks whether one is open. A double mark without its partner reaches to the end of the line that it stands on,
since a quotation may have several lines; a single one or a backtick without partner is an apostrophe or a slip.

The phrases are few and English, and only words that belong to one may stand between it and the statement: "it does
not answer the question. Score: 1" and "all that the user asks for: Score: 5" are statements.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

_DOUBLE, _GUILLEMETS, _CORNERS, _BACKTICK, _SINGLE = range(5)
_FAMILIES = {_DOUBLE: '"“”„‟', _GUILLEMETS: "«»‹›", _CORNERS: "「」『』", _BACKTICK: "`", _SINGLE: "'‘’‚‛"}
_FAMILY = {mark: family for family, marks in _FAMILIES.items() for mark in marks}
_LEFT, _RIGHT = frozenset("“„‟«‹「『‘‚‛"), frozenset("”»›」』’")
_MARKS = re.compile(f"`+|[{''.join(_FAMILY)}]")
_ENDS = re.compile(r"</?\|?\w{1,30}\|?>|\[/?\w{1,20}\]")  # "</s>", "<|im_end|>", "[/INST]" are no words
_BRACKETS, _STOPS = frozenset("([{<"), frozenset(".,;:!?)]}>…。，、")

_LEAD = r"(?:\s+{m}*|{m}+)(?:(?:final|total|overall|full|perfect)\s+{m}*)*$".replace("{m}", r"[*_`\"'“‘«]")
_DENIED = re.compile(
    r"(?:\b(?:not|never|nor?|neither|cannot|without|hardly|instead\s+of|rather\s+than|far\s+from)|n['’]t)\b"
    r"(?:\s+(?:an?|the|any|it|this|that|of|for|with|to|be|been|even|quite|really|just|only|simply|worth\w*|deserv\w+"
    rf"|merit\w*|earn\w*|warrant\w*|justif\w+|get\w*|giv\w+|award\w*|assign\w*|writ\w+|say\w*))*{_LEAD}",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:(?:says|said|states|stated|claims|claimed|reads)\b(?:\s+that)?:?"
    r"|(?:contains|includes|(?:asks|asking|begs)\s+for|(?:ends|ended|ending)\s+with)\b)"
    rf"(?:\s+(?:an?|the|its|own|line|text|words?|phrase|statement))*{_LEAD}",
    re.IGNORECASE,
)
_ARTICLE = re.compile(rf"\b(?:an?|any|every|another){_LEAD}", re.IGNORECASE)
_NOUN = re.compile(
    r"[\s*_`\"'”’»]*+(?:(?:quality|level|worthy)\s+)?"
    r"(?:answers?|responses?|repl(?:y|ies)|completions?|outputs?|solutions?|explanations?|texts?|essays?)\b",
    re.IGNORECASE,
)


def denied_or_reported(before: str) -> bool:
    """Whether a statement right behind these words (a line's, at most a few dozen characters) is not the judge's."""
    return bool(_DENIED.search(before) or _REPORTED.search(before))


def described(before: str, after: str) -> bool:
    """Whether a statement between these describes a noun: "a Score: 5 answer"."""
    return bool(_ARTICLE.search(before) and _NOUN.match(after))


def quotations(line: str, places: Sequence[tuple[int, int]]) -> list[str]:
    """For each place (start, end) of a line: "none" outside of quotations, "line" or "part" inside of one.

    "line" if all quotations that it stands in are the whole line: no letter stands beside them, only digits, list
    marks and markup. A place that reaches out of a quotation is not inside of it, as the key of `"score": 4`.
    """
    spans = _spans(line)
    if not spans:
        return ["none"] * len(places)
    letters = [index for index, character in enumerate(_ENDS.sub(_blank, line)) if character.isalpha()]
    parts = [span for span in spans if letters and (letters[0] < span[0] or letters[-1] > span[1])]
    in_part, in_any = _inside(parts, places), _inside(spans, places)
    return ["part" if part else "line" if some else "none" for part, some in zip(in_part, in_any)]


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


def _inside(spans: Iterable[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each place lies in a span; in n log n, as a line may consist of quotations."""
    ordered = sorted(spans)
    starts = [start for start, _ in ordered]
    furthest = [-2, *itertools.accumulate((end for _, end in ordered), max)]
    return [furthest[bisect_left(starts, start)] >= end for start, end in places]


def _spans(line: str) -> list[tuple[int, int]]:
    """Places (of the opening mark, of the closing one) of all quotations; -1 and the length for those cut by the line."""
    open_marks: dict[int, list[int]] = {family: [] for family in _FAMILIES}
    spans: list[tuple[int, int]] = []
    for match in _MARKS.finditer(line):
        family, at = _FAMILY[match.group()[0]], match.start()
        role = _role(match.group()[0], family, line[at - 1 : at], line[match.end() : match.end() + 1])
        opened = open_marks[family]
        if role == "either":
            role = "close" if opened else "open"
        if role == "open":
            opened.append(at)
        elif role == "close" and (opened or family in (_DOUBLE, _GUILLEMETS, _CORNERS)):
            spans.append((opened.pop() if opened else -1, at))
    unclosed = itertools.chain.from_iterable(open_marks[family] for family in (_DOUBLE, _GUILLEMETS, _CORNERS))
    return spans + [(at, len(line)) for at in unclosed]


def _role(mark: str, family: int, before: str, after: str) -> str:
    """ "open", "close", "either" or "none", from the mark and its neighbours ("" at the ends of the line)."""
    shape = "open" if mark in _LEFT else "close" if mark in _RIGHT else "either"
    if family in (_CORNERS, _BACKTICK):
        return shape
    if before.isalnum() and after.isalnum():
        return "none" if family == _SINGLE else shape  # an apostrophe
    free_before = not before.strip() or before in _BRACKETS
    free_after = not after.strip() or after in _STOPS
    if after.isalnum() or (free_before and not free_after):
        return "open"
    return "close" if free_after and not free_before else shape
