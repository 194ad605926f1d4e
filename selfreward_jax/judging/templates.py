"""Judge prompts: the paper's Figures 2 and 7 or a user's own, and how a response is put into one.

The line breaks are restored: the text of the paper that both were taken from has none. 'multiple_choice' (A.2,
Figure 7, after Li et al. 2024, arXiv 2308.06259) has one line a criterion right below its first line, as the
prompt that it goes back to (their Table 19) is quoted; the parts stand as in 'additive'. The spaces of Figure 7
in "< response >" and "< rating >" are left out, taken for an effect of typesetting: Figure 2 and Table 19 have
none, and the judge is to write "Score: 4".

What stands in the two places comes from data or from the model that is being judged, so it must not be able
to end its place early. Placeholders inside the texts stay text (one pass over the template), and what fences them
in this template is made harmless, see fences.py. A "Score: 5" inside a response is left as it is: scores are parsed
from what the judge generates, never from its prompt.
"""

import dataclasses
import hashlib
import importlib.resources
import os
import re

from etils import epath

from selfreward_jax.errors import UserError
from selfreward_jax.judging import fences

INSTRUCTION = "<INSTRUCTION_HERE>"
RESPONSE = "<RESPONSE_HERE>"

# name: (file, sha256 of the prompt, lowest score, highest score). The sum pins the wording: one changed
# character of a judge prompt is another judge.
_BUILT_IN = {
    "additive": ("additive.txt", "2ee1f2185a36b0bace155bb1c091c7541a1f289385fb9f346bca46785ac9850e", 0, 5),
    "multiple_choice": (
        "multiple_choice.txt", "ccc75a14f14a21b16b0c35933aea08237a579ddbc5b56d98e019229dcb06f1c6", 1, 5
    ),
}  # fmt: skip
_DEFAULT_RANGE = (0, 5)  # of a file, which cannot say its own
_PLACEHOLDER = re.compile(f"{INSTRUCTION}|{RESPONSE}")


@dataclasses.dataclass(frozen=True)
class Template:
    """A judge prompt with each placeholder once, and the scores it can give, `low` to `high` inclusive."""

    name: str
    text: str
    low: int
    high: int


def load(name_or_path: str | os.PathLike[str], low: int | None = None, high: int | None = None) -> Template:
    """A built-in template, 'additive' or 'multiple_choice', or a UTF-8 file with the two placeholders.

    One line end at the end of the file is not part of the prompt.

    Args:
        name_or_path: the name of a built-in template (it goes before a file of that name), or a path.
        low: the lowest score; None for a built-in template's own (additive 0, multiple_choice 1), 0 for a file.
        high: the highest score; None for a built-in template's own (both 5), 5 for a file.

    Raises:
        UserError: the file is missing or is not UTF-8, a placeholder does not stand in it exactly once, or the
            score range is empty or, for a built-in template, not its own.
    """
    name = os.fspath(name_or_path)
    own_low, own_high = _BUILT_IN[name][2:] if name in _BUILT_IN else _DEFAULT_RANGE
    low, high = own_low if low is None else low, own_high if high is None else high
    problems = [] if 0 <= low < high else [f"score range {low} to {high}: must have 0 <= low < high"]
    if name in _BUILT_IN:
        file, digest = _BUILT_IN[name][:2]
        folder = importlib.resources.files("selfreward_jax.judging") / "templates"
        text = _without_line_end((folder / file).read_text(encoding="utf-8"))
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            problems.append(f"{folder / file}: the built-in template was changed; copy it and name the copy instead")
        if (low, high) != (own_low, own_high):
            problems.append(f"template '{name}' scores {own_low} to {own_high}, not {low} to {high}")
    else:
        text = _read(name)
        for placeholder in (INSTRUCTION, RESPONSE):
            if (count := text.count(placeholder)) != 1:
                problems.append(f"{name}: {placeholder} must stand in a judge template once, found {count} times")
    if problems:
        raise UserError(*problems)
    return Template(name, text, low, high)


def render(template: Template, instruction: str, response: str) -> str:
    """The judge's prompt for one response (paper 2.2, step 3)."""
    texts = {INSTRUCTION: neutralise(template, instruction), RESPONSE: neutralise(template, response)}
    return _PLACEHOLDER.sub(lambda match: texts[match.group()], template.text)


def neutralise(template: Template, text: str) -> str:
    r"""The text with a backslash for everything in it that reads as a fence of this template (see fences.py).

    With the built-in ones "</response>" becomes "<\/response>" and "< Response x>" becomes "<\ Response x>". A template
    that fences nothing leaves a text as it is.
    """
    return fences.neutralise(text, template.text, (INSTRUCTION, RESPONSE))


def _read(path: str) -> str:
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise UserError(f"judge template '{path}': neither a built-in ({', '.join(_BUILT_IN)}) nor a file")
    try:
        return _without_line_end(file.read_bytes().decode().replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n")
