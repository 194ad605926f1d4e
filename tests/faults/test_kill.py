"""SIGKILL at any line of the log, then start again: the same bytes as a run that was left alone.

The parent reads the child's log and kills it at a line that a seeded draw chose inside one stage, so every kill is
known to have hit before that stage ended. Real processes, real files, the `tiny` preset.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfreward_jax import presets, recipe
from selfreward_jax.config import from_config_dict

ROOT = Path(__file__).resolve().parents[2]
# Small enough to be killed a dozen times in CI; every stage of the recipe is there.
CONFIG = ("--config=configs/m3.py:tiny", "--config.sft.checkpoint_every=8", "--config.check.k=1")


def command(workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-u", "-m", "selfreward_jax.main", *CONFIG, f"--workdir={workdir}", *more]


def environment(cache: Path) -> dict[str, str]:
    # No virtual devices here: one device compiles fastest, and the lines of the log come one by one.
    return {**os.environ, "XLA_FLAGS": "", "SELFREWARD_LOG_EVERY": "0", "SELFREWARD_CACHE": str(cache)}


def artifacts(workdir: Path) -> dict[str, str]:
    """sha256 of what a run is for: records, pairs, reference, answers and the exported weights."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and (path.suffix in (".jsonl", ".safetensors")) and "/metrics/" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """A run that nobody kills: its folder, its log, and the compile cache for the others."""
    base = tmp_path_factory.mktemp("kill")
    done = subprocess.run(
        command(base / "whole"), cwd=ROOT, env=environment(base), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return base / "whole", done.stdout.splitlines(), base


def kill_in(stage: str, offset: int, workdir: Path, cache: Path) -> bool:
    """Starts the run and kills it `offset` lines into a stage; whether the kill hit before the stage ended."""
    model, name = stage.split("/")
    record = workdir / model / "stages" / f"{name}.json"
    previous = f"[{before(stage)}] d" if before(stage) else "workdir"
    child = subprocess.Popen(
        command(workdir), cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    inside, seen = False, 0
    assert child.stdout is not None
    for line in child.stdout:
        inside = inside or line.startswith(previous)
        if inside:
            if seen == offset:
                break
            seen += 1
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    child.wait()
    return not record.exists()


def all_stages() -> list[str]:
    return [some.name for some in recipe.stages(from_config_dict(presets.get("m3", "tiny")))]


def before(stage: str) -> str:
    """The stage that ends right before this one."""
    names = all_stages()
    place = names.index(stage)
    return names[place - 1] if place else ""


def lines_of(stage: str, log: list[str]) -> int:
    """How many lines the undisturbed run printed in this stage, but for the last two: after those it ends at once."""
    start = next((i for i, line in enumerate(log) if line.startswith(f"[{before(stage)}] done in")), 0)
    end = next(i for i, line in enumerate(log) if line.startswith(f"[{stage}] done in"))
    return end - start - 2


def kills(undisturbed: tuple[Path, list[str], Path], stages: list[str], seed: int, rounds: int, into: Path) -> int:
    """One run that is killed in each of the stages, `rounds` times over, then left to end; compares its bytes."""
    whole, log, cache = undisturbed
    draw = random.Random(seed)
    hits = 0
    for _ in range(rounds):
        for stage in stages:
            hits += kill_in(stage, draw.randrange(max(1, lines_of(stage, log))), into, cache)
    last = subprocess.run(command(into), cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=900)
    assert last.returncode == 0, last.stderr[-2000:]
    assert artifacts(into) == artifacts(whole)
    return hits


@pytest.mark.slow
def test_killed_in_every_stage_gives_the_same_bytes(
    undisturbed: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    stages = all_stages()
    hits = kills(undisturbed, stages, seed=1, rounds=1, into=tmp_path / "killed")
    assert hits == len(stages), f"{hits} of {len(stages)} kills hit inside their stage"


@pytest.mark.slow
def test_finished_stages_are_not_redone(undisturbed: tuple[Path, list[str], Path]) -> None:
    whole, _, cache = undisturbed
    before_ = {path: path.stat().st_mtime_ns for path in whole.rglob("stages/*.json")}
    again = subprocess.run(command(whole), cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(before_) == len(all_stages())
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("stages/*.json")} == before_


@pytest.mark.slow
def test_a_finished_part_is_kept_and_a_cut_one_is_redone(
    undisturbed: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    whole, _, cache = undisturbed
    into = tmp_path / "parts"
    stop = subprocess.run(
        command(into, "--stop_after=m2/responses"), cwd=ROOT, env=environment(cache), capture_output=True, timeout=600
    )
    assert stop.returncode == 0
    parts = sorted((into / "m2" / "responses").iterdir())
    parts[-1].unlink()
    record = into / "m2" / "stages" / "responses.json"
    saved = json.loads(record.read_text())
    assert saved["outputs"]["m2/responses"]
    kept = {path: path.stat().st_mtime_ns for path in parts[:-1]}
    again = subprocess.run(
        command(into, "--stop_after=m2/responses"), cwd=ROOT, env=environment(cache), capture_output=True, timeout=600
    )
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in parts[:-1]} == kept
    for path in parts:
        assert path.read_bytes() == (whole / path.relative_to(into)).read_bytes()


@pytest.mark.full
def test_a_hundred_kills(undisturbed: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    stages = all_stages()
    rounds = -(-100 // len(stages))
    total = 0
    for seed in range(rounds):
        hits = kills(undisturbed, stages, seed=100 + seed, rounds=1, into=tmp_path / f"run-{seed}")
        total += hits
        print(f"round {seed}: {hits} of {len(stages)} kills hit inside their stage")
    print(f"{total} of {rounds * len(stages)} kills hit")
    assert total >= 100
