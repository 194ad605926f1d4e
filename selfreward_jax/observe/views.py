"""What is said of a run, of one artifact and of one prompt (the data of paper section 2), as lines of text.

A view reads what it needs; what it finds damaged goes to the problems of its look, for `damaged` to say at the end.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from selfreward_jax import workdir
from selfreward_jax.config import of_model
from selfreward_jax.errors import UserError
from selfreward_jax.judging.pairs import Candidate, Rule, choose_pair
from selfreward_jax.observe import artifacts, figures
from selfreward_jax.observe.artifacts import Artifact, Look, Row, Size, short
from selfreward_jax.observe.figures import Line, bars, counts_in, figure, kind, listed, spread

_SIDES = ("chosen", "rejected")
_TEXTS = ("text", "prompt", "response", "chosen", "rejected", "justification")


def damaged(look: Look) -> list[Line]:
    """A line for each thing that could not be read or does not fit the rest."""
    return [Line(f"problem: {short(problem, 400)}", "red", 0) for problem in dict.fromkeys(look.problems)]


# The whole run.


def of_run(look: Look) -> list[Line]:
    """The overview: stages, models, and what tells whether the run is healthy."""
    counts: dict[str, int] = {}
    health: list[Line] = []
    for name, artifact in look.artifacts.items():
        if not name.endswith(("/reference", "/preferences")):  # the pairs again
            slim, _ = artifacts.gather(look, artifact, 0, 0)
            counts[name] = len(slim)
            health += _summary(look, artifact, slim)
    named = [name for name in ("target", "model.source", "seed") if name in look.config]
    given = ", ".join(f"{name} {short(look.config[name])}" for name in named)
    out = [Line(f"{look.root}: {given or 'no config'}", "bold", 0), Line("stages", "bold", 0)]
    made: dict[str, Row] = {}
    for stage, (state, record) in artifacts.stages(look).items():
        made[stage] = artifacts.facts(record)
        out.append(_stage(stage, state, record, _so_far(look, stage, counts) if state == "in progress" else ""))
    out += [*_models(made), *_eft(made.get("m1/eft", {})), *health]
    return [*out, Line(f"for fields and examples name one of: {', '.join(look.artifacts) or 'none yet'}", "dim", 0)]


def _stage(stage: str, state: str, record: Row, so_far: str) -> Line:
    found, seconds = artifacts.facts(record), record.get("seconds")
    made = next((f"{value} {short(name)}" for name, value in found.items() if type(value) is int), so_far)
    took = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
    dropped = sum((counts_in(found.get(name)) for name in ("sets", "drops", "filtered", "unread")), Counter[str]())
    drops = listed({reason: count for reason, count in dropped.items() if reason != "accepted"})
    style = {"done": "", "not begun": "dim"}.get(state, "yellow")
    return Line(f"{stage:<16}{state:<12}{made:<18}{took:>11}{f'  dropped {drops}' if drops else ''}".rstrip(), style)


def _so_far(look: Look, stage: str, counts: Mapping[str, int]) -> str:
    """How much a stage in progress has left."""
    model, name = stage.split("/")
    made = {"train": [f"{model}/metrics"], "eft": [f"{model}/eft_judgments"], "prompts": [f"{model}/pool", "prompts"]}
    found = [look.artifacts[key] for key in counts if key in made.get(name, [stage]) or key.startswith(f"{stage}/")]
    parts = sum(artifact.parts for artifact in found)
    unit = "updates" if name == "train" else "rows"
    count = f"{sum(counts[artifact.name] for artifact in found)} {unit}" if found else ""
    return count + (f", {sum(len(artifact.files) for artifact in found)}/{parts} parts" if parts else "")


# What a check leaves of a model, as it is said; a part is left out if a run has no such figure.
_FIGURES = (
    "{parsed} of {judgments} scores read", "judge accuracy {accuracy:.1%} [{low:.1%}, {high:.1%}] of {pairs} pairs",
    "with half for ties {half:.1%}", "own score {own_score:.2f}", "{ended} of {answers} answers ended",
    "mean {mean_tokens:.1f} tokens",
)  # fmt: skip


def _models(made: Mapping[str, Row]) -> list[Line]:
    out = []
    for model in dict.fromkeys(stage.split("/")[0] for stage in made):
        loss, check = made.get(f"{model}/train", {}).get("loss"), made.get(f"{model}/check", {})
        known = {name for name, value in check.items() if type(value) in (int, float)}
        said = [f"loss {loss:.4f}"] if isinstance(loss, float) else []
        said += [form.format(**check) for form in _FIGURES if known.issuperset(re.findall(r"{(\w+)", form))]
        out += [Line(f"{model}: {'; '.join(said)}")] if said else []
    return [Line("models", "bold", 0), *out] if out else []


def _eft(made: Row) -> list[Line]:
    """Scores of the judge data; where it was built, of all judgments, of the replies accepted, and of those kept."""
    heads = {"judgments": "scores_judged", "accepted": "scores_before", "kept": "scores"}
    columns = {head: counts_in(made.get(name)) for head, name in heads.items()}
    names = sorted(set().union(*columns.values()), key=figures.by_value)
    if not names:
        return []
    out = [Line("judge data of m1/eft", "bold", 0)]
    if not columns["accepted"]:
        return out + bars("score", {name: columns["kept"][name] for name in names})
    table = [
        ("score", list(heads)),
        *((short(name, 24), [some[name] for some in columns.values()]) for name in names),
    ]
    return out + [Line(f"{name:<26}{''.join(f'{cell:>10}' for cell in cells)}") for name, cells in table]


# One artifact.


def of_artifact(look: Look, artifact: Artifact, examples: int, seed: int) -> list[Line]:
    """Counts, the summary of its kind, statistics of every field, and whole examples drawn by `seed`."""
    slim, drawn = artifacts.gather(look, artifact, examples, seed)
    out = _summary(look, artifact, slim) + [Line("fields", "bold", 0)] * bool(slim)
    for field in dict.fromkeys(field for row in slim for field in row):
        out += _field(field, [row[field] for row in slim if field in row], len(slim))
    for row in drawn:
        key = short(row.get("id", row.get("prompt_id", "")))
        out += [Line(f"example: {artifact.name} {key}".rstrip(), "bold cyan", 0), *whole(row)]
    hint = any("prompt_id" in row or "id" in row for row in drawn)
    return out + [Line("--id=ID shows a prompt with all that belongs to it", "dim", 0)] * hint


def _summary(look: Look, artifact: Artifact, slim: Sequence[Row]) -> list[Line]:
    found, files = kind(slim[0] if slim else {}), artifact.files
    parts = f" in {len(files)} of {artifact.parts} parts" if artifact.parts > 1 else ""
    out = [Line(f"{artifact.name}: {len(slim)} {found.noun}{'s' * (len(slim) != 1)}{parts}", "bold", 0)]
    said = [file.with_suffix(".json") for file in files if "round-" in file.name]
    rounds = [artifacts.read_object(file, look.problems) for file in said]
    if rounds:
        written = sum(some["raw"] for some in rounds if type(some.get("raw")) is int)
        drops = sum((counts_in(some.get("drops")) for some in rounds), Counter[str]())
        out.append(Line(f"{written} written in {len(rounds)} rounds; dropped {listed(drops) or 'none'}"))
    return out + (found.summary(slim) if slim else [])


def _field(name: str, values: Sequence[Any], total: int) -> list[Line]:
    present = [value for value in values if value is not None]
    absent = listed({"absent": total - len(values), "null": len(values) - len(present)})
    label = f"{short(name, 24)}{f' ({absent})' if absent else ''}"
    counts = Counter(str(value) for value in present if not isinstance(value, (Size, float)))
    if counts.total() == len(present) > len(counts) and len(counts) <= figures.FEW:
        return [Line(f"{label}: {listed(counts)}")]
    found: dict[str, list[float]] = {"items": [], "characters": [], "values": []}
    for value in present:
        if (length := figures.size(value)) is not None:
            found[value.unit if isinstance(value, Size) else "characters"].append(length)
        elif type(value) in (int, float) and math.isfinite(value):
            found["values"].append(value)
    return [Line(f"{label}: {unit} {spread(some)}") for unit, some in found.items() if some] or [Line(label)]


def whole(row: Row) -> list[Line]:
    """A row with all its texts; of lists of numbers how many and the first."""
    small, texts = [], []
    for field, value in row.items():
        items = list(enumerate(value)) if isinstance(value, list) else []
        if any(isinstance(item, str) for _, item in items):
            texts += [(f"{field} {place}", str(item)) for place, item in items]
        elif items:
            small.append(f"{short(field)}: {len(items)} items, {short(value, 32)}")
        elif isinstance(value, str) and (field in _TEXTS or len(value) > artifacts.LINE or "\n" in value):
            texts.append((field, value))
        else:
            small.append(f"{short(field)}: {short(value)}")
    blocks = [(Line(f"{short(name)} ({len(text)} characters)", "cyan"), Line(text, indent=4)) for name, text in texts]
    return [Line("; ".join(small))] * bool(small) + [line for block in blocks for line in block]


# One prompt.


def of_prompt(look: Look, key: str, scope: str) -> list[Line]:
    """A prompt with all that belongs to it, by folder: candidates, judgments, and the pair or why there is none.

    Args:
        key: the prompt's id.
        scope: an artifact; only those of its folder, and seed/, are searched. "" searches all.

    Raises:
        UserError: if no row has this id.
    """
    made = re.compile(re.escape(key) + r"(/\d+)?")  # "ID/2": an example made of candidate 2
    folders: dict[str, list[tuple[str, Row]]] = {}
    for name, artifact in look.artifacts.items():
        folder, wanted = name.rpartition("/")[0], scope.rpartition("/")[0]
        if not wanted or folder in (wanted, "seed"):  # ranked replies that are judged lie in seed/
            for row in artifacts.rows(look, artifact):
                if key == str(row.get("prompt_id")) or made.fullmatch(str(row.get("id"))):
                    folders.setdefault(folder, []).append((name, row))
    if not folders:
        raise UserError(f"--id={short(key)}: no row of {scope or look.root} has it")
    return [line for folder, found in folders.items() for line in _of_folder(look, folder, found)]


def _of_folder(look: Look, folder: str, found: Sequence[tuple[str, Row]]) -> list[Line]:
    out = [Line(folder or "pool", "bold", 0)]
    responses: dict[str, Row] = {}
    judgments: dict[str, list[Row]] = {}
    pair: Row = {}
    for name, row in found:
        noun = kind(row).noun
        if noun == "response":
            responses[str(row["index"])] = row
        elif noun == "judgment":
            judgments.setdefault(str(row["response_index"]), []).append(row)
        elif noun == "pair":
            pair = row
        else:
            out += [Line(name, "bold cyan"), *whole(row)]
    for index in sorted({*responses, *judgments}, key=lambda text: (len(text), text)):
        side = next((side for side in _SIDES if str(pair.get(f"{side}_index")) == index), "")
        name = f"candidate {short(index)}" + f" ({side})" * bool(side)
        out += _candidate(name, responses.get(index), judgments.get(index, []))
    if pair:
        said = {side: [short(pair.get(f"{side}_{field}")) for field in ("index", "score")] for side in _SIDES}
        sides = ", ".join(f"{side} {index} (score {score})" for side, (index, score) in said.items())
        out.append(Line(f"pair: {sides}", "bold"))
    elif responses and re.fullmatch(r"m\d+", folder):
        out.append(Line(f"no pair: {_why(look, folder, responses, judgments)}", "bold"))
    return out


def _scores(judgments: Sequence[Row]) -> tuple[Fraction, ...]:
    return tuple(score for row in judgments if (score := figures.worth(row)) is not None)


def _candidate(name: str, response: Row | None, judgments: Sequence[Row]) -> list[Line]:
    scores = _scores(judgments)
    said = f"mean {figure(statistics.mean(scores))} of " if scores else ""
    name += f": {said}{len(scores)} scores in {len(judgments)} judgments"
    if response:
        name += f"; {short(response.get('finish_reason'))}, {len(response.get('token_ids') or ())} tokens"
    out = [Line(name, "bold cyan"), *([Line(str(response["text"]), indent=4)] if response else [])]
    for row in judgments:
        none = row.get("score") is None
        read = f"no score: {short(row.get('reason') or 'not recorded')}" if none else f"score {short(row['score'])}"
        read += f", expected {short(row['expected'])}" if row.get("expected") is not None else ""
        out += [Line(f"judgment {short(row['sample'])}: {read}", "cyan", 4), Line(str(row.get("text")), indent=6)]
    return out


def _why(look: Look, model: str, responses: Mapping[str, Row], judgments: Mapping[str, list[Row]]) -> str:
    """Why a prompt has no pair: the rule of the run's config, applied again to what is there."""
    record = artifacts.read_object(workdir.record_path(look.root, f"{model}/pairs"), look.problems)
    if not record:
        return f"{model}/pairs is not done"
    rho = of_model(tuple(look.config.get("aift.length_control", (0.0,))), model)
    least, tie_break = look.config.get("aift.min_judgments", 1), look.config.get("aift.tie_break", "index")
    candidates = [
        Candidate(
            int(index), _scores(judgments.get(index, [])), row.get("finish_reason") == "stop",
            tuple(row.get("token_ids") or ()), str(row["text"]),
        )
        for index, row in responses.items() if index.isdecimal()
    ]  # fmt: skip
    choice = choose_pair(candidates, Rule(least, tie_break, Fraction(str(rho))))
    drops = listed(counts_in(artifacts.facts(record).get("drops"))) or "nothing"
    return choice if isinstance(choice, str) else f"left out after the choice; {model}/pairs dropped {drops}"
