"""One run a folder: a lock that the system frees when a process dies, or, on an object store, a heartbeat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath

from selfreward_jax import processes, stores
from selfreward_jax.errors import UserError

BEAT = 60.0  # seconds between two signs of life
STALE = 600.0  # without one for this long, a run on an object store is taken to be dead
_SETTLE = 2.0  # seconds in which two runs that start at once have both written their names


@contextlib.contextmanager
def locked(root: epath.Path) -> Iterator[None]:
    """Holds the run's folder while the job lives; process 0 does so for all.

    Raises:
        UserError: if another living run holds it, or the folder can't be written or isn't seen by every process.
    """
    with contextlib.ExitStack() as held:
        processes.together(lambda: _hold(root, held))
        _check_shared(root)
        yield


def _hold(root: epath.Path, held: contextlib.ExitStack) -> None:
    if stores.is_remote(root):
        stores.listing(root)  # no credentials, no bucket: said now, in one line
        held.enter_context(beating(root / ".lock.json"))
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        _flock(root, held.enter_context(open(os.fspath(root / ".lock"), "a+")))  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"--workdir={root}: {error.strerror or error}; take a folder that can be written, or make room"
        ) from error


def _flock(root: epath.Path, file: IO[str]) -> None:
    import fcntl  # POSIX only; imported here so that reading a workdir works elsewhere

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "?"
        raise UserError(f"--workdir={root}: process {owner} is working here; wait for it or stop it") from error
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Who holds a folder on an object store, as its lock object says."""

    name: str
    token: str
    time: float


@contextlib.contextmanager
def beating(path: epath.Path, beat: float = BEAT, stale: float = STALE, settle: float = _SETTLE) -> Iterator[None]:
    """Holds the lock object `path` by writing it anew every `beat` seconds.

    An object store has no lock that dies with its process. Two runs that begin at once both write, wait, and the one
    whose name is no longer there gives up. Clocks of hosts must agree to within minutes.

    Raises:
        UserError: if the object of another run is younger than `stale` seconds.
    """
    own = _Owner(f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex, 0.0)
    _refuse_other(path, own, stale)
    _write(path, own)
    time.sleep(settle)
    _refuse_other(path, own, stale)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(beat):
            # A failed sign of life is no reason to end a run; ten in a row leave the lock to others.
            with contextlib.suppress(OSError, UserError):
                _write(path, own)

    thread = threading.Thread(target=keep, daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, UserError):  # left behind it is stale in ten minutes
            stores.remove(path)


def _refuse_other(path: epath.Path, own: _Owner, stale: float) -> None:
    owner = _read(path)
    if owner is None or owner.token == own.token:
        return
    age = time.time() - owner.time
    if age < stale:
        raise UserError(
            f"--workdir={path.parent}: {owner.name} is working here (a sign of life {max(0.0, age):.0f} s ago);"
            f" stop it, or wait {stale - age:.0f} s if it is dead"
        )


def _read(path: epath.Path) -> _Owner | None:
    if not path.exists():
        return None
    try:
        found = json.loads(stores.read_whole(path))
        return _Owner(str(found["name"]), str(found["token"]), float(found["time"]))
    except (ValueError, KeyError, TypeError):
        return None  # no lock of ours


def _write(path: epath.Path, owner: _Owner) -> None:
    with stores.writing(path) as write:
        write(json.dumps(dataclasses.asdict(dataclasses.replace(owner, time=time.time()))).encode())


def _check_shared(root: epath.Path) -> None:
    """Refuses a folder that is not the same one on every host."""
    if processes.count() == 1:
        return
    mark = root / ".shared"
    token = processes.together(lambda: _mark(mark))

    def see() -> None:
        for _ in range(50):  # what one host wrote may take seconds to be seen by another
            if mark.exists() and mark.read_text() == token:
                return
            time.sleep(0.2)
        host = socket.gethostname()
        raise UserError(
            f"--workdir={root}: {host} does not see what process 0 writes there; give a folder all hosts share"
        )

    processes.each(see)
    processes.together(lambda: mark.unlink())


def _mark(path: epath.Path) -> str:
    token = uuid.uuid4().hex
    path.write_text(token)
    return token
