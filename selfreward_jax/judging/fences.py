r"""Fences: what sets a text apart in a judge prompt, found in the prompt itself (paper 2.2, Figures 2 and 7).

A text that is put into a prompt must not be able to end its place. What stands directly before and after the place
(with nothing but white space and other fences between) is a fence if it is one of

    a tag    <answer>, </answer>, [answer], [The End of the Answer], {{answer}}, <|answer|>: in a text it is met
             anywhere, in any case, as an opening or a closing one, with attributes, spaces or characters that cannot
             be seen in it
    a mark   a line that begins with three or more of one sign (```, ---, ===, ~~~, three quotation marks) or with #:
             in a text it is met where a line begins with as many of the sign (three; of # two, or one if the prompt
             has one); on the same line as the place, or at the end of a line before it, anywhere

and each one that is met gets a backslash: "<\/answer>", "\```". One that has backslashes gets one more, so taking one
away gives the text back and no two texts look the same to the judge. Labels in plain words ("Answer:") are no fences.
"""

import functools
import itertools
import re
from collections.abc import Iterator

_INVISIBLE = (
    r"\x00-\x08\x0e-\x1b\x7f\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    r"\U000e0000-\U000e0fff"
)
_UNSEEN = f"[{_INVISIBLE}]*+"
_BETWEEN = r"[^\w<>[\]{}]*+"  # the words of a tag
_BLANK = r" \t\x1f\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_BREAKS = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
_TAG = r"[<\[{]*([<\[{])([^<>\[\]{}\n]{1,80})[>\]}]+"
_TAG_FIRST, _TAG_LAST = re.compile(_TAG), re.compile(_TAG + r"\Z")
_RUN = r"([^\w\s\\.,!?]|_)\1{2,}"
_MARK = re.compile(rf"[ \t]*(?:{_RUN}|(#)#{{0,5}}(?=\s|\Z))")
_RUN_LAST = re.compile(_RUN + r"\Z")


def neutralise(text: str, template: str, placeholders: tuple[str, ...]) -> str:
    """The text with a backslash in or before everything that reads as a fence of the template's placeholders."""
    for pattern in patterns(template, placeholders):
        text = pattern.sub(r"\1\\\2", text)
    return text


@functools.lru_cache
def patterns(template: str, placeholders: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """A pattern for each fence, without doubles; the backslash goes between its two groups. Empty if there is none.

    Each takes time linear in the text: its parts that repeat give nothing back, and none can read across the sign
    that the next match would begin with.
    """
    found: dict[str, None] = {}
    segments = re.split("|".join(map(re.escape, placeholders)), template)
    for before, after in itertools.pairwise(segments):
        found |= dict.fromkeys([*_ending(before), *_beginning(after)])
    return tuple(re.compile(source, re.IGNORECASE) for source in found)


def _ending(text: str) -> Iterator[str]:
    """Sources of the fences that a part of a template ends with, the last one first."""
    while text := text.rstrip():
        start = max(text.rfind("\n"), text.rfind("\r")) + 1
        if match := _TAG_LAST.search(text):
            yield from _tag(match)
            text = text[: match.start()]
        elif match := _MARK.match(text, start):
            yield _mark(match, anywhere=False)
            text = text[:start]
        elif match := _TAG_FIRST.match(text, start):  # "<|start|>assistant"
            yield from _tag(match)
            text = text[:start]
        elif match := _RUN_LAST.search(text):
            yield _mark(match, anywhere=True)
            text = text[: match.start()]
        else:
            return


def _beginning(text: str) -> Iterator[str]:
    """Sources of the fences that a part of a template begins with, the first one first."""
    same_line = True
    while stripped := text.lstrip():
        same_line = same_line and "\n" not in text[: len(text) - len(stripped)]
        if match := _TAG_FIRST.match(stripped):
            yield from _tag(match)
            text = stripped[match.end() :]
        elif match := _MARK.match(stripped):
            yield _mark(match, anywhere=same_line)
            text = stripped[match.end() :].partition("\n")[2]
            same_line = False
        else:
            return


def _tag(match: re.Match[str]) -> Iterator[str]:
    bracket, content = match.groups()
    words = re.findall(r"\w[\w.:-]*" if bracket == "<" else r"\w+", content)
    if bracket == "<":
        words = words[:1]  # what follows a name are attributes
    if words:
        lead = rf"[\\\s/{'|' if content[0] == '|' else ''}{_INVISIBLE}]*+"
        name = _BETWEEN.join(_UNSEEN.join(map(re.escape, word)) for word in words)
        yield rf"({re.escape(bracket)})(?={lead}{name}(?!{_UNSEEN}\w))()"


def _mark(match: re.Match[str], anywhere: bool) -> str:
    sign = match[0].strip()[0]
    least = min(2, len(match[0].strip())) if sign == "#" else 3
    sign = re.escape(sign)
    if anywhere:
        return rf"()({sign}(?:{_UNSEEN}{sign}){{{least - 1},}})"
    return rf"((?:\A|(?<=[{_BREAKS}]))[{_BLANK}{_INVISIBLE}]*+\\*+)({sign}(?:{_UNSEEN}{sign}){{{least - 1}}})"
