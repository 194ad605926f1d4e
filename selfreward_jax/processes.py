"""The processes of one job: how they start, who writes, and how all of them learn what one has seen.

Every stage is one program that all processes run in step. What touches the run's folder is done by process 0 alone and
its outcome told to all (`together`), so that decisions, and errors, are the same everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

from selfreward_jax import cluster, rendezvous
from selfreward_jax.errors import UserError

T = TypeVar("T")
Args = ParamSpec("Args")


@dataclasses.dataclass
class _Job:
    index: int = 0
    count: int = 1
    for_all: bool = False  # while process 0 works for all


_JOB = _Job()  # of this process, from `start` to its end
# Seconds: all talk through process 0 and are aborted when it ends, so those that end for the same reason go first.
_LAST = 1.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands, as the command line says it.

    Attributes:
        coordinator: HOST:PORT of process 0, or "": found out from the machine (a TPU slice, Slurm, Kubernetes, MPI).
        count: processes of the job; 0: found out.
        index: of this process, from 0; -1: found out.
        timeout: seconds that processes wait for each other at the start.
        heartbeat: seconds without a sign of life after which a process is taken to be dead.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: int = 300
    heartbeat: int = 60


def index() -> int:
    """This process' number; 0 writes and speaks."""
    return _JOB.index


def count() -> int:
    """Processes of the job."""
    return _JOB.count


def of_job() -> str:
    """Which process a line is about, to be added to it; "" if there is one only."""
    return f" (process {_JOB.index} of {_JOB.count})" if _JOB.count > 1 else ""


def leave(code: int) -> NoReturn:
    """Ends this process of several at once: at a usual exit jax would wait for the others, which wait for this one."""
    if _JOB.index == 0:
        time.sleep(_LAST)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def start(place: Place, about: Mapping[str, str]) -> None:
    """Joins the job's processes, if there are several; before anything else touches jax.

    Args:
        about: what must be the same in all of them.

    Raises:
        UserError: if the place is incomplete or impossible, or the others do not arrive in time.
    """
    named = (bool(place.coordinator), place.count > 0, place.index >= 0)
    problems = []
    if any(named) and not all(named):
        problems.append(
            "--coordinator, --num_processes, --process_id: give all three, or none where they are found out"
        )
    if all(named) and not place.index < place.count:
        problems.append(f"--process_id={place.index}: from 0 to {place.count - 1}, as --num_processes={place.count}")
    for option, seconds in (("join_timeout", place.timeout), ("heartbeat_timeout", place.heartbeat)):
        if seconds < 1:
            problems.append(f"--{option}={seconds}: at least 1 second")
    if problems:
        raise UserError(*problems)
    if not any(named) and not cluster.several(os.environ) and not cluster.has_tpu(os.environ):
        return
    import jax  # not before it is needed: a wrong argument should not wait for it

    found = cluster.Found(place.coordinator, place.count, place.index) if all(named) else None
    found = found or cluster.find(os.environ, place.timeout)
    if found and (not found.coordinator or found.count == 1):
        return
    given: dict[str, Any] = {}
    if found:
        rendezvous.meet(found.coordinator, found.count, found.index, about, place.timeout)
        given = {"coordinator_address": found.coordinator, "num_processes": found.count, "process_id": found.index}
    # It would take SIGTERM for a notice and train on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=place.timeout, heartbeat_timeout_seconds=place.heartbeat,
            shutdown_timeout_seconds=place.heartbeat,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(_not_joined(found, str(error))) from error
    _JOB.index, _JOB.count = jax.process_index(), jax.process_count()
    if not found:
        _compare(about)


def _not_joined(found: cluster.Found | None, said: str) -> str:
    where = f"process {found.index} of {found.count} at {found.coordinator}" if found else "this process"
    reason = said.strip().splitlines()[0] if said.strip() else "no reason given"
    return f"{where} could not join the others ({reason}); start all of them, with the same count and coordinator"


def _compare(about: Mapping[str, str]) -> None:
    """What `rendezvous.meet` does before jax starts, where the processes could not meet before."""
    own, *others = (json.loads(text) for text in _gather(json.dumps(dict(about))))
    lines = [line for index, other in enumerate(others, 1) for line in rendezvous.differences(index, own, other)]
    if lines:
        raise _shared(lines)


def together(work: Callable[[], Any]) -> Any:
    """Does `work` on process 0 and gives its result to all; all must call this at the same point.

    Inside other work that process 0 does for all, it is simply done.

    Args:
        work: its result is JSON.

    Raises:
        UserError: on every process, if process 0's work raised it.
    """
    if _JOB.count == 1 or _JOB.for_all:
        return work()
    told: dict[str, Any] = {}
    if _JOB.index == 0:
        _JOB.for_all = True
        try:
            told = {"result": work()}
        except UserError as error:
            told = {"error": error.args}
        finally:
            _JOB.for_all = False
    told = json.loads(_gather(json.dumps(told))[0])
    if "error" in told:
        raise _shared(told["error"])
    return told["result"]


def for_all(function: Callable[Args, T]) -> Callable[Args, T]:
    """A function that process 0 does for all: each call is a `together`."""

    @functools.wraps(function)
    def shared(*args: Args.args, **kwargs: Args.kwargs) -> T:
        return together(lambda: function(*args, **kwargs))

    return shared


def each(work: Callable[[], T]) -> T:
    """Does `work` on every process and gives each its own result; all must call this at the same point.

    Raises:
        UserError: on every process, if the work of any raised it: the lines of all, with their process.
    """
    if _JOB.count == 1:
        return work()
    lines: list[str] = []
    result: Any = None
    try:
        result = work()
    except UserError as error:
        lines = list(error.args)
    said = [json.loads(text) for text in _gather(json.dumps(lines))]
    problems = {line: number for number, some in reversed(list(enumerate(said))) for line in some}
    if problems:
        raise _shared([f"{line} (process {number})" for line, number in problems.items()])
    return result


def _shared(lines: Sequence[str]) -> UserError:
    error = UserError(*lines)
    error.shared = True
    return error


def _gather(text: str) -> list[str]:
    """Every process' text on all. Lengths go first, and pad to a power of two: few shapes to compile."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray([len(data)], np.int32)).ravel()
    padded = np.zeros(1 << max(8, int(lengths.max() - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(_JOB.count, -1)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
