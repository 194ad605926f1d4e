"""`python -m selfreward_jax.train`: people's own rows to a model, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("--config=configs/sft.py:tiny", "--config.sft.epochs=2")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfreward_jax.train", *arguments]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.slow
def test_sft_and_then_dpo_on_own_rows(tmp_path: Path) -> None:
    talks = [turns(f"What is {n} plus one?", f"It is {n + 1}.") for n in range(6)] + [turns("Nothing?", " ")]
    data = write(tmp_path / "talks.jsonl", talks)
    first = train("--loss=sft", "--model=random:tiny", f"--data={data}", f"--workdir={tmp_path / 'sft'}", *SIZES)
    assert first.returncode == 0, first.stderr
    assert "[trained/examples] 6 examples; dropped {'empty': 1}" in first.stdout
    made = Path(first.stdout.splitlines()[-1])
    assert made == tmp_path / "sft" / "trained" / "model"
    choices = [{"prompt": "Name a sea.", "chosen": "The Baltic.", "rejected": f"A sea, {n}."} for n in range(4)]
    choices.append({"prompt": "Name a sea.", "chosen": "One.", "rejected": "word " * 2000})
    data = write(tmp_path / "choices.jsonl", choices)
    arguments = ("--loss=dpo", f"--model={made}", f"--data={data}", f"--workdir={tmp_path / 'dpo'}", *SIZES)
    second = train(*arguments)
    assert second.returncode == 0, second.stderr
    assert "[trained/pairs] 4 pairs; dropped {'over 900 tokens': 1}" in second.stdout
    assert "largest margin before the first update" in second.stdout
    again = train(*arguments)
    assert again.returncode == 0 and again.stdout.count("done before") == 4, again.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "trained" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpo" / "trained" / "model")
    assert model.config.num_hidden_layers == 2 and tokenizer.chat_template
    card = (tmp_path / "dpo" / "trained" / "model" / "README.md").read_text()
    assert "DPO on 4 preference pairs" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([{"question": "Why?", "reply": "So."}], (), "messages"),
        ([turns("Why?", "So.")], ("--loss=dpo",), "chosen"),
        ([turns("Why?", " ")], (), "empty"),
        ([turns("Why?", "So.")], ("--config.data.ift=other.jsonl",), "--data and --model name it here"),
        ([turns("Why?", "So.")], ("--config.dpo.betta=1",), "no field of the config"),
    ],
)
def test_a_mistake_is_one_line(rows, more, says, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    loss = "--loss=dpo" if "--loss=dpo" in more else "--loss=sft"
    more = tuple(word for word in more if word != loss)
    done = train(loss, "--model=random:tiny", f"--data={data}", f"--workdir={tmp_path / 'run'}", *SIZES, *more)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.strip().splitlines()), done.stderr
