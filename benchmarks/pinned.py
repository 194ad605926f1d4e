"""A side of a benchmark as a process of its own on one pinned core: it stays alive, and works only when it is asked.

The parent sends orders, a JSON object a line, to the child's standard input and reads one JSON object back for each.
Every reply carries how long the work took (`seconds`, wall clock), the share of the core that it got (`core_share`:
below 1 something else ran there), how many threads did it (`threads`) and the most memory that the process held
meanwhile (`peak_mb`).
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say

# Libraries that make a thread a core make one; nothing is fetched; no graphics card takes part.
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
BUSY = 0.01  # a thread counts when it did this share of the work
SHARED_CORE = 0.97  # a side that got less of the core than this is named

Do = Callable[[dict[str, Any]], dict[str, Any]]


def last_core() -> int:
    """The highest core that this process may use, or -1 where processes cannot be pinned (not Linux)."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1


def cpu_name() -> str:
    """The processor's name as the system states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@dataclasses.dataclass(frozen=True)
class Side:
    """A running child.

    Attributes:
        name: for people, e.g. "hf_bf16".
        log: a file of what it and its libraries print.
        about: what it said of itself when it was ready: versions, dtype, seconds to load.
    """

    name: str
    process: subprocess.Popen
    log: Path
    about: dict[str, Any]


def start(name: str, module: str, arguments: Sequence[str], core: int, folder: Path) -> Side:
    """Starts `python -m module CORE ARGUMENTS`, which calls `serve`, and waits until it is ready.

    Raises:
        UserError: if it ends before, with the last lines that it printed.
    """
    log = folder / f"{name}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(core), *arguments], env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    side = Side(name, process, log, {})
    return dataclasses.replace(side, about=_read(side))


def installed(name: str, needed: str) -> bool:
    """Whether what a side needs is there; a line if not."""
    if importlib.util.find_spec(needed) is not None:
        return True
    say(f"{name} is left out: {needed} is not installed (the extra 'bench' has it)")
    return False


def warn_if_shared(name: str, workload: str, core_share: float) -> None:
    """A line if a side did not have its core for itself."""
    if core_share < SHARED_CORE:
        say(f"warning: {name} got {core_share:.0%} of its core in a {workload} run: other work ran there")


def ask(side: Side, **order: Any) -> dict[str, Any]:
    """Sends an order and waits for the reply.

    Raises:
        UserError: if the child ends instead, with the last lines that it printed.
    """
    assert side.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so
        side.process.stdin.write(json.dumps(order) + "\n")
        side.process.stdin.flush()
    return _read(side)


def stop(side: Side) -> None:
    """Ends the child: its orders end, and if it is in the middle of one, it is killed."""
    assert side.process.stdin is not None and side.process.stdout is not None
    for pipe in (side.process.stdin, side.process.stdout):
        with contextlib.suppress(BrokenPipeError):  # an order that it never read
            pipe.close()
    try:
        side.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        side.process.kill()
        side.process.wait()


def _read(side: Side) -> dict[str, Any]:
    assert side.process.stdout is not None
    line = side.process.stdout.readline()
    if line.endswith("\n"):
        return json.loads(line)
    stop(side)
    said = side.log.read_text(errors="replace").strip().splitlines()
    raise UserError(
        f"{side.name}: its process ended with {side.process.returncode}; the last that it printed:", *said[-5:]
    )


def serve(make: Callable[[], tuple[dict[str, Any], Do]], core: int) -> None:
    """The child's end: pins itself, makes its model, says what it is, and answers orders until there are no more.

    Args:
        make: imports and loads; returns what the side says of itself, and the function that does an order.
    """
    if core >= 0:
        os.sched_setaffinity(0, {core})  # before any library counts the cores
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    begin = time.perf_counter()
    about, do = make()
    replies.write(json.dumps(about | {"load_seconds": round(time.perf_counter() - begin, 2)}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        forget_peak()
        before, cpu, begin = _thread_times(), time.process_time(), time.perf_counter()
        reply = do(order)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        spent = [ticks - before.get(thread, 0) for thread, ticks in _thread_times().items()]
        busy = sum(ticks > BUSY * sum(spent) for ticks in spent)
        reply |= {"seconds": seconds, "core_share": cpu / seconds, "threads": busy, "peak_mb": memory("VmHWM") / 1e6}
        replies.write(json.dumps(reply) + "\n")


def forget_peak() -> None:
    """Has the system count this process's peak memory anew; where it cannot, the peak since the start counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes of this process in main memory: "VmRSS" now, "VmHWM" at most; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def threads_named(name: str) -> int:
    """How many threads of this process have this name; 0 where the system does not say."""
    found = 0
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += task.read_text().strip() == name
    return found


def _thread_times() -> dict[str, int]:
    """Processor time of each thread of this process, clock ticks; {} where the system has no such account."""
    times = {}
    for task in Path("/proc/self/task").glob("*/stat"):
        try:
            fields = task.read_text().rsplit(")", 1)[1].split()
        except OSError:  # the thread has just ended
            continue
        times[task.parent.name] = int(fields[11]) + int(fields[12])
    return times or {str(threading.get_ident()): 0}
