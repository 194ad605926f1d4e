"""A fault in every stage, then a start that is left alone: the same bytes as a run that nothing happened to.

Every fault is known to have hit before its stage ended. Real processes, real files, the `tiny` preset: up to M2, whose
stages are M3's too; the hundreds go up to M3.
"""

import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import (
    FAULTS,
    Whole,
    all_stages,
    artifacts,
    copy_finished,
    ended_by,
    finished,
    lines_of,
    start_to,
    undisturbed,
)

OTHERS = {"sft/train": "SIGTERM", "m1/train": "flipped bit", "m2/responses": "two at once", "m2/judgments": "clock"}


def faults(whole: Whole, draw: random.Random, into: Path, fault_of: Callable[[str], str]) -> tuple[Counter[str], Counter[str]]:
    """One run that meets a fault in each of its stages, then is left to end; compares its bytes.

    Returns:
        how many faults of each kind were tried, and how many of them hit.
    """
    tried, hit = Counter[str](), Counter[str]()
    for stage in all_stages(whole.model):
        fault = fault_of(stage)
        tried[fault] += 1
        hit[fault] += FAULTS[fault](whole, stage, draw.randrange(max(1, lines_of(whole, stage))), into)
    last = finished(whole, into)
    assert last.returncode == 0, last.stderr[-2000:]
    assert artifacts(into) == artifacts(whole.workdir)
    return tried, hit


def a_hundred(seed: int, fault_of: Callable[[random.Random, str], str], into: Path) -> None:
    """As many runs up to M3 as have a hundred stages, and one more: some faults come when their stage has ended."""
    whole, draw = undisturbed("m3", into), random.Random(seed)
    rounds = -(-100 // len(all_stages("m3"))) + 1
    tried, hit = Counter[str](), Counter[str]()
    for number in range(rounds):
        some, reached = faults(whole, draw, into / f"run-{number}", lambda stage: fault_of(draw, stage))
        tried, hit = tried + some, hit + reached
        print(f"run {number}: {dict(hit)} of {dict(tried)} hit inside their stage; the same bytes", flush=True)
    print(f"{hit.total()} of {tried.total()} faults hit, {rounds} of {rounds} runs recovered, 0 bytes differ")
    assert hit.total() >= 100


@pytest.mark.slow
def test_faults_in_every_stage_give_the_same_bytes(m2: Whole, tmp_path: Path) -> None:
    tried, hit = faults(m2, random.Random(1), tmp_path / "faults", lambda stage: OTHERS.get(stage, "SIGKILL"))
    assert hit == tried


@pytest.mark.full
def test_a_hundred_kills(tmp_path: Path) -> None:
    a_hundred(100, lambda draw, stage: "SIGKILL", tmp_path)


@pytest.mark.full
def test_a_hundred_faults(tmp_path: Path) -> None:
    a_hundred(7, lambda draw, stage: draw.choice(sorted(FAULTS)), tmp_path)


@pytest.mark.slow
def test_finished_stages_are_not_redone(m2: Whole) -> None:
    before = {path: path.stat().st_mtime_ns for path in m2.workdir.rglob("stages/*.json")}
    again = finished(m2, m2.workdir)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(before) == len(all_stages("m2"))
    assert {path: path.stat().st_mtime_ns for path in m2.workdir.rglob("stages/*.json")} == before


@pytest.mark.slow
def test_a_finished_part_is_kept_and_a_cut_one_is_redone(m2: Whole, tmp_path: Path) -> None:
    into = tmp_path / "parts"
    copy_finished(m2, into, "seed", "sft", "m1", "prompts", "m2/prompts.jsonl", "m2/stages/prompts.json")
    ended_by(start_to(m2, into, "[m2/responses] 32/32"), signal.SIGKILL)  # one part is written, the second is about to be
    assert not (into / "m2" / "stages" / "responses.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (into / "m2" / "responses").iterdir() if path.suffix == ".jsonl"}
    assert into / "m2" / "responses" / "part-00000-of-00002.jsonl" in kept
    again = finished(m2, into, "--stop_after=m2/responses")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = sorted((m2.workdir / "m2" / "responses").iterdir())
    assert len(whole) == 2
    for path in whole:
        assert path.read_bytes() == (into / path.relative_to(m2.workdir)).read_bytes()
