"""A check that measures nothing is a finished stage too, on a disk and on an object store."""

from types import SimpleNamespace

import pytest
from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import CheckConfig, Config
from selfreward_jax.data.chat import load_chat
from selfreward_jax.stages import check
from selfreward_jax.weights.source import open_source


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    if request.param == "gs":
        request.getfixturevalue("bucket")
        return epath.Path("gs://bucket/run")
    return epath.Path(tmp_path)


def test_nothing_to_measure_is_done_and_stays_done(root):
    source = open_source("random:tiny")
    config = Config(check=CheckConfig(prompts=0))
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    run = SimpleNamespace(config=config, root=root, source=source, chat=chat)
    workdir.write_text(root / "seed" / "eft_eval_sets.jsonl", "")
    folder = root / "sft" / "check"
    workdir.begin(root, "sft/check", {}, [], [folder])
    facts = check.make(run, "sft")
    workdir.finish(root, "sft/check", [], [folder], 0.0, facts)
    assert workdir.is_done(root, "sft/check")
    assert workdir.facts(root, "sft/check") == {"seconds": 0.0}
    workdir.write_text(folder / "answers" / "part-00000-of-00001.jsonl", "more\n")
    assert not workdir.is_done(root, "sft/check")
