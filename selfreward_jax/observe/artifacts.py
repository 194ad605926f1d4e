"""What a run has left in its folder: the rows of its artifacts and the records of its stages (paper section 2).

Rows are read as plain objects, so that a run of another version shows too: a field that is absent is absent. A
damaged or half-written part costs one line, and the rest is read. Nothing read is trusted: `visible` makes it safe.
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import models
from selfreward_jax.data.rows import scan
from selfreward_jax.errors import UserError

Row = Mapping[str, Any]

QUIET = 3.0  # seconds of reading without a word
LINE = 60  # characters of a text that stands beside its name
_ORDER = (
    "seed", "prompts", "sft", "pool", "responses", "judgments", "pairs", "preferences", "positives", "reference",
)  # fmt: skip
_PART = re.compile(r"(?:part|round|segment)-\d+(?:-of-(\d+))?\.jsonl")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The rows that a stage left: one jsonl file, or a folder of parts.

    Attributes:
        name: path under the workdir, without ".jsonl".
        parts: how many files it has when it is whole; 0 where their names do not say.
    """

    name: str
    files: tuple[epath.Path, ...]
    parts: int = 0


@dataclasses.dataclass(frozen=True)
class Look:
    """What there is to look at.

    Attributes:
        config: the run's fields by dotted name; {} if they cannot be read.
        problems: a line for each thing that is damaged; whoever reads adds to it.
    """

    root: epath.Path
    config: Row
    artifacts: Mapping[str, Artifact]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is kept of a long text or a list: how many characters or items."""

    count: int
    unit: str


def visible(text: str) -> str:
    """The text with what could move a cursor, hide or reorder shown as an escape, such as \\x1b; "\\n" stays."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(
        char if char == "\n" or unicodedata.category(char) not in hidden else char.encode("unicode_escape").decode()
        for char in text
    )


def short(value: object, width: int = LINE) -> str:
    """A value on one line, visible and cut to the width."""
    text = visible(str(value)).replace("\n", "\\n")
    return text if len(text) <= width else f"{text[: width - 1]}…"


# Artifacts.


def open_look(root: epath.Path) -> Look:
    """Finds what a run has left so far.

    Raises:
        UserError: if the folder is not there, or no run's.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; the workdir of a run is needed")
    problems: list[str] = []
    config = read_object(root / "config.json", problems)
    begun = any((path / "stages").is_dir() for path in _listing(root, problems))
    if "target" not in config and not begun:
        raise UserError(f"{root}: not the workdir of a run: it has no config.json of one, and no stages")
    files: dict[str, list[epath.Path]] = {}
    _collect(root, "", files, problems)
    found = {}
    for name in sorted(files, key=_place):
        matches = [_PART.fullmatch(path.name) for path in files[name]]
        parts = max((int(match[1] or 0) for match in matches if match), default=0)
        found[name] = Artifact(name, tuple(files[name]), parts)
    return Look(root, config, found, problems)


def _collect(folder: epath.Path, prefix: str, files: dict[str, list[epath.Path]], problems: list[str]) -> None:
    for path in _listing(folder, problems):
        if prefix and _PART.fullmatch(path.name):
            files.setdefault(prefix[:-1], []).append(path)
        elif path.name.endswith(".jsonl") and not path.name.startswith("."):
            files.setdefault(prefix + path.name.removesuffix(".jsonl"), []).append(path)
        elif path.name not in ("params", "checkpoints", "model", "stages"):  # weights and records hold no rows
            _collect(path, f"{prefix}{path.name}/", files, problems)


def _listing(folder: epath.Path, problems: list[str]) -> list[epath.Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []
    except FileNotFoundError:  # a run in progress deletes what it does again
        return []
    except OSError as error:
        problems.append(str(error))
        return []


def _place(name: str) -> list[tuple[int, int, str]]:
    """Sorts names as the loop makes them: seed, prompts, sft, m1, ..., m10, and within a model by stage."""
    return [
        (_ORDER.index(part) if part in _ORDER else len(_ORDER), int("0" + "".join(re.findall("[0-9]", part))), part)
        for part in name.split("/")
    ]


def choose(look: Look, name: str) -> Artifact:
    """The artifact of a name ("m2/pairs"), or of a path from the workdir or from here; a part is its only file then.

    Raises:
        UserError: one line with all that are there.
    """
    wanted = name.rstrip("/").removesuffix(".jsonl")
    if wanted in look.artifacts:
        return look.artifacts[wanted]
    paths = [path.resolve() for path in (look.root / name, epath.Path(name)) if path.exists()]
    for artifact in look.artifacts.values():
        if (look.root / artifact.name).resolve() in paths:
            return artifact
        for file in artifact.files:
            if file.resolve() in paths:
                return dataclasses.replace(artifact, files=(file,))
    raise UserError(f"{name}: no such artifact; there are: {', '.join(map(short, look.artifacts)) or 'none yet'}")


def rows(look: Look, artifact: Artifact) -> Iterator[Row]:
    """The rows that can be read, one file in memory at a time; each file that has others becomes one problem."""
    told = time.monotonic()
    for place, file in enumerate(artifact.files):
        if time.monotonic() - told > QUIET:
            told = time.monotonic()
            done = f"{place} of {len(artifact.files)} files"
            print(f"reading {short(artifact.name)}: {done}", file=sys.stderr, flush=True)
        try:
            found, bad = scan(file) if file.stat().length else ([], [])
        except (UserError, OSError) as error:
            look.problems.append(str(error))
            continue
        if bad:
            look.problems.append(min(bad)[1] + (f" ({len(bad)} bad lines)" if len(bad) > 1 else ""))
        yield from (row for _, row in found)


def gather(look: Look, artifact: Artifact, examples: int, seed: int) -> tuple[list[Row], list[Row]]:
    """All rows without their long values, and some whole ones, each as likely as any other, in their order."""
    rng, slim, drawn = random.Random(seed), [], []
    for place, row in enumerate(rows(look, artifact)):
        slim.append({field: _slim(value) for field, value in row.items()})
        if len(drawn) < examples:
            drawn.append((place, row))
        elif examples and (at := rng.randint(0, place)) < examples:
            drawn[at] = (place, row)
    return slim, [row for _, row in sorted(drawn, key=lambda pair: pair[0])]


def _slim(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LINE else Size(len(value), "characters")
    return Size(len(value), "items") if isinstance(value, (list, dict)) else value


# Records.


def read_object(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    """The object of a JSON file; {} if the file is not there, or, with a problem more, if it cannot be read."""
    try:
        found = workdir.read_json(path) if path.exists() else {}
    except (UserError, OSError, ValueError) as error:
        problems.append(f"{error}" if str(path) in str(error) else f"{path}: {error}")
        return {}
    if isinstance(found, dict):
        return found
    problems.append(f"{path}: an object is needed")
    return {}


def facts(record: Row) -> Row:
    """What a stage's record says of what it made."""
    return record["facts"] if isinstance(record.get("facts"), dict) else {}


def planned(config: Row) -> list[str]:
    """The stages of the loop for a config, in order; [] if its target is none of the loop's."""
    target = str(config.get("target"))
    if not re.fullmatch(r"sft|m[1-9][0-9]{0,2}", target):
        return []
    chosen = ("pairs", *(("reference",) if config.get("dpo.reference") == "cached" else ()))
    if config.get("aift.method") == "positives":
        chosen = ("positives",)
    data = {"sft": (), "m1": ("eft",)}
    return ["seed/split"] + [
        f"{model}/{stage}"
        for model in models(target)
        for stage in (*data.get(model, ("prompts", "responses", "judgments", *chosen)), "train", "export", "check")
    ]


def stages(look: Look) -> dict[str, tuple[str, Row]]:
    """Every stage with its state and its record ({} without one), in the order of the loop.

    A state is "not begun", "in progress", "done", "damaged" (its record) or "outdated" (what it made is gone).
    """
    there: dict[str, bool] = {}  # stage -> whether its record is there, not just its beginning
    for folder in _listing(look.root, look.problems):
        for path in _listing(folder / "stages", look.problems):
            name, _, ending = path.name.partition(".")
            if ending in ("json", "begun.json"):
                there[f"{folder.name}/{name}"] = ending == "json" or there.get(f"{folder.name}/{name}", False)
    names = planned(look.config)
    if there and not set(there) & set(names):
        names = []  # training on people's own data is not the loop
    out: dict[str, tuple[str, Row]] = {}
    for stage in dict.fromkeys([*names, *there]):
        record = read_object(workdir.record_path(look.root, stage), look.problems) if there.get(stage) else {}
        state = "in progress" if stage in there else "not begun"
        if there.get(stage):
            state = "done" if record else "damaged"
        if gone := [path for path in record.get("outputs") or () if not (look.root / path).exists()]:
            state = "outdated"
            look.problems.append(f"{stage}: {', '.join(gone)} is gone, so the run would do this stage again")
        out[stage] = state, record
    return out
