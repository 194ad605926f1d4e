"""How a job of several real processes ends: by an error that one of them has alone, and by a signal."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10
# A process of two that works in step with the other, until the statement {} is reached.
STEPS = """
import os, signal, sys, threading, time
from selfreward_jax import cli, processes
from selfreward_jax.errors import UserError

def work():
    processes.start(processes.Place("127.0.0.1:{port}", 2, {index}, 60, {heartbeat}), {{}})
    processes.together(lambda: "met")
    index = processes.index()
    {statement}
    processes.together(lambda: "on")

sys.exit(cli.exit_code(work))
"""


def run(tmp_path, commands, before=":", more=({}, {})):
    """Runs two processes in folders `0` and `1`: (exit codes, what each printed, seconds until both had ended).

    Args:
        before: what a shell does before it becomes the second process (not `preexec_fn`: it forks, and jax has threads).
        more: environment variables of each.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    running, began = [], time.monotonic()
    for index, command in enumerate(commands):
        (tmp_path / str(index)).mkdir(exist_ok=True)
        with (tmp_path / f"{index}.log").open("w") as out:
            running.append(
                subprocess.Popen(
                    ["/bin/bash", "-c", f'{before if index else ":"}; exec "$@"', "bash", sys.executable, *command],
                    cwd=tmp_path / str(index),
                    env=environment | more[index],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [one.wait(300) for one in running]
    finally:
        for one in running:
            one.kill()
    return codes, [(tmp_path / f"{index}.log").read_text() for index in range(2)], time.monotonic() - began


def two(tmp_path, statement):
    """`run` of `STEPS` with this statement."""
    port = free_port()
    given = {"port": port, "heartbeat": HEARTBEAT, "statement": statement}
    return run(tmp_path, [("-c", STEPS.format(index=index, **given)) for index in range(2)])


LONGEST = 2 * HEARTBEAT + 20  # seconds with the start of Python and jax


def test_a_mistake_that_one_process_has_alone_ends_all(tmp_path):
    codes, logs, seconds = two(tmp_path, 'if index == 1: raise UserError("the file is not here")')
    assert codes[1] == 2 and codes[0] not in (0, 2)
    assert "error: the file is not here (process 1 of 2)\n" in logs[1] and "Traceback" not in logs[1]
    assert seconds < LONGEST


def test_an_exception_of_one_process_ends_all(tmp_path):
    codes, logs, seconds = two(tmp_path, 'processes.together(lambda: {}["a bug"])')
    assert codes[0] == 1 and codes[1] != 0
    assert "Traceback" in logs[0] and "KeyError: 'a bug'" in logs[0]
    assert "error: KeyError (process 0 of 2); the others end too" in logs[0]
    assert seconds < LONGEST


def test_what_all_meet_alike_all_say(tmp_path):
    codes, logs, seconds = two(tmp_path, 'raise UserError("the loss is not finite")')
    assert codes == [2, 2]
    for index, log in enumerate(logs):
        assert f"error: the loss is not finite (process {index} of 2)" in log
    assert seconds < LONGEST


def test_sigterm_ends_both(tmp_path):
    codes, logs, seconds = two(tmp_path, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert codes == [143, 143]
    for index, log in enumerate(logs):
        assert f"stopped; start again to go on from here (process {index} of 2)" in log
        assert "Traceback" not in log
    assert seconds < LONGEST


def test_sigterm_ends_a_process_that_waits_for_another(tmp_path):
    """It hangs in a collective, where Python runs no handler."""
    statement = """
    if index == 0:
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        time.sleep(40)
"""
    codes, logs, _ = two(tmp_path, statement.strip())
    assert codes[0] == 143 and codes[1] != 0
    assert "stopped; start again to go on from here" in logs[0]


NO_BIG_FILES = "ulimit -f 195"  # blocks of 1024 bytes


@pytest.mark.slow
def test_a_host_whose_checkpoint_is_not_taken_ends_all(tmp_path):
    """People's rows, which process 0 alone sees; the disk of process 1 takes no part of a checkpoint."""
    (tmp_path / "0").mkdir()
    row = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]}
    (tmp_path / "0" / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 64)
    port = free_port()
    given = (
        "-m", "selfreward_jax.train", "--loss=sft", "--model=random:tiny", "--data=rows.jsonl", f"--config={ROOT}/configs/sft.py:tiny",
        f"--workdir={tmp_path}/run", "--config.sft.checkpoint_every=1", "--config.sft.epochs=50", "--num_processes=2",
        f"--coordinator=127.0.0.1:{port}", f"--heartbeat_timeout={HEARTBEAT}",
    )  # fmt: skip
    codes, logs, _ = run(tmp_path, [(*given, f"--process_id={index}") for index in range(2)], NO_BIG_FILES)
    assert "[trained/examples] 64 examples" in logs[0] and "examples" not in logs[1]
    assert codes[1] == 2 and codes[0] not in (0, 2), logs[0][-2000:]
    assert "checkpoints: cannot be written (File too large" in logs[1] and "(process 1 of 2)" in logs[1]
    assert logs[1].splitlines()[-1].startswith("error: ")  # above it tensorstore may show tracebacks of its threads


@pytest.mark.slow
def test_a_signal_to_one_process_has_all_save_the_same_update(tmp_path):
    """As a preemption of one host; and what both go on to make is what they make undisturbed."""
    (tmp_path / "0").mkdir()
    row = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]}
    (tmp_path / "0" / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 16)

    def commands(folder):
        given = (
            "-m", "selfreward_jax.train", "--loss=sft", "--model=random:tiny", "--data=rows.jsonl", f"--config={ROOT}/configs/sft.py:tiny",
            f"--workdir={tmp_path}/{folder}", "--config.sft.checkpoint_every=1000", "--config.sft.epochs=4", "--num_processes=2",
            f"--coordinator=127.0.0.1:{free_port()}", f"--heartbeat_timeout={HEARTBEAT}",
        )  # fmt: skip
        return [(*given, f"--process_id={index}") for index in range(2)]

    def preempt():
        """SIGTERM to process 1, once process 0 says that some updates are done."""
        log = tmp_path / "0.log"
        while " 3/" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        subprocess.run(["pkill", "-TERM", "-f", f"workdir={tmp_path}/stopped.*process_id=1"], check=True)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    codes, logs, _ = run(tmp_path, commands("stopped"), more=({"SELFREWARD_LOG_EVERY": "0"}, {}))
    preempting.join()
    assert codes == [143, 143], logs
    saved = re.search(r"\[trained/train\] saved after update (\d+) of", logs[0])
    assert saved and (tmp_path / "stopped" / "trained" / "checkpoints" / saved[1]).exists()
    codes, logs, _ = run(tmp_path, commands("stopped"))
    assert codes == [0, 0], logs
    assert f"[trained/train] continues after update {saved[1]} of" in logs[0]
    codes, logs, _ = run(tmp_path, commands("whole"))
    assert codes == [0, 0], logs
    weights = [(tmp_path / folder / "trained" / "model" / "model.safetensors").read_bytes() for folder in ("stopped", "whole")]
    assert weights[0] == weights[1]


# What a process of a job says that found its place out, and what it was started with.
FOUND = """
import sys
from selfreward_jax import cli, cluster, processes
{first}

def work():
    processes.start(processes.Place(timeout={timeout}, heartbeat={heartbeat}), {{"config": "{config}"}})
    print("of", processes.count(), processes.together(lambda: "met"))

sys.exit(cli.exit_code(work))
"""


def slurm(tmp_path, configs, tasks=2, timeout=60, first=""):
    given, port = {"timeout": timeout, "heartbeat": HEARTBEAT, "first": first}, str(free_port())
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
    }
    more = [
        step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": port}
        for i in range(len(configs))
    ]
    commands = [("-c", FOUND.format(config=config, **given)) for config in configs]
    codes, logs, _ = run(tmp_path, commands, more=more)
    return codes, logs


def test_slurm_tasks_meet(tmp_path):
    codes, logs = slurm(tmp_path, ["a", "a"])
    assert codes == [0, 0]
    assert "of 2 met" in logs[0] and "of 2 met" in logs[1]


def test_a_slurm_task_that_differs_is_named(tmp_path):
    codes, logs = slurm(tmp_path, ["a", "b"])
    assert codes == [2, 2]
    for log in logs:
        assert log == "error: config of process 1 is b, of process 0 a; start all with the same\n"


def test_one_that_differs_is_named_too_where_only_jax_finds_the_others(tmp_path):
    codes, logs = slurm(tmp_path, ["a", "b"], first="cluster.find = lambda *_: None")
    assert codes == [2, 2]
    assert "error: config of process 1 is b, of process 0 a; start all with the same\n" in logs[0]
    assert "error" not in logs[1]


def test_a_slurm_task_that_is_missing_is_named(tmp_path):
    codes, logs = slurm(tmp_path, ["a", "a"], tasks=3, timeout=15)
    assert codes == [2, 2]
    for log in logs:
        assert "processes 2 had not arrived at 127.0.0.1:" in log and "Traceback" not in log
