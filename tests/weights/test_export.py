"""An exported directory: transformers loads it to the same logits, and a failure leaves nothing behind."""

import errno
import json

import jax
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfreward_jax.data.chat import encode_prompt, load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.weights import export as exports
from selfreward_jax.weights import safetensors_io, stacked
from selfreward_jax.weights.source import load_params, open_source, tiny_tokenizer

KINDS = ["llama2", "llama31", "mistral", "qwen2", "biased"]


@pytest.fixture
def tiny(mesh_of):
    opened = open_source("random:tiny")
    return opened, load_params(opened, mesh_of((1, 1, 1)), "float32")


def write(tiny, folder, **more):
    opened, params = tiny
    return exports.export(params, opened.config, opened.tokenizer, folder, "float32", "# Tiny\n\nText.", **more)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_to_the_same_logits(kind, checkpoint, mesh_of, text_ids, torch_logits, tmp_path):
    saved, mesh = checkpoint(kind), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
        exports.export(params, saved.config, tiny_tokenizer(), tmp_path / "m", "float32", "", max_shard_bytes=50_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert type(model) is type(saved.model)
    np.testing.assert_array_equal(torch_logits(model, text_ids), torch_logits(saved.model, text_ids))


def test_everything_that_belongs_to_a_model(tiny, tmp_path):
    generation = {"eos_token_id": [2, 0], "temperature": 0.7, "top_p": 0.9}
    folder = write(tiny, tmp_path / "m", generation=generation, licence="apache-2.0", base_model="org/base")
    assert (folder / "README.md").read_text() == (
        '---\nlicense: "apache-2.0"\nlibrary_name: transformers\npipeline_tag: text-generation\n'
        'base_model: "org/base"\n---\n\n# Tiny\n\nText.\n'
    )
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "do_sample": True,
        "pad_token_id": 0,
        **generation,
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, [2, 0])
    opened = open_source(str(folder))
    assert (opened.config, opened.licence, opened.eos_ids) == (tiny[0].config, "apache-2.0", (2, 0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("What is 12 + 3?  ", "<|im_end|> 😀\n\n"):
        messages = [{"role": "user", "content": text}]
        wanted = tiny[0].tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted
        assert encode_prompt(load_chat(opened.tokenizer), text) == encode_prompt(load_chat(tiny[0].tokenizer), text)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_base_model_that_is_a_path_stays_out_of_the_card(tiny, tmp_path):
    folder = write(tiny, tmp_path / "m", base_model="/home/me/model", licence="x\nevil: yes")
    text = (folder / "README.md").read_text()
    assert "base_model" not in text
    assert "\nevil" not in text


def test_an_earlier_export_is_replaced_and_nothing_else(tiny, tmp_path):
    write(tiny, tmp_path / "m", max_shard_bytes=100_000)
    write(tiny, tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert not list((tmp_path / "m").glob("*.index.json"))
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which is no part of a model; give another directory"):
        write(tiny, tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="a file stands where the model's directory should be"):
        write(tiny, tmp_path / "m" / "notes.txt")


@pytest.mark.parametrize("step", ["weights", "tokenizer", "config"])
def test_a_full_disk_leaves_what_was_there(step, tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    place, name = {
        "weights": (stacked, "stored_rows"),
        "tokenizer": (exports, "_save_tokenizer"),
        "config": (exports, "to_hf"),
    }[step]
    monkeypatch.setattr(place, name, full)
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device\); nothing was left there"):
        write(tiny, tmp_path / "m", max_shard_bytes=1e5)
    with pytest.raises(UserError, match="cannot be written"):
        write(tiny, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_on_an_object_store_the_config_comes_last(tiny, tmp_path, bucket):
    wanted = write(tiny, tmp_path / "local")
    write(tiny, "gs://bucket/m", max_shard_bytes=1e5)
    bucket.objects["bucket/m/vocab.json"] = b"of an earlier export"
    bucket.published.clear()
    seen = []
    bucket.fault = lambda what, path: (
        seen.append("bucket/m/config.json" in bucket.objects) if what == "upload" else None
    )
    write(tiny, "gs://bucket/m")
    assert not any(seen)  # while anything else was written there was none
    assert bucket.published[-1] == "bucket/m/config.json"
    assert bucket.objects == {f"bucket/m/{file.name}": file.read_bytes() for file in wanted.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_on_an_object_store_a_failure_leaves_no_model(name, tiny, bucket):
    write(tiny, "gs://bucket/m")

    def fault(what, path):
        if what == "upload" and path == f"bucket/m/{name}":
            raise RuntimeError("quota")

    bucket.fault = fault
    with pytest.raises(UserError, match=rf"gs://bucket/m/{name}: cannot be written \(quota\)"):
        write(tiny, "gs://bucket/m")
    assert "bucket/m/config.json" not in bucket.objects
    bucket.fault = lambda what, path: None
    write(tiny, "gs://bucket/m")
    assert open_source("gs://bucket/m").config == tiny[0].config


def test_on_an_object_store_files_of_the_users_are_left_alone(tiny, bucket):
    bucket.objects["bucket/m/data/rows.jsonl"] = b""
    with pytest.raises(UserError, match="gs://bucket/m: holds data, which is no part of a model"):
        write(tiny, "gs://bucket/m")
    assert list(bucket.objects) == ["bucket/m/data/rows.jsonl"]
