"""One run a folder: a lock that the system frees when a process dies, or, on an object store, a heartbeat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from io import FileIO

from etils import epath

from selfreward_jax import processes, stores
from selfreward_jax.errors import UserError
from selfreward_jax.workdir import write_text

BEAT = 60.0  # seconds between two signs of life
STALE = 600.0  # without one for this long, a run on an object store is taken to be dead
_SETTLE = 2.0  # seconds in which two runs that take over from a dead one at once have both written their names


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
        stores.ask(root)
        held.enter_context(beating(root / ".lock.json"))
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk did not take would be written again, in vain, when the file is closed.
        _flock(root, held.enter_context(open(os.fspath(root / ".lock"), "ab+", buffering=0)))  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"--workdir={root}: {error.strerror or error}; take a folder that can be written, or make room"
        ) from error


def _flock(root: epath.Path, file: FileIO) -> None:
    import fcntl  # POSIX only; imported here so that reading a workdir works elsewhere

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = (file.read() or b"").decode(errors="replace").strip() or "?"
        raise UserError(f"--workdir={root}: process {owner} is working here; wait for it or stop it") from error
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()} on {socket.gethostname()}".encode())


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Who holds a folder on an object store, as its lock object says."""

    name: str
    token: str
    time: float


def _end(line: str) -> None:
    """Ends this process at once: another run writes in the folder, and the main thread may be anywhere."""
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def beating(
    path: epath.Path,
    beat: float = BEAT,
    stale: float = STALE,
    settle: float = _SETTLE,
    lost: Callable[[str], None] = _end,
) -> Iterator[None]:
    """Holds the lock object `path` by writing it anew every `beat` seconds.

    An object store has no lock that dies with its process: it is made where there is none (`stores.create`), and taken
    over from an owner who was silent for `stale` seconds. One who was only slow, or paused, reads before each sign of
    life that it has lost the lock. Clocks of hosts must agree to within minutes.

    Args:
        lost: is given a line, by another thread, when the lock is another run's.

    Raises:
        UserError: if the object of another run is younger than `stale` seconds.
    """
    own = _Owner(f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex, 0.0)
    if _refuse_other(path, own, stale):
        stores.remove(path)
    stores.create(path, _text(own))
    time.sleep(settle)
    _refuse_other(path, own, stale)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(beat):
            # A failed sign of life is no reason to end a run; ten in a row leave the lock to others.
            with contextlib.suppress(OSError, UserError):
                owner = _read(path)
                if owner is None:  # removed by hand, or by a run that gave up
                    stores.create(path, _text(own))
                elif owner.token == own.token:
                    with stores.writing(path) as write:
                        write(_text(own))
                else:
                    lost(
                        f"--workdir={path.parent}: {owner.name} works here now; this run showed no sign of life in time"
                        " and ends; start it again when the other has ended"
                    )
                    return

    thread = threading.Thread(target=keep, daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, UserError):  # left behind it is stale in ten minutes
            owner = _read(path)
            if owner and owner.token == own.token:
                stores.remove(path)


def _refuse_other(path: epath.Path, own: _Owner, stale: float) -> bool:
    """Whether a dead run's object is in the way; a living run's is an error."""
    owner = _read(path)
    if owner is None or owner.token == own.token:
        return False
    age = time.time() - owner.time
    if age < stale:
        raise UserError(
            f"--workdir={path.parent}: {owner.name} is working here (a sign of life {max(0.0, age):.0f} s ago);"
            f" stop it, or wait {stale - age:.0f} s if it is dead"
        )
    return True


def _read(path: epath.Path) -> _Owner | None:
    text = stores.read_if_there(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
        return _Owner(str(found["name"]), str(found["token"]), float(found["time"]))
    except (ValueError, KeyError, TypeError):
        return _Owner("something else", "", 0.0)  # not ours: nobody's sign of life


def _text(owner: _Owner) -> bytes:
    return json.dumps(dataclasses.asdict(dataclasses.replace(owner, time=time.time()))).encode()


def _check_shared(root: epath.Path) -> None:
    """Refuses a folder that is not the same one on every host."""
    if processes.count() == 1:
        return
    mark = root / ".shared"
    token = processes.together(lambda: _mark(mark))

    def see() -> None:
        for _ in range(50):  # what one host wrote may take seconds to be seen by another
            if stores.exists(mark) and stores.read_whole(mark).decode() == token:
                return
            time.sleep(0.2)
        host = socket.gethostname()
        raise UserError(
            f"--workdir={root}: {host} does not see what process 0 writes there; give a folder all hosts share"
        )

    processes.each(see)
    processes.together(lambda: stores.remove(mark))


def _mark(path: epath.Path) -> str:
    token = uuid.uuid4().hex
    write_text(path, token)
    return token
