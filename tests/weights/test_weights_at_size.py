"""A checkpoint of more than 4 GB on eight devices: what a load and a save need beside the arrays, measured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.load_weights", f"--dir={folder}", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list(folder.iterdir()) == []
    figures = json.loads(ran.stdout.splitlines()[-1])
    print(figures)
    return figures


@pytest.mark.full
@pytest.mark.parametrize("arguments", [[], ["--store"]], ids=["local disk", "object store"])
def test_four_gigabytes_need_less_than_a_tenth_more(arguments, tmp_path):
    if shutil.disk_usage(tmp_path).free < 12e9 or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs 12 GB of disk and Linux's account of a process's memory")
    figures = bench(tmp_path, *arguments)
    assert figures["bytes"] > 4.2e9 and figures["mesh"] == [1, 4, 2]
    assert figures["bytes"] < figures["file_bytes"] < 1.001 * figures["bytes"]
    assert figures["peak_over_bytes"] < figures["whole_over_bytes"] < 0.1  # without and with Python and JAX
    assert figures["save_peak_over_bytes"] < 0.1
    assert figures["saved_equal"] is True
    assert figures["largest_saved_file"] <= 1.5e9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory")
def test_a_small_run_in_another_dtype_through_a_store(tmp_path):
    out = tmp_path / "figures" / "load.json"
    (tmp_path / "files").mkdir()
    figures = bench(tmp_path / "files", "--gigabytes=0.3", "--dtype=float32", "--store", f"--out={out}")
    assert figures == json.loads(out.read_text())
    assert figures["bytes"] > 0.6e9 and figures["bytes"] == 2 * round(figures["bytes"] / 2)
    assert figures["saved_equal"] is True
    assert {"peak_over_bytes", "seconds", "save_peak_over_bytes"} <= figures.keys()
