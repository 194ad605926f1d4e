"""Checkpoints: the only file that knows orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from selfreward_jax import processes, stores, workdir
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.training import checksum

# Orbax logs tens of lines a save at INFO through absl, and at ERROR the traceback of what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# Of several arrays that cannot be read it raises the first's error; asyncio logs a traceback for each other.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@lru_cache  # once
def _hear_no_closed_loops() -> None:
    """When one array of several fails, orbax closes its event loop, and tensorstore's threads complain of that for the others."""
    before = sys.unraisablehook

    def hear(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hear


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A folder of training checkpoints, each named by its step; the newest `keep` stay beside the one being written.

    Each process writes its part in the background (`writer`). Orbax's own manager would decide on the step to restore on
    each process, and make a process whose part failed wait for the others before it says so.
    """

    directory: epath.Path
    keep: int
    writer: ocp.StandardCheckpointer


def open_folder(directory: epath.Path, keep: int) -> Checkpoints:
    """Opens a folder of training checkpoints, which need not be there; saving is asynchronous and atomic."""
    return Checkpoints(directory, keep, ocp.StandardCheckpointer())


def save(checkpoints: Checkpoints, step: int, state: Any, best: int = 0) -> None:
    """Starts saving a tree of arrays as the state after `step` updates; an earlier save is waited for.

    Args:
        best: a step that stays beside the newest.

    Raises:
        UserError: if the earlier save could not be written (a full disk), or this one cannot begin.
    """
    with _writing(checkpoints.directory):
        checkpoints.writer.wait_until_finished()
        _prune(checkpoints.directory, checkpoints.keep, best)
        checkpoints.writer.save(checkpoints.directory / str(step), _sealed(state), force=True)


def check(checkpoints: Checkpoints) -> None:
    """Raises UserError if this process could not write its part; asked often, as the other processes wait for it."""
    with _writing(checkpoints.directory):
        checkpoints.writer.check_for_errors()


def close(checkpoints: Checkpoints) -> None:
    """Waits for a save that has begun. A process may call this alone, at its end.

    Raises:
        UserError: if it could not be written.
    """
    with _writing(checkpoints.directory):
        checkpoints.writer.close()


def shapes_of(tree: Any) -> Any:
    """What `restore` needs to know of a tree of arrays, without the arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def restore(checkpoints: Checkpoints, like: Any, best: int = 0) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole as (step, tree), in the shapes, dtypes and shardings of `like`; None without one.

    One that is damaged, cut short or with a bit that changed, is passed over with a line that says so.

    Args:
        best: a step that is taken before the newest, if it is there.

    Raises:
        UserError: if there are some and all are of another tree: they are not deleted for that.
    """
    others = []
    for step in sorted(_whole(checkpoints.directory), key=lambda step: (step == best, step), reverse=True):
        found, problem = _read(checkpoints.directory / str(step), like)
        if not problem:
            return step, found
        say(f"{checkpoints.directory / str(step)}: {problem}; the one before it is used")
        if problem.startswith(_OTHER):
            others.append(problem)
    if others:
        raise UserError(f"{checkpoints.directory}: {others[0]}; move the folder away to begin again without it")
    return None


@processes.for_all
def _whole(directory: epath.Path) -> list[int]:
    """The steps that were saved to their end; all else is removed, so that no save may be going on."""
    there = stores.listing(directory) or {}
    whole = {path.name for path in ocp.utils.checkpoint_steps_paths(directory)} if there else set()
    steps = sorted(int(name) for name in whole if name.isdigit())
    for name in there.keys() - {str(step) for step in steps}:
        workdir.remove(directory / name)
    return steps


@processes.for_all
def _prune(directory: epath.Path, keep: int, best: int) -> None:
    """Leaves the newest `keep`, and the step `best`."""
    for step in _whole(directory)[:-keep]:
        if step != best:
            workdir.remove(directory / str(step))


def save_params(directory: epath.Path, params: Any) -> None:
    """Writes a tree of arrays; the folder appears whole or not at all.

    Raises:
        UserError: if it cannot be written (a full disk).
    """
    with _writing(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, _sealed(params), force=True)


def load_params(directory: epath.Path, like: Any) -> Any:
    """Reads a tree of arrays in the shapes, dtypes and shardings of `like` (arrays or `ShapeDtypeStruct`).

    Raises:
        UserError: if the folder is missing, damaged or does not hold that tree.
    """
    if not stores.exists(directory):
        raise UserError(f"{directory}: no parameters here; the stage that makes them has not finished")
    found, problem = _read(directory, like)
    if problem:
        raise UserError(f"{directory}: {problem}; delete the folder to have its stage done again")
    return found


_OTHER, _DAMAGED = "holds another model's arrays", "damaged"
# Of tensorstore: the disk or the store failed, which says nothing of what is stored there.
_UNREACHABLE = re.compile("UNAVAILABLE|PERMISSION_DENIED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED")


def _sealed(tree: Any) -> dict[str, Any]:
    """What is written: the arrays and their sums."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    return {"arrays": tree, "sums": checksum.sums(tree, mesh)}


def _read(directory: epath.Path, like: Any) -> tuple[Any, str]:
    """The arrays of a checkpoint, or what is wrong with it, on all processes alike.

    Raises:
        UserError: if the disk or the store does not let it be read.
    """
    shapes = shapes_of(like)
    leaves = jax.tree.leaves(shapes)
    wanted = {"arrays": shapes, "sums": np.zeros((len(leaves),), np.uint32)}
    problem, found = "", {}
    try:
        found = processes.each(lambda: _read_here(directory, wanted))
    except UserError as error:
        if not all(str(line).startswith((_OTHER, _DAMAGED)) for line in error.args):
            raise
        problem = "; ".join(error.args)
    if problem:
        _forget()
        return None, problem
    now = checksum.sums(found["arrays"], leaves[0].sharding.mesh)
    paths = [path for path, _ in jax.tree.leaves_with_path(shapes)]
    wrong = [_name(path) for path, same in zip(paths, now == found["sums"], strict=True) if not same]
    if wrong:
        return None, f"{_DAMAGED}: {', '.join(wrong[:3])}{' …' * (len(wrong) > 3)} not as saved"
    return found["arrays"], ""


def _forget() -> None:
    """Frees what orbax left of a read that failed: coroutines of other arrays, which complain when they are collected."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
    finally:
        sys.unraisablehook = before


def _read_here(directory: epath.Path, wanted: Any) -> Any:
    """This process' part, by orbax's handler: its checkpointers wait at the end for processes that may have failed."""
    _hear_no_closed_loops()
    handler = ocp.StandardCheckpointHandler()
    try:
        if different := _differences(handler.metadata(directory).tree, wanted):
            raise UserError(f"{_OTHER}: {', '.join(different)}")
        return handler.restore(directory, args=ocp.args.StandardRestore(wanted))
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except (
        Exception
    ) as error:  # orbax raises bare ones; damaged bytes fail in JSON, zstd, tensorstore and its own code
        cause = error.__cause__ or error
        said = str(cause).strip().split(" [tensorstore_spec")[0].split("\n")[0]
        _, _, said = said.rpartition('": ')  # tensorstore names paths before it
        reason = f"{type(cause).__name__}: {said[:200]}"
        if isinstance(error, PermissionError) or _UNREACHABLE.search(str(cause)):
            raise UserError(f"{directory}: cannot be read ({reason})") from error
        raise UserError(f"{_DAMAGED}, it cannot be read ({reason})") from error
    finally:
        handler.close()


def _differences(there: Any, wanted: Any) -> list[str]:
    """The first three arrays that are not as wanted, by name."""

    def described(tree: Any) -> dict[str, str]:
        found = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[_name(path)] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        return found

    have, need = described(there), described(wanted)
    names = sorted(name for name in have.keys() | need.keys() if have.get(name) != need.get(name))
    return [f"{name} is {have.get(name, 'missing')}, not {need.get(name, 'wanted')}" for name in names[:3]]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    _hear_no_closed_loops()
    try:
        yield
    except TimeoutError as error:  # of orbax, where the processes wait for each other's parts
        raise UserError(f"{directory}: another process did not write its part; its output says why") from error
    except (ValueError, OSError) as error:
        said = str(error)
        # tensorstore raises ValueError for a disk or store that fails, its reason behind a status and many paths
        if not isinstance(error, OSError) and not re.match("[A-Z_]+: ", said):
            raise
        reason = said.splitlines()[0].split(": ")[-1] if isinstance(error, ValueError) else error.strerror or said
        raise UserError(
            f"{directory}: cannot be written ({reason[:200]}); make room or mend it, then start again to go on from here"
        ) from error
