"""Whatever happens to a run, the next start goes on from there, and its bytes are those of a run that was left alone.

Every fault is known to have hit before its stage ended. Real processes, real files, the `tiny` preset: up to M2, whose
stages are M3's too; the hundreds go up to M3. Disks that fill and folders that cannot be written are real ones, mounted
for the test, which needs the right to mount. One file, as all take the run `m2` that nothing happens to.
"""

import contextlib
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return undisturbed("m2", tmp_path_factory.mktemp("whole"))


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


def mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=64m", "none", str(path)):
        pytest.skip("only root may mount")
    yield path
    subprocess.run(["umount", "-R", str(path)], check=True)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    assert mounted("--bind", str(path), str(path)) and mounted("-o", "remount,bind,ro", str(path))
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_preempted_training_loses_no_update(m2: Whole, tmp_path: Path) -> None:
    copy_finished(m2, tmp_path, "seed")
    assert FAULTS["SIGTERM"](m2, "sft/train", 14, tmp_path)
    (saved,) = [int(path.name) for path in (tmp_path / "sft" / "checkpoints").iterdir() if int(path.name) % 8]
    metrics = (tmp_path / "sft" / "metrics" / "segment-00000.jsonl").read_text().splitlines()
    assert len(metrics) == saved
    again = finished(m2, tmp_path, "--stop_after=sft/train")
    assert f"[sft/train] continues after update {saved} of 16" in again.stdout


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_a_whole_run(m2: Whole, tmp_path: Path) -> None:
    copy_finished(m2, tmp_path, "seed")
    assert FAULTS["SIGTERM"](m2, "sft/train", 16, tmp_path)
    steps = sorted((tmp_path / "sft" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(steps) == 2
    for file in steps[-1].rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-100])
    again = finished(m2, tmp_path, "--stop_after=sft/export")
    assert again.returncode == 0, again.stderr
    assert f"{steps[-1]}: damaged" in again.stdout and "the one before it is used" in again.stdout
    assert f"[sft/train] continues after update {steps[0].name} of 16" in again.stdout
    assert "Traceback" not in again.stderr
    made = artifacts(tmp_path)
    assert made and made == {name: sum_ for name, sum_ in artifacts(m2.workdir).items() if name in made}
    assert "sft/model/model.safetensors" in made


def fill(disk: Path, free_kb: int) -> Path:
    """A file that leaves so much of a disk."""
    available = int(subprocess.check_output(["df", "-k", "--output=avail", disk]).split()[1])
    (disk / "room").write_bytes(bytes(1024 * max(0, available - free_kb)))
    return disk / "room"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "free_kb", "fails"),
    [("[sft/train] 1/16", 0, ""), ("[sft/train] 1/16", 1000, "sft/checkpoints"), ("[sft/train] 12/16", 300, "sft/params")],
)
def test_a_disk_that_fills_loses_nothing(m2: Whole, disk: Path, line: str, free_kb: int, fails: str) -> None:
    """A checkpoint takes 1.9 MB, the parameters 640 KB."""
    into = disk / "run"
    copy_finished(m2, into, "seed")
    child = start_to(m2, into, line)
    child.send_signal(signal.SIGSTOP)
    room = fill(disk, free_kb)
    code, said = ended_by(child, signal.SIGCONT)
    assert code == 2, said
    assert f"error: {into / fails}" in said and "No space left on device" in said and "Traceback" not in said, said
    room.unlink()
    again = finished(m2, into, "--stop_after=sft/export")
    assert again.returncode == 0, again.stderr
    assert ("continues after update 8 of 16" in again.stdout) is (fails == "sft/params")
    made = artifacts(into)
    assert made == {name: sum_ for name, sum_ in artifacts(m2.workdir).items() if name in made}
    assert "sft/model/model.safetensors" in made


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_one_line(m2: Whole, disk: Path) -> None:
    copy_finished(m2, disk / "run", "seed")
    for free_kb, says in ((0, "No space left on device; take a folder that can be written, or make room"), (700, "7.0 MB needed on disk")):
        room = fill(disk, free_kb)
        full = finished(m2, disk / "run")
        assert full.returncode == 2 and says in full.stderr and "Traceback" not in full.stderr, full.stderr
        room.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "sft", "sft/stages"])
def test_a_folder_that_cannot_be_written_is_one_line(m2: Whole, disk: Path, folder: str) -> None:
    into = disk / "run"
    copy_finished(m2, into, "seed")
    (into / folder).mkdir(parents=True, exist_ok=True)
    with read_only(into / folder):
        refused = finished(m2, into, "--stop_after=sft/train")
    assert refused.returncode == 2, refused.stdout[-2000:] + refused.stderr
    assert "Read-only file system" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    again = finished(m2, into, "--stop_after=sft/train")
    assert again.returncode == 0, again.stderr


@pytest.mark.full
def test_a_hundred_kills(tmp_path: Path) -> None:
    a_hundred(100, lambda draw, stage: "SIGKILL", tmp_path)


@pytest.mark.full
def test_a_hundred_faults(tmp_path: Path) -> None:
    a_hundred(7, lambda draw, stage: draw.choice(sorted(FAULTS)), tmp_path)
