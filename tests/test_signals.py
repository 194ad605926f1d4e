"""Signals to a real process: it unwinds, or ends all the same where Python cannot run a handler."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfreward_jax import signals

ROOT = Path(__file__).parents[1]
CHILD = """
import ctypes, signal, sys, time
from selfreward_jax import cli, signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs in the background without it

def work():
    try:
        print("begun", flush=True)
        {statement}
    finally:
        print("unwound", flush=True)

signals.signals.__wrapped__.__defaults__ = (1.0,)
sys.exit(cli.exit_code(work))
"""
# A lock taken twice, in C: no signal wakes it, as none wakes a collective that waits.
HANGS = (
    "[ctypes.CDLL(None).pthread_mutex_lock(lock) for lock in [ctypes.create_string_buffer(128)] for _ in range(2)]"
)


@pytest.mark.parametrize(
    ("number", "statement", "code", "unwound"),
    [
        (signal.SIGINT, "time.sleep(60)", 130, True),
        (signal.SIGTERM, "time.sleep(60)", 143, True),
        (signal.SIGINT, HANGS, 130, False),
        (signal.SIGTERM, HANGS, 143, False),
    ],
)
def test_a_signal_ends_the_program(number, statement, code, unwound):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(statement=statement)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert child.stdout and child.stdout.readline() == "begun\n"
        time.sleep(0.2)
        child.send_signal(number)
        out, said = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code
    assert ("unwound" in out) is unwound
    assert said == "\nstopped; start again to go on from here\n"


LOOP = """
        with signals.deferred() as asked:
            while not asked.number: time.sleep(0.01)
            print("noticed", flush=True)
            {then}
"""


@pytest.mark.parametrize(
    ("then", "again", "code"),
    [("raise KeyboardInterrupt", False, 143), ("time.sleep(60)", True, 143), (HANGS, True, 143)],
)
def test_work_that_asks_for_it_ends_by_itself_at_the_first_signal(then, again, code):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD.format(statement=LOOP.format(then=then).strip())], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout and child.stderr and child.stdout.readline() == "begun\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "noticed\n"
        if again:
            time.sleep(0.2)
            child.send_signal(signal.SIGTERM)
        out, said = child.stdout.read(), child.stderr.read()  # after `readline` communicate would lose what is buffered
    assert child.returncode == code
    assert ("unwound" in out) is (then != HANGS)
    assert said == f"\n{signals.SAVING}\n\n{signals.LINE}\n"


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals.signals() as asked:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert asked.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.signals() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert not asked.number
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
