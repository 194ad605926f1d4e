"""SIGKILL at any line of the log, then start again: the same bytes as a run that was left alone.

Every kill is known to have hit before its stage ended. Real processes, real files, the `tiny` preset: up to M2, whose
stages are M3's too; the hundred kills go up to M3. In four of M2's sixteen stages something else happens (test_faults.py).
"""

import random
import signal
from collections.abc import Mapping
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


def faults(whole: Whole, seed: int, into: Path, others: Mapping[str, str]) -> int:
    """One run that is killed in each of the stages, or meets another fault, then left to end; compares its bytes.

    Returns:
        the faults that hit.
    """
    draw = random.Random(seed)
    hits = 0
    for stage in all_stages(whole.model):
        fault = FAULTS[others.get(stage, "SIGKILL")]
        hits += fault(whole, stage, draw.randrange(max(1, lines_of(whole, stage))), into)
    last = finished(whole, into)
    assert last.returncode == 0, last.stderr[-2000:]
    assert artifacts(into) == artifacts(whole.workdir)
    return hits


@pytest.mark.slow
def test_faults_in_every_stage_give_the_same_bytes(m2: Whole, tmp_path: Path) -> None:
    stages = all_stages("m2")
    hits = faults(m2, 1, tmp_path / "killed", OTHERS)
    assert hits == len(stages), f"{hits} of {len(stages)} faults hit inside their stage"


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


@pytest.mark.full
def test_a_hundred_kills(tmp_path: Path) -> None:
    whole = undisturbed("m3", tmp_path)
    stages = all_stages("m3")
    rounds = -(-100 // len(stages))
    total = 0
    for seed in range(rounds):
        hits = faults(whole, 100 + seed, tmp_path / f"run-{seed}", {})
        total += hits
        print(f"round {seed}: {hits} of {len(stages)} kills hit inside their stage", flush=True)
    print(f"{total} of {rounds * len(stages)} kills hit")
    assert total >= 100
