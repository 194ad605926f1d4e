"""The Self-Instruct request for new prompts and the reading of its completion (paper 2.2 step 1, 3.1.3, A.5).

The template is that of Wang et al. (2023) for non-classification tasks: a headline, the demonstrations as
numbers 1 to 8, and an open "9." for the model to go on from.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence

from selfreward_jax.errors import UserError

HEADLINE = "Come up with a series of tasks:"

# The original's mark of an item, and a bare number where the model stopped.
_NUMBERED_LINE = re.compile(r"\n(\d{1,9})\s?\.(?: |$)")
# A blank line, a separator, or a label that starts a line. A label inside a line belongs to the instruction.
_END_OF_LIST = re.compile(
    r"\n[ \t]*\n"
    r"|^[ \t]*(?:#{3}|---)"
    r"|^[ \t]*(?:={3,}|\*{3,}|_{3,})[ \t]*$"
    r"|^[ \t]*(?:\*\*)?(?:output|answer|response)s?(?:\*\*)?[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)


def pick_demonstrations(
    seeds: Sequence[str], generated: Sequence[str], rng: random.Random, n_seed: int = 6, n_generated: int = 2
) -> list[str]:
    """Demonstrations of one request (paper 3.1.3): `n_seed` seed prompts, `n_generated` generated ones.

    While fewer have been generated, more seeds fill up. All are shuffled together, so that a place does not
    tell the kind. Raises UserError if there are too few seeds.
    """
    machine = rng.sample(list(generated), min(n_generated, len(generated)))
    human_count = n_seed + n_generated - len(machine)
    if human_count > len(seeds):
        raise UserError(
            f"self-instruct: a request needs {human_count} different seed prompts, there are {len(seeds)}"
        )
    picked = machine + rng.sample(list(seeds), human_count)
    rng.shuffle(picked)
    return picked


def build_request(demonstrations: Sequence[str]) -> str:
    """The text to complete. It ends in the next number and a full stop, with no space after it.

    Each demonstration is put on one line, and a colon at its end is left out. Raises ValueError for none.
    """
    if not demonstrations:
        raise ValueError("a Self-Instruct request needs a demonstration")
    lines = [HEADLINE]
    for number, demonstration in enumerate(demonstrations, start=1):
        lines.append(f"{number}. {' '.join(demonstration.split()).rstrip(':')}")
    return "\n".join([*lines, f"{len(demonstrations) + 1}."])


def cut_answers(completion: str) -> str:
    """The completion up to where its list of instructions ends (paper A.5).

    Later models "first generate a few instructions, then generate a separator, and then start responding to
    the instructions". The list ends at a blank line, a separator line, or a line that starts with "Output:",
    "Answer:" or "Response:". Space at the start of the completion does not count.
    """
    text = completion.lstrip()
    end = _END_OF_LIST.search(text)
    return text[: end.start()] if end else text


def split_completion(completion: str, finish_reason: str, first_number: int = 9) -> tuple[list[str], Counter[str]]:
    """The raw instructions of a completion, without its answers (`cut_answers`).

    Only numbers that go on from `first_number` start an item. A lower number is a list inside an item and
    stays in it; a number that repeats or skips ends the list. If the completion was cut by the length limit
    (`finish_reason` "length"), its last item is dropped, unless the list had ended before. This is kinder
    than Self-Instruct, which then discards the whole response: a small model often runs to the limit after
    several good items. `split_completion_faithful` is the original.

    Returns:
        the instructions, and the number of items that are none of them by reason: "cut_off" by the limit,
        "out_of_order" (from a number that repeats or skips on), "behind_answers" (numbered, but behind the end of
        the list) and "empty".
    """
    completion = completion.lstrip()
    text = cut_answers(completion)
    starts, behind = (
        [match for match in _NUMBERED_LINE.finditer(part) if int(match[1]) >= first_number]
        for part in (text, completion[len(text) :])
    )
    drops = Counter(behind_answers=len(behind))
    items: list[str] = []
    start = 0
    for place, match in enumerate(starts):
        items.append(text[start : match.start()])
        start = match.end()
        if int(match[1]) != first_number + place + 1:
            drops["out_of_order"] = len(starts) - place
            break
    else:
        items.append(text[start:])
        if finish_reason == "length" and len(text) == len(completion):
            drops["cut_off"] = 1 if items.pop().strip() else 0
    written = [item.strip() for item in items if item.strip()]
    drops["empty"] = len(items) - len(written)
    return written, +drops  # without the zeros


def split_completion_faithful(
    completion: str, finish_reason: str, last_number: int = 16
) -> tuple[list[str], Counter[str]]:
    """The raw instructions as Self-Instruct takes them: nothing from a completion that hit the length limit.

    Otherwise everything between numbered lines, whatever the numbers are. The original's sampler stops at a blank
    line, at a line that begins with `last_number`, and wherever "16." or "16 ." stands, in "2016." too: the text is
    cut there, and what was cut did not hit the limit.

    Returns:
        the instructions, and {"completion_cut_off": 1} for a completion that gives none since it hit the limit.
    """
    stops = ("\n\n", f"\n{last_number}", f"{last_number}.", f"{last_number} .")
    ends = [place for place in map(completion.find, stops) if place >= 0]
    if not ends and finish_reason == "length":
        return [], Counter(completion_cut_off=1)
    return re.split(r"\n\d+\s?\. ", completion[: min(ends)] if ends else completion), Counter()
