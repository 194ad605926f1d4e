"""Ctrl-C, and SIGTERM from a scheduler that takes the machine back: the run unwinds, or is ended after some seconds.

Training asks for the time to save first (`deferred`): schedulers give 30 seconds and more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

GRACE = 10.0  # seconds to unwind; schedulers send SIGKILL after 30
LINE = "stopped; start again to go on from here"


SAVING = "stopping: this update ends and is saved; once more to stop at once"


@dataclasses.dataclass
class Asked:
    """Which signal asked the program to end; 0: none did.

    Attributes:
        deferred: while the work looks at `number` itself: the first signal interrupts nothing.
    """

    number: int = 0
    deferred: bool = False


_OPEN = [Asked()]  # the last is what `signals` gave, while it is open; the first is never set


@contextlib.contextmanager
def deferred() -> Iterator[Asked]:
    """While this is open the first signal is noted, and a line says so; the second interrupts, as signals else do.

    What it is given to ends soon after `number` is set, and if it ended without a look at it, this interrupts; without
    `signals` around it nothing ever sets it.
    """
    asked = _OPEN[-1]
    asked.deferred = True
    try:
        yield asked
    finally:
        asked.deferred = False
    if asked.number:
        raise KeyboardInterrupt


@contextlib.contextmanager
def signals(grace: float = GRACE) -> Iterator[Asked]:
    """While this is open, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    Python raises it only when the main thread is back from what it computes, and that may be never: a collective waits
    for a process that is gone. After `grace` seconds the process ends all the same, with `LINE` and 128 + the number.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():  # it alone may set what a signal does
        yield asked
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()

    def heard(number: int, frame: object) -> None:
        first, asked.number = not asked.number, number
        if not (first and asked.deferred):
            raise KeyboardInterrupt

    def watch() -> None:
        first = True
        while number := os.read(reading, 1)[0]:
            if number not in before:
                continue
            if first and asked.deferred:
                first = False
                os.write(2, f"\n{SAVING}\n".encode())
            elif not ended.wait(grace):
                os.write(2, f"\n{LINE}\n".encode())  # sys.stderr may be locked by what hangs
                os._exit(128 + number)

    # SIGINT is ignored in a shell script's background, and stays so.
    both = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in both if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, heard)
    others = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True, name="signals")
    watcher.start()
    _OPEN.append(asked)
    try:
        yield asked
    finally:
        _OPEN.pop()
        ended.set()
        signal.set_wakeup_fd(others)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)
