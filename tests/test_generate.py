"""`python -m selfreward_jax.generate`: prompts to answers, and what it refuses."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from selfreward_jax import generate, interactive
from selfreward_jax.data.chat import load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.weights.source import open_source

ROOT = Path(__file__).parents[1]


def arguments(**changed):
    given = {
        "model": "random:tiny", "prompt": "", "prompts": "in.jsonl", "out": "out.jsonl", "samples": 1,
        "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "max_new_tokens": 8, "seed": 0, "rows": 4, "chat_template": "own",
        "dtype": "float32",
    }  # fmt: skip
    return Namespace(**{**given, **changed})


def test_a_file_of_prompts_becomes_a_file_of_answers(tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": "q-a", "prompt": "Why is the sky blue?"}, {"prompt": "word " * 1600}, {"text": "Été — 12 + 3?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "SELFREWARD_CACHE": str(tmp_path / "cache"),
    }
    command = [
        sys.executable, "-m", "selfreward_jax.generate", "--model=random:tiny", "--chat_template=own",
        f"--prompts={questions}", f"--out={answers}", "--samples=2", "--max_new_tokens=6", "--seed=3",
        "--top_k=500", "--min_p=0.001",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped 1 of 3 prompts: longer than the context of 1536" in done.stdout
    assert "[generate] 4/4 answers" in done.stdout
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["id"], row["index"]) for row in found] == [("q-a", 0), ("q-a", 1), ("line-3", 0), ("line-3", 1)]
    source = open_source("random:tiny")
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    for row in found:
        assert set(row) == {"id", "prompt", "index", "text", "token_ids", "logprobs", "finish_reason"}
        assert row["prompt"] == (rows[0]["prompt"] if row["id"] == "q-a" else rows[2]["text"])
        assert 1 <= len(row["token_ids"]) == len(row["logprobs"]) <= 6
        assert all(0 <= token < chat.vocabulary for token in row["token_ids"])
        assert all(logprob < 0 for logprob in row["logprobs"])
        stopped = row["token_ids"][-1] in chat.stop_ids
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(row["token_ids"]) == 6
        assert row["text"] == chat.tokenizer.decode(row["token_ids"], skip_special_tokens=True)
    assert len({tuple(row["token_ids"]) for row in found}) > 2  # each answer has random draws of its own


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"prompt": "", "prompts": ""}, ["give either --prompt or --prompts"]),
        ({"prompt": "a", "prompts": "b"}, ["give either --prompt or --prompts"]),
        ({"out": ""}, ["--prompts needs --out"]),
        ({"samples": 0}, ["--samples=0: at least 1"]),
        ({"max_new_tokens": -1, "rows": 0}, ["--rows=0: at least 1", "--max_new_tokens=-1: at least 1"]),
        ({"temperature": -0.1}, ["--temperature=-0.1: a number that is not negative"]),
        ({"top_p": 0.0}, ["--top_p=0.0: in (0, 1]"]),
        (
            {"top_k": -1, "min_p": 1.0},
            ["--top_k=-1: not negative; 0 is no limit", "--min_p=1.0: in [0, 1); 0 is no limit"],
        ),
        ({"seed": -1}, ["--seed=-1: from 0 to 2**32 - 1"]),
        ({"temperature": float("nan")}, ["--temperature=nan: a number that is not negative"]),
    ],
)
def test_arguments_that_make_no_sense_are_said_at_once(changed, lines):
    with pytest.raises(UserError) as caught:
        generate._check(arguments(**changed))
    assert list(caught.value.args) == lines


def test_arguments_that_make_sense():
    generate._check(arguments())
    generate._check(arguments(prompt="a", prompts="", out="", temperature=0.0, top_p=1.0, top_k=5, min_p=0.5))


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    return generate.main()


def test_mistakes_are_lines_and_exit_code_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(interactive, "answer", lambda *_: pytest.fail("no model is opened for a wrong command"))
    assert command(monkeypatch, "--model=random:tiny") == 2
    assert capsys.readouterr().err == "error: give either --prompt or --prompts\n"
    missing = tmp_path / "none.jsonl"
    assert command(monkeypatch, "--model=random:tiny", f"--prompts={missing}", "--out=x") == 2
    assert capsys.readouterr().err == f"error: {missing}: no such file\n"
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--prompt=x")
    assert caught.value.code == 2


def test_a_model_that_is_not_there_is_a_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(interactive, "use_compilation_cache", lambda folder: None)
    assert command(monkeypatch, "--model=nowhere.gguf", "--prompt=x") == 2
    assert capsys.readouterr().err == "error: --config.model.source: no gguf file at nowhere.gguf\n"


def test_an_answer_to_one_prompt_is_printed_and_a_full_disk_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        interactive, "answer", lambda arguments, prompts: iter([{"id": "prompt", "text": "Blue.\nSo."}])
    )
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?") == 0
    assert capsys.readouterr().out == "Blue.\nSo.\n"
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", f"--out={tmp_path / 'o.jsonl'}") == 0
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {"id": "prompt", "text": "Blue.\nSo."}
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", f"--out={tmp_path / 'file' / 'o.jsonl'}") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file' / 'o.jsonl'}: ")


def test_prompts_that_are_all_too_long_give_no_answers_and_read_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(interactive, "use_compilation_cache", lambda folder: None)
    monkeypatch.setattr(interactive, "load_params", lambda *_: pytest.fail("no weights are needed for nothing"))
    found = list(interactive.answer(arguments(max_new_tokens=1532), [("a", "Why?"), ("b", "How?")]))
    assert found == []
    assert "skipped 2 of 2 prompts: longer than the context of 1536" in capsys.readouterr().out


def test_a_text_without_a_utf8_form_loses_no_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(interactive, "answer", lambda *_: iter([{"id": "a", "text": "half \ud800"}, {"id": "b", "text": "é"}]))
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    generate._run(arguments(prompt="", prompts=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out.jsonl")))
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["half \ud800", "é"]
