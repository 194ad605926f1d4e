"""`python -m selfreward_jax.generate`: prompts to answers, and what it refuses."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest

from selfreward_jax import generate, interactive, workdir
from selfreward_jax.data.chat import load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.weights.source import open_source

ROOT = Path(__file__).parents[1]


def arguments(**changed):
    given = {
        "model": "random:tiny", "prompt": "", "prompts": "in.jsonl", "out": "out.jsonl", "samples": 1,
        "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "max_new_tokens": 8, "seed": 0, "rows": 4, "chat_template": "own",
        "dtype": "float32", "stop": [],
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
        whole = chat.tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"] in (whole, whole.removesuffix("\ufffd"))  # a character that the last token cut is dropped
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
        (
            {"stop": ["\n", "", "x" * 250]},
            [
                "stop string '': empty, so no text could begin",
                "stop strings: 251 bytes of UTF-8, at most 250 together; give fewer or shorter ones",
            ],
        ),
        ({"temperature": float("nan")}, ["--temperature=nan: a number that is not negative"]),
    ],
)
def test_arguments_that_make_no_sense_are_said_at_once(changed, lines):
    with pytest.raises(UserError) as caught:
        generate._check(arguments(**changed))
    assert list(caught.value.args) == lines


def test_arguments_that_make_sense():
    generate._check(arguments())
    generate._check(arguments(prompt="a", prompts="", out="", temperature=0.0, top_p=1.0, stop=["\n\n", "User:"]))
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
    assert capsys.readouterr().err == "error: --model: no gguf file at nowhere.gguf\n"


def test_stop_strings_may_be_repeated(monkeypatch):
    asked = []
    monkeypatch.setattr(interactive, "answer", lambda arguments, prompts: asked.append(arguments.stop) or iter([]))
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?") == 0
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", "--stop=\n\n", "--stop", "User:") == 0
    assert asked == [[], ["\n\n", "User:"]]
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", "--stop=") == 2


def test_an_answer_to_one_prompt_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        interactive, "answer", lambda arguments, prompts: iter([{"id": "prompt", "text": "Blue.\nSo."}])
    )
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?") == 0
    assert capsys.readouterr().out == "Blue.\nSo.\n"
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", f"--out={tmp_path / 'o.jsonl'}") == 0
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {"id": "prompt", "text": "Blue.\nSo."}


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("{tmp}", "a folder; name a file in it, such as {tmp}/answers.jsonl"),
        ("{tmp}/file/o.jsonl", "File exists; give a file in a folder you can write"),
        ("foo://b/o.jsonl", "foo:// is no store that can be used; give a local path or gs://, s3://, az://, hf://"),
        ("gs://bucket", "a folder; name a file in it, such as gs://bucket/answers.jsonl"),
    ],
)
def test_a_wrong_out_is_refused_before_anything_is_generated(monkeypatch, tmp_path, capsys, out, says):
    monkeypatch.setattr(interactive, "answer", lambda *_: pytest.fail("the answers could not be kept"))
    (tmp_path / "file").write_text("")
    out = out.format(tmp=tmp_path)
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", f"--out={out}") == 2
    assert capsys.readouterr().err == f"error: --out={out}: {says.format(tmp=tmp_path)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_store_that_takes_nothing_is_refused_first_and_one_that_does_has_the_answers(monkeypatch, capsys, bucket):
    monkeypatch.setattr(interactive, "answer", lambda *_: pytest.fail("the answers could not be kept"))

    def refuse(what, path):
        if what == "upload":
            raise OSError("no permission")

    bucket.fault = refuse
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", "--out=gs://bucket/a/o.jsonl") == 2
    assert "cannot be written (no permission); check the name" in capsys.readouterr().err
    bucket.fault = lambda *_: None
    monkeypatch.setattr(interactive, "answer", lambda *_: iter([{"id": "prompt", "text": "Blue."}]))
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", "--out=gs://bucket/a/o.jsonl") == 0
    assert {name: json.loads(data) for name, data in bucket.objects.items()} == {
        "bucket/a/o.jsonl": {"id": "prompt", "text": "Blue."}
    }


def test_answers_that_a_full_disk_refuses_at_the_end_are_kept_elsewhere(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(interactive, "answer", lambda *_: iter([{"id": "prompt", "text": "Blue."}]))
    full = (
        f"{tmp_path / 'o.jsonl'}: No space left on device; make room or mend it, then start again to go on from here"
    )
    monkeypatch.setattr(workdir, "write_text", lambda *_: (_ for _ in ()).throw(UserError(full)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert command(monkeypatch, "--model=random:tiny", "--prompt=Why?", f"--out={tmp_path / 'o.jsonl'}") == 2
    (kept,) = (tmp_path / "elsewhere").iterdir()
    assert json.loads(kept.read_text()) == {"id": "prompt", "text": "Blue."}
    said = f"error: {tmp_path / 'o.jsonl'}: No space left on device; the answers are in {kept}\n"
    assert capsys.readouterr().err == said


def test_prompts_that_are_all_too_long_give_no_answers_and_read_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(interactive, "use_compilation_cache", lambda folder: None)
    monkeypatch.setattr(interactive, "open_engine", lambda *_: pytest.fail("no weights are needed for nothing"))
    found = list(interactive.answer(arguments(max_new_tokens=1532), [("a", "Why?"), ("b", "How?")]))
    assert found == []
    assert "skipped 2 of 2 prompts: longer than the context of 1536" in capsys.readouterr().out


def test_a_text_without_a_utf8_form_loses_no_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(
        interactive, "answer", lambda *_: iter([{"id": "a", "text": "half \ud800"}, {"id": "b", "text": "é"}])
    )
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    generate._run(arguments(prompt="", prompts=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out.jsonl")))
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        "half \ud800",
        "é",
    ]
