"""Rounds of timed work: a side (pinned.py) does a piece of work (generate_work.py), and medians of all rounds count."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pinned
from benchmarks.generate_work import Work
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import progress

SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 0}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
TRIAL_TOKENS = 9  # with which a batch size is tried

Choice = Mapping[str, Any]
Completions = list[list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One timed piece of work of one side.

    Attributes:
        ended: completions that a stop id ended.
        core_share: of the pinned core, that the side got; below 1 others ran there too.
        threads: that did the work.
    """

    seconds: float
    tokens: int
    completions: int
    ended: int
    core_share: float
    threads: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """Rounds in a file, a line each, so that hours of work outlive their process.

    Attributes:
        file: None: nothing is kept.
        settings: of the benchmark; lines of other settings are not read.
        runs: by workload, side and number of the round.
    """

    file: Path | None
    settings: Choice
    runs: dict[tuple[str, str, int], list[Run]]

    def note(self, workload: str, side: str, number: int, runs: list[Run]) -> None:
        """Adds a line, unless the round is there."""
        if self.file is None or (workload, side, number) in self.runs:
            return
        self.runs[workload, side, number] = runs
        line = {"settings": self.settings, "workload": workload, "side": side, "round": number,
                "runs": [dataclasses.asdict(run) for run in runs]}  # fmt: skip
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")


NOTHING = Kept(None, {}, {})


def kept_in(file: Path, settings: Choice) -> Kept:
    """What is kept in a file, which need not be there yet.

    Raises:
        UserError: for a line that is none of `Kept.note`.
    """
    runs = {}
    for number, text in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        try:
            line = json.loads(text)
            if line["settings"] == settings:
                runs[line["workload"], line["side"], line["round"]] = [Run(**run) for run in line["runs"]]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file}: line {number} is no round of this benchmark: {e!r}; remove it") from None
    return Kept(file, settings, runs)


def sample(
    side: pinned.Side, work: Work, choice: Choice, how: Choice = SAMPLED, tokens: int = 0
) -> tuple[Run, Completions]:
    """Has a side do a piece of work, or with `tokens` a shorter one.

    Raises:
        UserError: if completions are missing, or are not of the length that was asked for.
    """
    tokens = tokens or work.tokens
    order = {"prompts": work.prompts, "samples": work.samples, "tokens": tokens, "stop": work.stop}
    reply = pinned.ask(side, **order, **how, **choice)
    rows = [ids for some in reply["completions"] for ids in some]
    least = 1 if work.stop else tokens
    wrong = sum(not least <= len(ids) <= tokens for ids in rows)
    if wrong or len(rows) != work.completions:
        raise UserError(
            f"{side.name}, {work.name}: {len(rows)} completions, {work.completions} were asked for; {wrong} are not of"
            f" {least} to {tokens} tokens"
        )
    ended = sum(ids[-1] in work.stop for ids in rows)
    run = Run(reply["seconds"], sum(map(len, rows)), len(rows), ended, reply["core_share"], reply["threads"])
    return run, reply["completions"]


def total(runs: Sequence[Run]) -> Run:
    """Pieces of work that one side did one after the other, as one."""
    added = {name: sum(getattr(run, name) for run in runs) for name in ("seconds", "tokens", "completions", "ended")}
    return Run(**added, core_share=min(run.core_share for run in runs), threads=max(run.threads for run in runs))


def faster_batch(side: pinned.Side, work: Work, sizes: Sequence[int]) -> tuple[Choice, dict[str, float]]:
    """The number of prompts with which `generate` of Hugging Face needs the least time a prompt.

    Each size is tried with few tokens: the time of the first, which reads the prompts, and that of a further one give
    the time of all. The prompts are those of middle length.

    Returns:
        the choice, and the estimated seconds a prompt by size.
    """
    estimates: dict[int, float] = {}
    ordered = sorted(work.prompts, key=len)
    tokens = min(TRIAL_TOKENS, work.tokens)
    known = sorted({min(size, len(ordered)) for size in sizes})
    for size in (known[0], *known):  # the first one twice: it warms the library up
        first = (len(ordered) - size) // 2
        # Without a stop, so that all of the batch goes on to the end of the trial.
        trial = dataclasses.replace(work, prompts=tuple(ordered[first : first + size]), tokens=tokens, stop=())
        order = {"prompts": trial.prompts, "samples": trial.samples, "tokens": tokens, "stop": (), "batch": size}
        steps = pinned.ask(side, **order, **SAMPLED, note_steps=True)["steps"]
        each = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
        estimates[size] = (steps[0] + (work.tokens - 1) * each) / size
    best = min(estimates, key=lambda size: estimates[size])
    return {"batch": best}, {str(size): round(seconds, 3) for size, seconds in estimates.items()}


def faster_cache(side: pinned.Side, work: Work) -> tuple[Choice, dict[str, float]]:
    """Whether llama.cpp is faster with one cache for all sequences or one each, by a whole run of both, and the seconds."""
    names = {"unified": True, "one each": False}
    seconds = {name: sample(side, work, {"unified": unified})[0].seconds for name, unified in names.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return {"unified": names[best]}, {name: round(taken, 2) for name, taken in seconds.items()}


def interleaved(
    name: str, sides: Sequence[pinned.Side], once: Callable[[pinned.Side], list[Run]], count: int, kept: Kept = NOTHING
) -> dict[str, list[list[Run]]]:
    """`count` rounds in which each side works once; the side that begins is another each time.

    Args:
        kept: rounds that an earlier process did are taken from there, and new ones noted.

    Returns:
        for each side the runs of each round: as many as `once` gives.
    """
    found: dict[str, list[list[Run]]] = {side.name: [] for side in sides}
    with progress(name, count * len(sides), "runs") as advance:
        for number in range(count):
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                runs = kept.runs.get((name, side.name, number)) or once(side)
                kept.note(name, side.name, number, runs)
                found[side.name].append(runs)
                run = total(runs)
                advance(1, f"{side.name}: {run.tokens / run.seconds:.1f} tokens/s")
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the wall-clock seconds that it took."""
    start = time.perf_counter()
    return work(), round(time.perf_counter() - start, 2)


def figures(rounds: Sequence[Run]) -> dict[str, Any]:
    """Medians of a side's rounds and their spread, least to greatest."""
    rates = [run.tokens / run.seconds for run in rounds]
    return {
        "tokens_per_second": round(statistics.median(rates), 2),
        "spread": [round(min(rates), 2), round(max(rates), 2)],
        "completions_per_second": round(statistics.median(run.completions / run.seconds for run in rounds), 4),
        "seconds": [round(run.seconds, 3) for run in rounds],
        "tokens": [run.tokens for run in rounds],
        "completions": rounds[0].completions,
        "ended_share": round(sum(run.ended for run in rounds) / sum(run.completions for run in rounds), 4),
        "core_share": round(min(run.core_share for run in rounds), 3),
        "threads": max(run.threads for run in rounds),
    }
