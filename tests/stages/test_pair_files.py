"""The files of preference pairs, for texts that have no UTF-8 form too."""

import json
from types import SimpleNamespace

from etils import epath

from selfreward_jax import presets
from selfreward_jax.config import from_config_dict
from selfreward_jax.data import layouts
from selfreward_jax.data.chat import load_chat
from selfreward_jax.data.records import Judgment, Pair, Prompt, Response, read_records
from selfreward_jax.run import write_records
from selfreward_jax.stages import pairs
from selfreward_jax.weights.source import open_source

HALF = "Say \ud800 for me"  # JSON can spell half of a surrogate pair, which has no UTF-8


def test_a_prompt_that_has_no_utf8_form_reaches_both_files(tmp_path):
    source = open_source("random:tiny")
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    config = from_config_dict(presets.get("m2", "tiny"))
    run = SimpleNamespace(config=config, root=epath.Path(tmp_path), source=source, chat=chat)
    asked = [Prompt("a", HALF, "file"), Prompt("b", "Say é", "file")]
    write_records(run.root / "m2" / "prompts.jsonl", asked)
    answers = [Response(some.id, i, f"{i}", (5 + i, 2), (-1.0, -1.0), "stop") for some in asked for i in range(2)]
    write_records(run.root / "m2" / "responses" / "part-0.jsonl", answers)
    votes = [Judgment(some.id, i, 0, f"Score: {i}", (7,), "stop", f"{i}") for some in asked for i in range(2)]
    write_records(run.root / "m2" / "judgments" / "part-0.jsonl", votes)
    assert pairs.make(run, "m2")["pairs"] == 2
    rows = [json.loads(line) for line in (tmp_path / "m2" / "preferences.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert rows == [
        {"prompt": HALF, "chosen": "1", "rejected": "0"}, {"prompt": "Say é", "chosen": "1", "rejected": "0"},
    ]  # fmt: skip
    assert [pair.prompt for pair in read_records(tmp_path / "m2" / "pairs.jsonl", Pair)] == [HALF, "Say é"]
    found, drops = layouts.read_preferences(str(tmp_path / "m2" / "preferences.jsonl"), "--data")
    assert [one.prompt for one in found] == [HALF, "Say é"] and not drops
