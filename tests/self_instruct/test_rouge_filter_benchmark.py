"""The benchmark of the novelty filter runs, and its figures are of the form that it documents."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, "-m", "benchmarks.rouge_filter", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_small_run(tmp_path):
    out = tmp_path / "results" / "figures.json"
    ran = bench("--pool=30", "--candidates=20", f"--out={out}")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads(out.read_text())
    assert figures["decisions_equal"] is True
    assert (figures["pool"], figures["compared"], figures["compared_at_full_pool"]) == (30, 60, 20)
    assert list(figures["our_us_by_pool"]) == ["3", "7", "15", "30"]
    assert 0 < figures["compared_similar"] < 60  # both verdicts
    assert figures["speedup"] > 1
    assert "rouge_score" in figures["rival"]


def test_prompts_of_a_file_that_are_too_few(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}"}) + "\n" for n in range(12)))
    ran = bench("--pool=10", "--candidates=10", f"--prompts={file}")
    assert ran.returncode == 2 and "12 distinct prompts, 15 are needed" in ran.stderr
    assert "Traceback" not in ran.stderr
