"""Freed memory goes back to the system."""

import platform
import sys

import numpy as np
import pytest

from benchmarks import pinned
from selfreward_jax import heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not pinned.memory("VmRSS"), reason="only glibc on Linux")
def test_what_lies_between_blocks_in_use_is_given_back():
    blocks = [np.ones(64 * 1024, np.uint8) for _ in range(4000)]  # below what malloc maps apart: 262 MB
    kept = blocks[::2]
    del blocks
    before = pinned.memory("VmRSS")
    heap.trim()
    assert before - pinned.memory("VmRSS") > 60e6
    assert all(one.all() for one in kept)


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    heap.trim()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())  # musl
    heap.trim()
