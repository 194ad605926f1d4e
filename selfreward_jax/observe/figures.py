"""Figures of rows as text: counts, statistics, histograms, and what tells whether an artifact is healthy.

That is, by the kind of its rows, what the loop can go wrong by (paper section 2): judgments that give no score or all
the same one, ties between candidates, chosen responses that are just longer, responses that do not end.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from selfreward_jax.observe.artifacts import Row, Size, short, visible

BAR, BINS, FEW = 30, 10, 12  # columns of the longest bar, bars of many numbers, values that are counted one by one
_WIDTHS = [Fraction(1, 10), Fraction(1, 2), *(digit * 10**power for power in range(16) for digit in (1, 2, 5))]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of output, or a text of several; `style` is rich's, for a terminal."""

    text: str
    style: str = ""
    indent: int = 2


def show(lines: Iterable[Line]) -> None:
    """Prints lines: wrapped and in colour on a terminal, plain elsewhere. Nothing in them is markup."""
    console = Console(highlight=False)
    for line in lines:
        text = visible(line.text)
        if console.is_terminal:
            console.print(Padding(Text(text, line.style, overflow="fold"), (0, 0, 0, line.indent), expand=False))
        else:
            print("\n".join((" " * line.indent + part).rstrip() for part in text.split("\n")))


# Numbers and counts.


def number(value: object) -> Fraction | None:
    """The score that a row holds, such as "4", "7/2" or "3.25"; None for anything else."""
    text = str(value) if type(value) in (str, int, float) else ""
    return Fraction(text) if re.fullmatch(r"-?\d{1,9}(/0*[1-9]\d{0,9}|\.\d{1,20})?", text, re.ASCII) else None


def worth(row: Row) -> Fraction | None:
    """The judgment's score as pairs count it: the expected one where that was asked for, else the one it states."""
    return number(row.get("score")) if row.get("expected") is None else number(row.get("expected"))


def size(value: object) -> int | None:
    """How long a text or a list is, whole or not; None for anything else."""
    return value.count if isinstance(value, Size) else len(value) if isinstance(value, str) else None


def binned(values: Sequence[int | Fraction]) -> dict[str, int]:
    """Counts in ranges with round edges, in order; those that are empty between others too."""
    if not values:
        return {}
    low, high = min(values), max(values)
    whole = all(value == int(value) for value in values)
    width = next(some for some in _WIDTHS if high - low <= some * BINS and (some >= 1 or not whole))
    counts = Counter(value // width for value in values)

    def label(place: int) -> str:
        first, after = place * width, (place + 1) * width
        if not whole:
            return f"{float(first):.2f}-{float(after):.2f}"
        return f"{first}" if width == 1 else f"{first}-{after - 1}"

    return {label(place): counts[place] for place in range(int(low // width), int(high // width) + 1)}


def bars(title: str, counts: Mapping[str, int]) -> list[Line]:
    """A histogram, a line a value; none if there is nothing to count."""
    total, most = sum(counts.values()), max(counts.values(), default=0)
    if not total:
        return []
    width = max(len(short(label, 24)) for label in counts)
    return [Line(title)] + [
        Line(f"{short(label, 24):>{width}} {n:>7} {n / total:>6.1%} {'█' * round(BAR * n / most)}", indent=4)
        for label, n in counts.items()
    ]


def figure(value: Any) -> str:
    """A number with as many digits as one reads."""
    if value == int(value):
        return str(int(value))
    return f"{float(value):.1f}" if abs(value) >= 1000 else f"{float(value):.4g}"


def spread(values: Sequence[float]) -> str:
    """Least, median, mean and most, and the histogram in eight marks."""
    low, high = min(values), max(values)
    figures = {"min": low, "median": statistics.median(values), "mean": statistics.fmean(values), "max": high}
    text = "  ".join(f"{name} {figure(value)}" for name, value in figures.items())
    if low == high:
        return text
    places = Counter(min(int((value - low) / (high - low) * 8), 7) for value in values)
    return f"{text}  |{''.join(' ▁▂▃▄▅▆▇█'[math.ceil(8 * places[i] / max(places.values()))] for i in range(8))}|"


def counts_in(value: object) -> Counter[str]:
    """The counts by reason that a record holds; none if it holds something else."""
    return Counter({key: n for key, n in value.items() if type(n) is int} if isinstance(value, dict) else {})


def listed(counts: Mapping[str, int]) -> str:
    """The counts above 0 on one line."""
    return ", ".join(f"{short(key, 40)} {counts[key]}" for key in sorted(counts, key=by_value) if counts[key])


def by_value(text: str) -> tuple[bool, Fraction, str]:
    """Sorts numbers by value, before other texts."""
    value = number(text)
    return value is None, value or Fraction(0), text


def share(count: int, total: int, things: str = "") -> str:
    """A part of a whole, such as "3 of 4 candidates (75.0%)"."""
    return f"{count} of {total} {things}".rstrip() + f" ({count / total:.1%})"


# The kinds of rows.


def _sizes(some: Sequence[Row], field: str) -> list[int]:
    return [length for row in some if (length := size(row.get(field))) is not None]


def _lengths(some: Sequence[Row], field: str, name: str) -> list[Line]:
    sizes = _sizes(some, field)
    return [Line(f"{name}: {spread(sizes)}")] if sizes else []


def _tally(some: Sequence[Row], field: str) -> list[Line]:
    counts = Counter(short(row[field], 24) for row in some if row.get(field) is not None)
    said = [f"{value} {count} ({count / counts.total():.1%})" for value, count in counts.most_common(FEW)]
    more = f", and {len(counts) - FEW} more values" if len(counts) > FEW else ""
    return [Line(f"{field}: {', '.join(said)}{more}")] if said else []


def _texts(some: Sequence[Row]) -> list[Line]:
    fields = ("text", "prompt", "response")
    return _tally(some, "source") + [line for name in fields for line in _lengths(some, name, f"{name}, characters")]


def _ranked(some: Sequence[Row]) -> list[Line]:
    return bars("replies", binned(_sizes(some, "replies")))


def _responses(some: Sequence[Row]) -> list[Line]:
    return [*_tally(some, "finish_reason"), *_lengths(some, "token_ids", "tokens"), *_texts(some)]


def _by_candidate(
    some: Iterable[Row], score: Callable[[Row], Fraction | None]
) -> dict[tuple[str, str], list[Fraction]]:
    """The scores of each candidate, by prompt and index; one without a score is left out."""
    found: dict[tuple[str, str], list[Fraction]] = {}
    for row in some:
        if (one := score(row)) is not None:
            found.setdefault((str(row.get("prompt_id")), str(row.get("response_index"))), []).append(one)
    return found


def _judgments(some: Sequence[Row]) -> list[Line]:
    stated = list(_by_candidate(some, lambda row: number(row.get("score"))).values())
    read = [score for scores in stated for score in scores]
    unread = Counter(str(row.get("reason") or "not recorded") for row in some if number(row.get("score")) is None)
    out = [Line(f"{len(read)} of {len(some)} judgments gave a score ({len(read) / len(some):.1%})")]
    exact = {figure(score): count for score, count in sorted(Counter(read).items())}
    few = len(exact) <= FEW and any(score.denominator > 1 for score in read)
    out += [*bars("score", exact if few else binned(read)), *bars("no score, because", dict(unread.most_common(FEW)))]
    prompts: dict[str, Counter[Fraction]] = {}  # prompt -> its candidates' means
    for (prompt, _), scores in _by_candidate(some, worth).items():
        prompts.setdefault(prompt, Counter())[statistics.mean(scores)] += 1
    if several := [scores for scores in stated if len(scores) > 1]:
        same = share(sum(len(set(scores)) == 1 for scores in several), len(several), "candidates")
        out.append(Line(f"K agreement: all scores are equal for {same}"))
        out += bars(
            "mean score of a candidate", binned([mean for means in prompts.values() for mean in means.elements()])
        )
    if couples := sum(math.comb(means.total(), 2) for means in prompts.values()):
        tied = sum(math.comb(count, 2) for means in prompts.values() for count in means.values())
        flat = sum(len(means) == 1 < means.total() for means in prompts.values())
        equal = share(tied, couples, "couples of candidates")
        out.append(Line(f"ties: equal means for {equal}; of all candidates in {flat} of {len(prompts)} prompts"))
    return out + _responses(some)  # a judgment is a response too


def _pairs(some: Sequence[Row]) -> list[Line]:
    sides = {
        "score": lambda row, side: number(row.get(f"{side}_score")),
        "tokens": lambda row, side: size(row.get(f"{side}_ids")),
        "characters": lambda row, side: size(row.get(side)),
    }
    table = [Line(f"{'mean':<12}{'chosen':>10}{'rejected':>10}{'difference':>12}")]
    after: list[Line] = []
    for name, value in sides.items():
        both = [(a, b) for row in some if None not in (a := value(row, "chosen"), b := value(row, "rejected"))]
        if not both:
            continue
        one, other = (float(sum(side) / len(both)) for side in zip(*both, strict=True))
        table.append(Line(f"{name:<12}{one:>10.2f}{other:>10.2f}{one - other:>+12.2f}"))
        if name == "score":
            after += bars("chosen score less rejected score", binned([a - b for a, b in both]))
        else:
            after.append(Line(f"chosen has more {name} in {share(sum(a > b for a, b in both), len(both))}"))
    return table + after


def _updates(some: Sequence[Row]) -> list[Line]:
    losses = [row["loss"] for row in some if isinstance(row.get("loss"), float)]
    return [Line(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")] if losses else []


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of rows: what one is called, the fields that tell it, and what to say of many."""

    noun: str
    fields: frozenset[str]
    summary: Callable[[Sequence[Row]], list[Line]]


_KINDS = (
    Kind("judgment", frozenset({"response_index", "sample"}), _judgments),
    Kind("response", frozenset({"prompt_id", "index", "text"}), _responses),
    Kind("pair", frozenset({"prompt", "chosen", "rejected"}), _pairs),
    Kind("ranked set", frozenset({"replies", "ranks"}), _ranked),
    Kind("example", frozenset({"prompt", "response"}), _texts),
    Kind("prompt", frozenset({"text", "source"}), _texts),
    Kind("update", frozenset({"step"}), _updates),
    Kind("row", frozenset(), lambda some: []),
)


def kind(row: Row) -> Kind:
    """The first kind whose fields the row has."""
    return next(some for some in _KINDS if some.fields <= row.keys())
