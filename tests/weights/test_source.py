"""Opening a model by what the user wrote: config and tokenizer first, then weights in the same layout."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfreward_jax.data.chat import load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.sharding.rules import GENERATION
from selfreward_jax.weights import source as sources


@pytest.fixture
def directory(checkpoint, tmp_path):
    """A model directory: a Llama of 96 ids and a tokenizer that has 90."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama2").folder, folder)
    vocabulary = {"<s>": 1, "</s>": 2, **{chr(65 + number): number for number in (0, *range(3, 90))}}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.7}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


def test_a_directory(directory, mesh_of, checkpoint):
    opened = sources.open_source(str(directory))
    assert (opened.kind, opened.name, opened.licence, opened.repository) == ("hf", "model", "mit", None)
    assert opened.config == checkpoint("llama2").config
    assert opened.eos_ids == (2, 7)
    assert opened.generation["temperature"] == 0.7
    assert opened.tokenizer("AD").input_ids == [0, 3]
    assert sources.stored_dtype(opened) == "float32"
    assert sources.param_bytes(opened, "bfloat16") == 2 * opened.config.parameter_count()
    mesh = mesh_of((1, 2, 1))
    params = sources.load_params(opened, mesh, "bfloat16")
    leaves = jax.tree.leaves(params)
    assert sum(leaf.nbytes for leaf in leaves) == sources.param_bytes(opened, "bfloat16")


def test_a_hub_name_fetches_the_config_first_and_the_weights_later(directory, mesh_of, monkeypatch):
    asked = []

    def hub(name, weights=True):
        asked.append((name, weights))
        return directory

    monkeypatch.setattr(sources.fetch, "hub", hub)
    opened = sources.open_source("org/name")
    assert (opened.kind, opened.name, opened.repository) == ("hf", "org/name", "org/name")
    assert asked == [("org/name", False)]
    sources.load_params(opened, mesh_of((1, 1, 1)), "float32")
    assert asked[1:] == [("org/name", True)]


def test_random_tiny_is_the_same_on_every_mesh_and_in_every_process(mesh_of):
    opened = sources.open_source("random:tiny")
    config = opened.config
    assert (config.vocab_size % 64, config.vocab_size, config.tied, config.layers) == (0, 1024, True, 2)
    trees = [sources.load_params(opened, mesh_of(shape), "float32") for shape in ((1, 1, 1), (2, 2, 2))]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert jax.tree.structure(trees[0]) == jax.tree.structure(llama.abstract(config))
    assert 0.015 < float(np.std(trees[0]["embed"])) < 0.025
    program = (
        "from selfreward_jax.weights.source import tiny_tokenizer as t; print(t().backend_tokenizer.to_str(), end='')"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other == opened.tokenizer.backend_tokenizer.to_str()


def test_random_tiny_has_a_chat_and_reads_its_own_language():
    opened = sources.open_source("random:tiny")
    chat = load_chat(opened.tokenizer, "own", opened.eos_ids)
    assert opened.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == "<|im_end|>"
    text = "Review the user’s question and the corresponding response\n2 + 2 = 4 😀"
    assert opened.tokenizer.decode(opened.tokenizer(text).input_ids) == text
    assert len(opened.tokenizer(text).input_ids) < 40


def test_another_tokenizer_than_the_models(directory, tmp_path):
    sources.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError) as caught:
        sources.open_source(str(directory), str(tmp_path / "tokenizer"))
    assert str(caught.value) == (
        "--config.model.tokenizer: the tokenizer has 1024 ids, the model's embedding 96; "
        "give the tokenizer that the model was trained with"
    )
    shutil.move(directory / "tokenizer.json", tmp_path / "gone.json")
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer can be read there .*--config.model.tokenizer=DIRECTORY"):
        sources.open_source(str(directory))


def test_a_directory_on_an_object_store(directory, mesh_of, bucket, upload_folder):
    local, remote = sources.open_source(str(directory)), sources.open_source(upload_folder(directory))
    assert remote.tokenizer("AD").input_ids == [0, 3]
    for field in ("kind", "config", "generation", "licence", "name", "eos_ids"):
        assert getattr(remote, field) == getattr(local, field), field
    assert sources.stored_dtype(remote) == "float32"
    found, wanted = (sources.load_params(one, mesh_of((1, 2, 1)), "float32") for one in (remote, local))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    del bucket.objects["bucket/model/config.json"]
    with pytest.raises(UserError, match=r"gs://bucket/model: no config.json"):
        sources.open_source("gs://bucket/model")


def test_an_object_store_that_refuses_is_one_line(bucket):
    def refuse(what, path):
        raise RuntimeError("401 Anonymous caller")

    bucket.fault = refuse
    with pytest.raises(
        UserError, match=r"^gs://bucket/model: cannot be listed \(401 Anonymous caller\); check the name"
    ):
        sources.open_source("gs://bucket/model")


def test_an_object_store_whose_package_is_missing(monkeypatch):
    def missing(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(sources.stores, "_files", missing)
    with pytest.raises(UserError, match=r"^gs://bucket/model: Please install gcsfs .*; `pip install gcsfs`$"):
        sources.open_source("gs://bucket/model")


def test_the_layout_of_random_weights_is_the_one_that_is_asked_for(mesh_of):
    params = sources.load_params(sources.open_source("random:tiny"), mesh_of((1, 2, 2)), "float32", GENERATION)
    assert params["embed"].sharding.spec == P(("tensor", "fsdp"), None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", r"no such file or directory; give 'demo', 'random:tiny', FILE.gguf"),
        ("nowhere.gguf", "no gguf file at nowhere.gguf"),
        ("gs://bucket/m.gguf", "gguf files are read from local disks; copy it to one first"),
        ("random:huge", "random weights come in one size, 'random:tiny'"),
        ("foo://bucket/m", "foo:// is no store that can be used; give a local path or gs://"),
    ],
)
def test_sources_that_are_none(source, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        sources.open_source(source)


def test_directories_that_are_no_model(directory):
    config = json.loads((directory / "config.json").read_text())
    for extra, message in (
        ({"auto_map": {}}, "auto_map: the model brings its own code, which is never run"),
        ({"quantization_config": {}}, "quantization_config: quantised weights are not supported"),
        ({"attn_logit_softcapping": 50}, "attn_logit_softcapping=50: not supported"),
    ):
        (directory / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(UserError, match=message):
            sources.open_source(str(directory))
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON object"):
        sources.open_source(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config.json; a model directory has config.json, safetensors and"):
        sources.open_source(str(directory))


def test_a_mesh_that_does_not_divide_the_model(mesh_of):
    with pytest.raises(UserError, match=r"--config.mesh: kv_heads has 2, which mesh axis tensor=4"):
        sources.load_params(sources.open_source("random:tiny"), mesh_of((1, 1, 4)), "float32")
