"""SIGKILL at any line of the log, then start again: the same bytes as a run that was left alone.

The parent reads the child's log and kills it at a line that a seeded draw chose inside one stage, so every kill is
known to have hit before that stage ended. Real processes, real files, the `tiny` preset: up to M2, whose stages are
M3's too; the hundred kills go up to M3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfreward_jax import presets, recipe
from selfreward_jax.config import from_config_dict

ROOT = Path(__file__).resolve().parents[2]
# Small enough to be killed a dozen times in CI; every stage of the recipe is there.
SMALL = ("--config.sft.checkpoint_every=8", "--config.check.k=1", "--config.engine.part=16")  # two parts of responses


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that nobody killed: up to which model, its folder, its log, and the compile cache for the others."""

    model: str
    workdir: Path
    log: list[str]
    cache: Path


def command(model: str, workdir: Path, *more: str) -> list[str]:
    config = f"--config=configs/{model}.py:tiny"
    return [sys.executable, "-u", "-m", "selfreward_jax.main", config, *SMALL, f"--workdir={workdir}", *more]


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


def undisturbed(model: str, base: Path) -> Whole:
    done = subprocess.run(
        command(model, base / "whole"), cwd=ROOT, env=environment(base), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Whole(model, base / "whole", done.stdout.splitlines(), base)


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return undisturbed("m2", tmp_path_factory.mktemp("kill"))


def kill_in(whole: Whole, stage: str, offset: int, workdir: Path) -> bool:
    """Starts the run and kills it `offset` lines into a stage; whether the kill hit before the stage ended."""
    model, name = stage.split("/")
    record = workdir / model / "stages" / f"{name}.json"
    previous = f"[{before(whole, stage)}] d" if before(whole, stage) else "workdir"
    child = subprocess.Popen(
        command(whole.model, workdir), cwd=ROOT, env=environment(whole.cache), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
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


def kills(whole: Whole, seed: int, into: Path) -> int:
    """One run that is killed in each of the stages, then left to end; compares its bytes. Returns the kills that hit."""
    draw = random.Random(seed)
    hits = 0
    for stage in all_stages(whole.model):
        hits += kill_in(whole, stage, draw.randrange(max(1, lines_of(whole, stage))), into)
    last = subprocess.run(
        command(whole.model, into), cwd=ROOT, env=environment(whole.cache), capture_output=True, text=True, timeout=900
    )
    assert last.returncode == 0, last.stderr[-2000:]
    assert artifacts(into) == artifacts(whole.workdir)
    return hits


@pytest.mark.slow
def test_killed_in_every_stage_gives_the_same_bytes(m2: Whole, tmp_path: Path) -> None:
    stages = all_stages("m2")
    hits = kills(m2, seed=1, into=tmp_path / "killed")
    assert hits == len(stages), f"{hits} of {len(stages)} kills hit inside their stage"


@pytest.mark.slow
def test_finished_stages_are_not_redone(m2: Whole) -> None:
    before_ = {path: path.stat().st_mtime_ns for path in m2.workdir.rglob("stages/*.json")}
    again = subprocess.run(
        command("m2", m2.workdir), cwd=ROOT, env=environment(m2.cache), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(before_) == len(all_stages("m2"))
    assert {path: path.stat().st_mtime_ns for path in m2.workdir.rglob("stages/*.json")} == before_


@pytest.mark.slow
def test_a_finished_part_is_kept_and_a_cut_one_is_redone(m2: Whole, tmp_path: Path) -> None:
    into = tmp_path / "parts"
    into.mkdir()  # as the run was when it had its prompts
    for name in ("config.json", "seed", "sft", "m1", "prompts"):
        source = m2.workdir / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, into / name)
    (into / "m2" / "stages").mkdir(parents=True)
    for name in ("prompts.jsonl", "stages/prompts.json"):
        shutil.copy2(m2.workdir / "m2" / name, into / "m2" / name)
    killed = subprocess.Popen(
        command("m2", into), cwd=ROOT, env=environment(m2.cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("[m2/responses] 32/32"):  # the first part is written, the second is about to be
            break
    killed.send_signal(signal.SIGKILL)
    killed.stdout.close()
    killed.wait()
    assert not (into / "m2" / "stages" / "responses.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (into / "m2" / "responses").iterdir() if path.suffix == ".jsonl"}
    assert into / "m2" / "responses" / "part-00000-of-00002.jsonl" in kept
    again = subprocess.run(
        command("m2", into, "--stop_after=m2/responses"), cwd=ROOT, env=environment(m2.cache), capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = sorted((m2.workdir / "m2" / "responses").iterdir())
    assert len(whole) == 2
    for path in whole:
        assert path.read_bytes() == (into / path.relative_to(m2.workdir)).read_bytes()


@pytest.mark.full
def test_a_hundred_kills(tmp_path: Path) -> None:
    whole = undisturbed("m3", tmp_path)
    stages = all_stages("m3")
    rounds = -(-100 // len(stages))
    total = 0
    for seed in range(rounds):
        hits = kills(whole, seed=100 + seed, into=tmp_path / f"run-{seed}")
        total += hits
        print(f"round {seed}: {hits} of {len(stages)} kills hit inside their stage", flush=True)
    print(f"{total} of {rounds * len(stages)} kills hit")
    assert total >= 100
