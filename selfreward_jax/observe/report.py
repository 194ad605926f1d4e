"""The closing table: a row a model, from the records of its stages."""

from __future__ import annotations

from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from selfreward_jax import processes, workdir
from selfreward_jax.observe.progress import say

COLUMNS = (
    "model", "loss", "parse rate", "judge accuracy [95 %]", "ties half [95 %]", "own score", "candidates' score", "pairs kept",
    "pairs dropped", "end of turn", "tokens", "seconds",
)  # fmt: skip


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def row(root: epath.Path, model: str, stages: list[str]) -> list[str]:
    """One model's cells, in the order of `COLUMNS`; "-" where a model has no such figure."""
    facts = {name.split("/")[1]: workdir.facts(root, name) for name in stages if name.startswith(f"{model}/")}
    train, check = facts.get("train", {}), facts.get("check", {})
    pairs = facts.get("pairs", {})
    parsed = check["parsed"] / check["judgments"] if check.get("judgments") else None
    accuracy = half = "-"
    if check.get("pairs"):
        accuracy = f"{check['accuracy']:.1%} [{check['low']:.1%}, {check['high']:.1%}] of {check['pairs']}"
        half = f"{check['half']:.1%} [{check['half_low']:.1%}, {check['half_high']:.1%}]"
    dropped = ", ".join(f"{reason} {count}" for reason, count in pairs.get("drops", {}).items()) or "-"
    seconds = sum(some.get("seconds", 0.0) for some in facts.values())
    ended = check.get("ended", 0) / check["answers"] if check.get("answers") else None
    return [
        model, _number(train.get("loss"), ".4f"), _number(parsed, ".1%"), accuracy, half,
        _number(check.get("own_score"), ".2f"), _number(pairs.get("mean_score"), ".2f"),
        _number(pairs.get("pairs"), "d"), dropped, _number(ended, ".1%"), _number(check.get("mean_tokens"), ".1f"),
        f"{seconds:.0f}",
    ]  # fmt: skip


def markdown(rows: list[list[str]]) -> str:
    """The table as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


NOTES = """
- loss: mean over the last epoch. SFT: nats a target token; DPO: nats a pair.
- parse rate: judgments of held-out replies that gave a score.
- judge accuracy: pairs of held-out ranked replies in the data's order; ties and missing scores count as wrong; the interval
  is a bootstrap over prompts.
- ties half: the same with half a point for a tie or a missing score, so that guessing gets 50 %. An interval that includes
  50 % claims nothing.
- own score: mean score that the model gives its own answers to the validation prompts. Each model is its own judge, so rows
  don't compare quality.
- candidates' score, pairs: of the data that this model was trained on.
- end of turn, tokens: of its answers to the validation prompts.
"""


def _show(title: str, rows: list[list[str]]) -> None:
    console = Console()
    if processes.index() or not console.is_terminal:
        say(markdown(rows))
        return
    table = Table(title=title, show_lines=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def write(root: epath.Path, models: list[str], stages: list[str]) -> None:
    """Prints the table and writes it, with the seconds of every stage, to `report.md`."""
    rows = [row(root, model, stages) for model in models]
    _show(str(root), rows)
    lines = [
        f"| {name} | {workdir.facts(root, name)['seconds']:.1f} |\n" for name in stages if workdir.facts(root, name)
    ]
    text = f"# Run {root.name}\n\n{markdown(rows)}{NOTES}\n| stage | seconds |\n| --- | --- |\n{''.join(lines)}"
    workdir.write_text(root / "report.md", text)
