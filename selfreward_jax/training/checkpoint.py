"""Checkpoints: the only file that knows orbax."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from selfreward_jax.errors import UserError

# Orbax logs tens of lines a save at INFO through absl, and at ERROR the traceback of what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def manager(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
    """Opens (or makes) a folder of training checkpoints; saving is asynchronous and atomic, the last `keep` stay."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts saving a tree of arrays as the state after `step` updates; an earlier save is waited for.

    Raises:
        UserError: if the earlier save could not be written (a full disk), or this one cannot begin.
    """
    with _writing(epath.Path(manager.directory)):
        manager.save(step, args=ocp.args.StandardSave(state))


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for a save that has begun.

    Raises:
        UserError: if it could not be written.
    """
    with _writing(epath.Path(manager.directory)):
        manager.close()


def restore(manager: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """The newest checkpoint as (step, tree), in the shapes, dtypes and shardings of `like`; None if there is none."""
    step = manager.latest_step()
    if step is None:
        return None
    return step, manager.restore(step, args=ocp.args.StandardRestore(_abstract(like)))


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
    if not directory.exists():
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
