"""How a job of several real processes ends: by an error that one of them has alone, and by a signal."""

import os
import subprocess
import sys
import time
from pathlib import Path

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


def two(tmp_path, statement):
    """Runs two processes: (exit codes, what each printed, seconds until both had ended)."""
    port, began = free_port(), time.monotonic()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    running = []
    for index in range(2):
        script = STEPS.format(port=port, index=index, heartbeat=HEARTBEAT, statement=statement)
        with (tmp_path / f"{index}.log").open("w") as out:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", script],
                    cwd=tmp_path,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [one.wait(120) for one in running]
    finally:
        for one in running:
            one.kill()
    return codes, [(tmp_path / f"{index}.log").read_text() for index in range(2)], time.monotonic() - began


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
