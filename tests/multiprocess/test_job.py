"""Jobs of several real processes: the same result as one process, and an end for all when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ports import free_port
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10
# The tiny loop with less of everything; the judge has to learn its format, or there is no pair.
SMALL = (
    "--config.aift.num_prompts=(4,)",
    "--config.check.prompts=2",
    "--config.eft.eval_sets=1",
    "--config.prompts.requests=2",
)


def start(index, count, port, devices, *arguments, log):
    """One process of a job (count 1: on its own), its output in a file."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    environment |= {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "SELFREWARD_LOG_EVERY": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    place = (
        (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}") if count > 1 else ()
    )
    command = [sys.executable, "-m", "selfreward_jax.main", *arguments, *place, f"--heartbeat_timeout={HEARTBEAT}"]
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def job(folder, count, devices, *arguments, timeout=1500):
    """Runs all processes to their end; (exit codes, what each printed)."""
    folder.mkdir(parents=True, exist_ok=True)
    port, logs = free_port(), [folder / f"{index}.log" for index in range(count)]
    running = [start(index, count, port, devices, *arguments, log=log) for index, log in enumerate(logs)]
    try:
        codes = [one.wait(timeout) for one in running]
    finally:
        for one in running:
            one.kill()
    return codes, [log.read_text() for log in logs]


def records(root, pattern):
    return [json.loads(line) for path in sorted(root.glob(pattern)) for line in path.read_text().splitlines()]


@pytest.mark.full
def test_two_processes_give_what_one_gives(tmp_path):
    """2 processes x 4 devices against 1 x 8: data x fsdp x tensor = 1x4x2 to train; 2x2x2 to sample, a head a device."""
    mesh = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "generation_mesh.data=2", "generation_mesh.fsdp=2", "generation_mesh.tensor=2")
    given = ("--config=configs/m2.py:tiny", *SMALL, *(f"--config.{one}" for one in mesh), f"--config.engine.cache={tmp_path / 'cache'}")
    for name, count in (("one", 1), ("two", 2)):
        codes, logs = job(tmp_path / f"{name}.logs", count, 8 // count, *given, f"--workdir={tmp_path / name}")
        assert codes == [0] * count, logs[0][-3000:]
        assert "m2/check] done" in logs[0] and "generation mesh data 2 x fsdp 2 x tensor 2" in logs[0]
    assert "of 2 processes" in logs[0] and "update" not in logs[1]
    one, two = tmp_path / "one", tmp_path / "two"
    for pattern in (
        "m2/prompts.jsonl",
        "m2/pairs.jsonl",
        "m2/responses/*.jsonl",
        "m2/judgments/*.jsonl",
        "*/check/*/*.jsonl",
    ):
        ours, theirs = records(one, pattern), records(two, pattern)
        assert len(ours) == len(theirs) > 0, pattern
        for here, there in zip(ours, theirs, strict=True):
            close = [name for name in here if name.endswith("logprobs")]
            assert {k: v for k, v in here.items() if k not in close} == {
                k: v for k, v in there.items() if k not in close
            }
            for name in close:
                np.testing.assert_allclose(here[name], there[name], atol=1e-4)
    for here, there in zip(records(one, "m2/reference.jsonl"), records(two, "m2/reference.jsonl"), strict=True):
        for name in ("chosen", "rejected"):
            np.testing.assert_allclose(here[name], there[name], atol=1e-4)
    for model in ("sft", "m1", "m2"):
        ours, theirs = (load_file(root / model / "model" / "model.safetensors") for root in (one, two))
        assert ours.keys() == theirs.keys()
        for name in ours:
            # A tenth of an update (lr 1e-3): Adam makes whole steps of gradients that are all rounding. Measured: 3.8e-5.
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=f"{model} {name}")


@pytest.mark.slow
def test_when_one_dies_the_others_end_and_a_restart_on_other_processes_goes_on(tmp_path):
    """Killed with two processes, continued with one and on another mesh."""
    given = (
        "--config=configs/sft.py:tiny",
        *SMALL,
        f"--workdir={tmp_path / 'run'}",
        "--config.sft.checkpoint_every=2",
    )
    port, logs = free_port(), [tmp_path / f"{index}.log" for index in range(2)]
    running = [start(index, 2, port, 2, *given, log=log) for index, log in enumerate(logs)]
    try:
        until = time.monotonic() + 300
        while "[sft/train] 5/" not in logs[0].read_text():
            assert time.monotonic() < until and running[0].poll() is None, logs[0].read_text()[-2000:]
            time.sleep(0.1)
        running[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        assert running[0].wait(4 * HEARTBEAT) != 0
        assert time.monotonic() - died < 2 * HEARTBEAT + 5
    finally:
        for one in running:
            one.kill()
    codes, (log,) = job(tmp_path / "again", 1, 4, *given)
    assert codes == [0], log[-2000:]
    assert "[sft/train] continues after update" in log


def test_a_mistake_is_one_line_of_process_0(tmp_path):
    codes, logs = job(
        tmp_path,
        2,
        1,
        "--config=configs/sft.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        "--config.mesh.tensor=2",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
    )
    assert codes == [2, 2]
    assert "error: --config.mesh: mesh 1x2x2 does not divide 2 devices" in logs[0]
    assert "error:" not in logs[1] and "Traceback" not in logs[0] + logs[1]


def test_a_process_that_never_comes_is_named(tmp_path):
    port, log = free_port(), tmp_path / "0.log"
    alone = start(
        0, 3, port, 1, "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}", "--join_timeout=2", log=log
    )
    assert alone.wait(120) == 2
    assert "processes 1, 2 had not arrived" in log.read_text()
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """Two hosts that each have a /run of their own: here, two folders."""
    port, logs = free_port(), [tmp_path / f"{index}.log" for index in range(2)]
    running = [
        start(index, 2, port, 1, "--config=configs/sft.py:tiny", f"--workdir={tmp_path / str(index)}", log=log)
        for index, log in enumerate(logs)
    ]
    assert [one.wait(120) for one in running] == [2, 2]
    assert "does not see what process 0 writes there" in logs[0].read_text()


# As a terminal starts a program; what a shell runs in the background begins without Ctrl-C, and bash can't take it back.
AS_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def launcher(tmp_path):
    """A job of the launcher that trains: (the launcher's process, the file of what it prints)."""
    environment = os.environ | {
        "LOGS": str(tmp_path),
        "DEVICES": "1",
        "JAX_PLATFORMS": "cpu",
        "SELFREWARD_LOG_EVERY": "0",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", AS_A_TERMINAL]
    command += ["bash", "launch/processes.sh", "2", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    command += [*SMALL, f"--heartbeat_timeout={HEARTBEAT}"]
    said = tmp_path / "out"
    with said.open("w") as out:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 300
        while "[sft/train] 2/" not in said.read_text():
            assert time.monotonic() < until and job.poll() is None, said.read_text()[-2000:]
            time.sleep(0.2)
        yield job, said
    finally:
        if of_job(job):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def of_job(job, *arguments):
    """The processes of the launcher's session that live."""
    found = subprocess.run(["pgrep", "-g", str(job.pid), *arguments], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_the_launcher_says_who_died(launcher):
    job, said = launcher
    for pid in of_job(job, "-f", "process_id=1"):
        os.kill(pid, signal.SIGKILL)
    assert job.wait(6 * HEARTBEAT) != 0
    assert "process 1 of 2 ended with code 137, the others were stopped" in said.read_text()
    assert "start again to go on" in said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "code"), [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)]
)
def test_the_launcher_stops_all(launcher, send, number, code):
    """A terminal's Ctrl-C goes to all of them, a scheduler's SIGTERM to the launcher alone."""
    job, said = launcher
    send(job.pid, number)
    assert job.wait(40) == code
    assert not of_job(job, "-f", "process_id=")
    assert "stopped; start again to go on from here (process 0 of 2)" in said.read_text()
