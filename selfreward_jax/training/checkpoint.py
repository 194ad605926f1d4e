"""Checkpoints: the only file that knows orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from selfreward_jax import processes, stores, workdir
from selfreward_jax.errors import UserError

# Orbax logs tens of lines a save at INFO through absl, and at ERROR the traceback of what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


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


def save(checkpoints: Checkpoints, step: int, state: Any) -> None:
    """Starts saving a tree of arrays as the state after `step` updates; an earlier save is waited for.

    Raises:
        UserError: if the earlier save could not be written (a full disk), or this one cannot begin.
    """
    with _writing(checkpoints.directory):
        checkpoints.writer.wait_until_finished()
        _tidied(checkpoints.directory, checkpoints.keep)
        checkpoints.writer.save(checkpoints.directory / str(step), state, force=True)


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


def restore(checkpoints: Checkpoints, like: Any) -> tuple[int, Any] | None:
    """The newest checkpoint as (step, tree), in the shapes, dtypes and shardings of `like`; None if there is none."""
    steps = _tidied(checkpoints.directory, checkpoints.keep)
    if not steps:
        return None
    return steps[-1], checkpoints.writer.restore(checkpoints.directory / str(steps[-1]), _abstract(like))


@processes.for_all
def _tidied(directory: epath.Path, keep: int) -> list[int]:
    """The newest `keep` steps that are whole; all else is removed, so that no save may be going on."""
    there = stores.listing(directory) or {}
    whole = {path.name for path in ocp.utils.checkpoint_steps_paths(directory)} if there else set()
    steps = sorted(int(name) for name in whole if name.isdigit())[-keep:]
    for name in there.keys() - {str(step) for step in steps}:
        workdir.remove(directory / name)
    return steps


def save_params(directory: epath.Path, params: Any) -> None:
    """Writes a tree of arrays; the folder appears whole or not at all.

    Raises:
        UserError: if it cannot be written (a full disk).
    """
    with _writing(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, params, force=True)


def load_params(directory: epath.Path, like: Any) -> Any:
    """Reads a tree of arrays in the shapes, dtypes and shardings of `like` (arrays or `ShapeDtypeStruct`).

    Raises:
        UserError: if the folder is missing or does not hold that tree.
    """
    if not stores.exists(directory):
        raise UserError(f"{directory}: no parameters here; the stage that makes them has not finished")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory, _abstract(like))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"{directory}: cannot be read as this model's parameters: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
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


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
