"""A run's folder: atomic files and the record of finished stages. Local or gs:// (etils.epath).

A stage is done when its `stages/NAME.json` exists, was made from the inputs that are there now, and its outputs are
there as it left them. What a half-finished stage wrote is kept only if it was begun with the same settings.

All processes of a job call these functions in step: process 0 reads and writes for all (`processes.for_all`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from selfreward_jax import processes, stores
from selfreward_jax.errors import UserError


@processes.for_all
def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all: a temporary name in the same folder, then a rename; there for all on return.

    An object store has no rename, and publishes an object when it is written: there the file is written at once.

    Raises:
        UserError: if the disk is full or the folder can't be written; nothing is left under the final name.
    """
    if stores.is_remote(path):
        with stores.writing(path) as write:
            write(text.encode())
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the error that matters is the first
            temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def disk_error(path: object, error: OSError) -> UserError:
    """The line for a write that failed; what was written before stays, and the run continues from it."""
    return UserError(f"{path}: {error.strerror or error}; make room or mend it, then start again to go on from here")


def write_json(path: epath.Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: epath.Path) -> Any:
    """Reads a JSON file that the program wrote.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads(stores.read_whole(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON on line {error.lineno}; delete it to have its stage done again") from error


def _object(path: epath.Path, **parts: type | tuple[type, ...]) -> dict[str, Any]:
    """An object that the program wrote, with the parts that are asked for.

    Raises:
        UserError: if it is another kind of JSON: someone changed it.
    """
    found = read_json(path)
    if isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in parts.items()):
        return found
    needed = f"an object with {', '.join(parts)}" if parts else "an object"
    raise UserError(f"{path}: not what was written there ({needed}); delete it to have its stage done again")


def _record(path: epath.Path) -> dict[str, Any]:
    return _object(path, inputs=dict, outputs=dict, facts=dict, seconds=(int, float))


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def manifest(path: epath.Path) -> str:
    """Identity of a file (its bytes) or a folder (names and sizes of all its files; parameters are big)."""
    with stores.asking(path, "read"):
        if path.is_dir():
            return digest(sorted((str(file.relative_to(path)), file.stat().length) for file in _files(path)))
    return hashlib.sha256(stores.read_whole(path)).hexdigest()


def _entry(root: epath.Path, paths: Iterable[epath.Path]) -> dict[str, str]:
    return {str(path.relative_to(root)): manifest(path) for path in paths}


def record_path(root: epath.Path, stage: str) -> epath.Path:
    """Where "m2/responses" keeps its record: `m2/stages/responses.json`."""
    model, name = stage.split("/")
    return root / model / "stages" / f"{name}.json"


@processes.for_all
def is_done(root: epath.Path, stage: str) -> bool:
    """Whether the stage's record matches the inputs and outputs that are there."""
    path = record_path(root, stage)
    if not stores.exists(path):
        return False
    record = _record(path)
    for name, identity in (record["inputs"] | record["outputs"]).items():
        if not stores.exists(root / name) or manifest(root / name) != identity:
            return False
    return True


@processes.for_all
def begin(
    root: epath.Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Iterable[epath.Path],
    partial: Iterable[epath.Path],
) -> None:
    """Notes that a stage begins; what an earlier start of it left is kept if settings and inputs are the same.

    Args:
        settings: config fields that the stage depends on.
        inputs: files that it reads.
        partial: files and folders of the stage that a resume would continue; deleted if they are of another start.
    """
    mark = record_path(root, stage).with_suffix(".begun.json")
    identity = digest([dict(settings), _entry(root, inputs)])
    stores.remove(record_path(root, stage))
    if stores.exists(mark) and _object(mark, identity=str)["identity"] == identity:
        return
    for path in partial:
        remove(path)
    write_json(mark, {"identity": identity})


@processes.for_all
def finish(
    root: epath.Path,
    stage: str,
    inputs: Iterable[epath.Path],
    outputs: Iterable[epath.Path],
    seconds: float,
    facts: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Writes the stage's record, last of all.

    Args:
        facts: counts, drops by reason and figures, for the closing line and the report.
        made_by: versions, devices and flags (`made_by.made_by`), for whoever wants the same bytes again.
    """
    path = record_path(root, stage)
    record = {
        "stage": stage, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(seconds, 3),
        "facts": dict(facts), "inputs": _entry(root, inputs), "outputs": _entry(root, outputs),
        "made_by": dict(made_by or {}),
    }  # fmt: skip
    write_json(path, record)
    stores.remove(path.with_suffix(".begun.json"))


@processes.for_all
def facts(root: epath.Path, stage: str) -> dict[str, Any]:
    """The facts of a finished stage, with its seconds; {} if it has no record."""
    path = record_path(root, stage)
    if not stores.exists(path):
        return {}
    record = _record(path)
    return record["facts"] | {"seconds": record["seconds"]}


@processes.for_all
def exist(paths: Sequence[epath.Path]) -> list[bool]:
    """Which of these are there, as process 0 sees it."""
    return [stores.exists(path) for path in paths]


@processes.for_all
def remove(path: epath.Path) -> None:
    """Deletes a file or a folder, if it is there."""
    with stores.asking(path, "removed"):
        if path.is_dir():
            path.rmtree()
            return
    stores.remove(path)


def _config_before(path: epath.Path) -> dict[str, Any]:
    """The config that a run was begun with."""
    try:
        return _object(path)
    except UserError as error:
        (line,) = error.args
        advice = "put it back, or add --resume=override to go on with the config of this command"
        raise UserError(f"{line.split(';')[0]}; {advice}") from error


def _any_done(root: epath.Path) -> bool:
    """Whether any stage has a record, of whatever plan."""
    kept = (stores.listing(root / model / "stages") or {} for model in stores.listing(root) or {})
    return any(name.endswith(".json") and not name.endswith(".begun.json") for names in kept for name in names)


def parts(directory: epath.Path, count: int) -> list[epath.Path]:
    """Names of the parts of a long output: `part-00003-of-00040.jsonl`."""
    return [directory / f"part-{index:05d}-of-{count:05d}.jsonl" for index in range(count)]


@processes.for_all
def check_config(root: epath.Path, resolved: Mapping[str, Any], free: set[str], override: bool) -> None:
    """Compares the run's config with the one that the folder was begun with, and notes it.

    Args:
        resolved: all fields by dotted name.
        free: fields that may change, since they don't change what a stage makes.
        override: `--resume=override`: go on with the new values; finished stages stay.

    A start that made no stage left nothing that another config could contradict: a mistake in it can be mended in place.

    Raises:
        UserError: a line for each field that changed.
    """
    path = root / "config.json"
    resolved = json.loads(json.dumps(resolved))  # as it will be read back: a tuple is a list there
    if stores.exists(path) and not override and _any_done(root):
        before = _config_before(path)
        lines = [
            f"--config.{name}={resolved.get(name)!r}: this run was begun with {before.get(name)!r}"
            for name in sorted(set(before) | set(resolved))
            if name not in free and before.get(name) != resolved.get(name)
        ]
        if lines:
            raise UserError(*lines, f"--workdir={root}: take another folder, or add --resume=override to go on here")
    write_json(path, dict(resolved))
