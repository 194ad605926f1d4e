"""The command that looks at a run: what it prints, that it needs no jax, writes nothing and survives any output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfreward_jax import inspect as command
from selfreward_jax import workdir
from selfreward_jax.data.records import Judgment, Prompt, Response, to_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """A run that is judging: one prompt, two candidates, one judgment so far, and its part cut."""
    from etils import epath

    root = tmp_path / "run"
    rows = {
        "m2/prompts.jsonl": [Prompt("p", "Why [red]?", "file")],
        "m2/responses/part-00000-of-00001.jsonl": [
            Response("p", i, f"Because {i} \x1b[31m.", (1, 2), (-1.0, -1.0), "stop") for i in range(2)
        ],
        "m2/judgments/part-00000-of-00003.jsonl": [Judgment("p", 0, 0, "Good.\nScore: 4", (3,), "stop", "4")],
    }
    for name, some in rows.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(to_json(row) + "\n" for row in some))
    with (root / "m2/judgments/part-00000-of-00003.jsonl").open("a") as file:
        file.write('{"prompt_id":"p","resp')
    (root / "config.json").write_text(json.dumps({"target": "m2", "model.source": "demo", "seed": 0}))
    workdir.finish(epath.Path(root), "m2/responses", [], [], 4.0, {"responses": 2})
    workdir.begin(epath.Path(root), "m2/judgments", {}, [], [])
    return root


def inspect(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    return command.main()


def files(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_overview_artifact_and_prompt_are_printed_and_nothing_is_written(run, monkeypatch, capsys):
    before = files(run)
    assert inspect(monkeypatch, run) == 0
    overview = capsys.readouterr().out
    assert overview.startswith(f"{run}: target m2, model.source demo, seed 0\nstages\n")
    assert "  m2/responses    done        2 responses             4.0 s\n" in overview
    assert "  m2/judgments    in progress 1 rows, 1/3 parts\n" in overview
    assert "m2/judgments: 1 judgment in 1 of 3 parts\n" in overview
    part = run / "m2/judgments/part-00000-of-00003.jsonl"
    assert overview.splitlines()[-1].startswith(f"problem: {part}:2: not JSON")
    assert inspect(monkeypatch, run, "m2/responses", "--examples=1", "--seed=3") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("m2/responses: 2 responses\n")
    assert shown.count("example: m2/responses p\n") == 1
    assert inspect(monkeypatch, run, "--id=p") == 0
    prompt = capsys.readouterr().out
    assert "    Why [red]?\n" in prompt
    assert "  candidate 0: mean 4 of 1 scores in 1 judgments; stop, 2 tokens\n    Because 0 \\x1b[31m.\n" in prompt
    assert "    judgment 0: score 4\n      Good.\n      Score: 4\n" in prompt
    assert "  no pair: m2/pairs is not done\n" in prompt
    assert "\x1b" not in overview + shown + prompt
    assert files(run) == before


def test_the_same_seed_draws_the_same_examples(run, monkeypatch, capsys):
    path = run / "m2/prompts.jsonl"
    path.write_text("".join(to_json(Prompt(str(i), "Why?", "file")) + "\n" for i in range(50)))

    def drawn(seed):
        assert inspect(monkeypatch, run, "m2/prompts", f"--seed={seed}") == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("example")]

    assert drawn(0) == drawn(0)
    assert len(drawn(0)) == 3
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "m2/pairs"], "m2/pairs: no such artifact; there are: m2/prompts, m2/responses, m2/judgments"),
        (["{run}", "--id=q"], "--id=q: no row of {run} has it"),
        (["{run}", "m2/prompts", "--examples=-1"], "--examples=-1: not below 0"),
        (["{run}/m2"], "{run}/m2: not the workdir of a run: it has no config.json of one, and no stages"),
        (
            ["foo://x"],
            "workdir=foo://x: foo:// is no store that can be used; give a local path or gs://, s3://, az://, hf://",
        ),
        (["{run}/none"], "{run}/none: no such folder; the workdir of a run is needed"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, monkeypatch, capsys, words, says):
    assert inspect(monkeypatch, *(word.format(run=run) for word in words)) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {says.format(run=run)}\n"
    assert printed.out == ""


def test_arguments_that_are_none(monkeypatch):
    for words in ([], ["a", "b", "c"], ["a", "--seed=x"]):
        with pytest.raises(SystemExit) as caught:
            inspect(monkeypatch, *words)
        assert caught.value.code == 2


def start(run, *words, **environment):
    code = "import sys; from selfreward_jax import inspect; code = inspect.main(); "
    code += "sys.exit(code or 10 * any(name in sys.modules for name in ('jax', 'transformers', 'numpy', 'torch')))"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, str(run), *words], capture_output=True, env=settings, check=False, timeout=120
    )


def test_it_starts_without_jax_and_prints_to_any_encoding(run):
    done = start(run, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2588" in done.stdout  # the bars, which ASCII lacks
    assert done.stdout.isascii()


def test_a_reader_that_has_seen_enough_is_no_error(run):
    path = run / "m2/prompts.jsonl"
    path.write_text("".join(to_json(Prompt(str(i), "Why? " * 99, "file")) + "\n" for i in range(999)))
    command = [sys.executable, "-m", "selfreward_jax.inspect", str(run), "m2/prompts", "--examples=999"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"m2/prompts: 999 prompts\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0
