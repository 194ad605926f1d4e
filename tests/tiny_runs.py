"""Real runs of the `tiny` preset as processes of their own, and what can happen to them: for tests/faults/.

Each fault is one start of the run that ends before its end. It hits inside a stage: the parent reads the child's log, in
which no line is left out, up to a line of that stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from selfreward_jax import presets, recipe
from selfreward_jax.config import from_config_dict

ROOT = Path(__file__).resolve().parents[1]
# Small enough to be started a dozen times in CI; every stage of the recipe is there.
SMALL = ("--config.sft.checkpoint_every=8", "--config.check.k=1", "--config.engine.part=16")  # two parts of responses
PROGRAM = ("-m", "selfreward_jax.main")
# The clock that Python reads is a day off, and goes back two days at every other look.
JUMPING = """
import itertools, runpy, sys, time
read, looks = time.time, itertools.count()
time.time = lambda: read() + 86400 - 172800 * (next(looks) % 2)
runpy.run_module("selfreward_jax.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that nothing happened to: up to which model, its folder, its log, and the compile cache for the others."""

    model: str
    workdir: Path
    log: list[str]
    cache: Path


def command(model: str, workdir: Path, *more: str, program: tuple[str, ...] = PROGRAM) -> list[str]:
    config = f"--config=configs/{model}.py:tiny"
    return [sys.executable, "-u", *program, config, *SMALL, f"--workdir={workdir}", *more]


def environment(cache: Path) -> dict[str, str]:
    # No virtual devices here: one device compiles fastest, and the lines of the log come one by one.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "XLA_FLAGS": "", "SELFREWARD_LOG_EVERY": "0", "SELFREWARD_CACHE": str(cache), "PYTHONPATH": path}


def artifacts(workdir: Path) -> dict[str, str]:
    """sha256 of what a run is for: records, pairs, reference, answers and the exported weights."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and (path.suffix in (".jsonl", ".safetensors")) and "/metrics/" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def finished(whole: Whole, workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The run to its end, or to where `more` says."""
    return subprocess.run(
        command(whole.model, workdir, *more), cwd=ROOT, env=environment(whole.cache), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def undisturbed(model: str, base: Path) -> Whole:
    whole = Whole(model, base / "whole", [], base)
    done = finished(whole, base / "whole")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dataclasses.replace(whole, log=done.stdout.splitlines())


def all_stages(model: str) -> list[str]:
    return [some.name for some in recipe.stages(from_config_dict(presets.get(model, "tiny")))]


def before(whole: Whole, stage: str) -> str:
    """The stage that ends right before this one."""
    names = all_stages(whole.model)
    place = names.index(stage)
    return names[place - 1] if place else ""


def lines_of(whole: Whole, stage: str) -> int:
    """How many lines the undisturbed run printed in this stage, but for the last two: after those it ends at once."""
    done = f"[{before(whole, stage)}] done in"
    start = next((i for i, line in enumerate(whole.log) if line.startswith(done)), 0)
    end = next(i for i, line in enumerate(whole.log) if line.startswith(f"[{stage}] done in"))
    return end - start - 2


def has_ended(workdir: Path, stage: str) -> bool:
    model, name = stage.split("/")
    return (workdir / model / "stages" / f"{name}.json").exists()


def copy_finished(whole: Whole, into: Path, *names: str) -> None:
    """Makes `into` the run as it was when these of its files and folders were finished."""
    into.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *names):
        source = whole.workdir / name
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, into / name)


def start_into(
    whole: Whole, stage: str, offset: int, workdir: Path, program: tuple[str, ...] = PROGRAM
) -> subprocess.Popen[str]:
    """A child that is `offset` lines into a stage, or at its end if it has printed fewer."""
    previous = f"[{before(whole, stage)}] d" if before(whole, stage) else "workdir"
    child = start_to(whole, workdir, previous, program)
    assert child.stdout is not None
    for _ in itertools.islice(child.stdout, offset):
        pass
    return child


def start_to(
    whole: Whole, workdir: Path, beginning: str, program: tuple[str, ...] = PROGRAM
) -> subprocess.Popen[str]:
    """A child that has printed a line with this beginning, or has ended."""
    child = subprocess.Popen(
        command(whole.model, workdir, program=program), cwd=ROOT, env=environment(whole.cache), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    next((line for line in child.stdout if line.startswith(beginning)), None)
    return child


def ended_by(child: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Sends a signal: the exit code, and what the child printed to standard error."""
    child.send_signal(number)
    _, said = child.communicate(timeout=300)
    return child.returncode, said


def killed(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """SIGKILL; whether it hit before the stage ended."""
    ended_by(start_into(whole, stage, offset, workdir), signal.SIGKILL)
    return not has_ended(workdir, stage)


def terminated(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """SIGTERM, as a scheduler sends it: a line and 143, whatever the stage does."""
    code, said = ended_by(start_into(whole, stage, offset, workdir), signal.SIGTERM)
    hit = not has_ended(workdir, stage)
    assert code in ((143,) if hit else (0, 143)), said
    assert not hit or "stopped; start again to go on from here" in said, said
    assert "Traceback" not in said, said
    return hit


def two_at_once(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """A second start while the first works there: it is refused by a line; then SIGKILL to the first."""
    child = start_into(whole, stage, offset, workdir)
    child.send_signal(signal.SIGSTOP)  # or it may be done before the other has started
    try:
        again = finished(whole, workdir) if child.poll() is None else None
    finally:
        ended_by(child, signal.SIGKILL)
    if again:
        assert again.returncode == 2 and "is working here; wait for it" in again.stderr and "Traceback" not in again.stderr, again.stderr
    return again is not None and not has_ended(workdir, stage)


def clock_jumped(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """A clock that jumps back and forth by two days all the time, and SIGKILL."""
    ended_by(start_into(whole, stage, offset, workdir, ("-c", JUMPING)), signal.SIGKILL)
    return not has_ended(workdir, stage)


def flipped(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """SIGKILL, then one bit of what the stage has saved, or else of what an earlier one made, is another."""
    ended_by(start_into(whole, stage, offset, workdir), signal.SIGKILL)
    draw = random.Random(f"{stage} {offset}")
    model = stage.split("/")[0]
    newest = sorted((workdir / model / "checkpoints").glob("[0-9]*"), key=lambda path: path.name.zfill(9))[-1:]
    made = newest if newest and stage.endswith("/train") else sorted(workdir.glob("*/*.jsonl"))
    files = [file for path in made for file in (path, *path.rglob("*")) if file.is_file() and file.stat().st_size]
    if not files or has_ended(workdir, stage):
        return False
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return True


FAULTS: dict[str, Callable[[Whole, str, int, Path], bool]] = {
    "SIGKILL": killed, "SIGTERM": terminated, "two at once": two_at_once, "clock": clock_jumped, "flipped bit": flipped,
}  # fmt: skip
