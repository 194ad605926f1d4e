"""A whole benchmark as a process of its own, small: for the tests of benchmarks/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def figures_of(module: str, folder: Path, *options: str) -> dict[str, Any]:
    """What a benchmark of the tiny random model prints last; it must write the same, and leave nothing else in its folder."""
    out = folder / "results" / "figures.json"
    command = [sys.executable, "-m", module, "--model=random:tiny", "--rounds=1", f"--dir={folder}", f"--out={out}", *options]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}  # one device
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads(out.read_text())
    assert [path.name for path in folder.iterdir()] == ["results"]
    return figures
