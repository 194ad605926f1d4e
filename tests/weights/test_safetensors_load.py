"""Checkpoints that transformers saved: our logits are its logits, on one device and on eight."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from selfreward_jax import stores
from selfreward_jax.errors import UserError
from selfreward_jax.sharding.rules import GENERATION
from selfreward_jax.weights import safetensors_io, stacked, tensor_files

KINDS = ["llama2", "llama31", "mistral", "qwen2", "biased"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, shape, checkpoint, mesh_of, text_ids, torch_logits, our_logits):
    saved, mesh = checkpoint(kind), mesh_of(shape)
    with jax.set_mesh(mesh):
        params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
        ours = our_logits(saved.config, params, text_ids, mesh)
    theirs = torch_logits(saved.model, text_ids)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_checkpoint_in_several_files_reads_the_same(checkpoint, mesh_of):
    one, many = checkpoint("llama2"), checkpoint("llama2", max_shard_size="40KB")
    assert len(safetensors_io.weight_files(many.folder)) > 2
    mesh = mesh_of((1, 2, 2))
    trees = [safetensors_io.load(saved.folder, saved.config, mesh, "float32") for saved in (one, many)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_read_exactly_and_cast_to_nearest(dtype, checkpoint, mesh_of):
    saved, mesh = checkpoint("qwen2", dtype), mesh_of((1, 1, 1))
    assert safetensors_io.stored_dtype(saved.folder) == dtype
    stored = saved.model.model.embed_tokens.weight.float().detach().numpy()
    params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    np.testing.assert_array_equal(params["embed"], stored)
    params = safetensors_io.load(saved.folder, saved.config, mesh, "bfloat16")
    np.testing.assert_array_equal(params["embed"], stored.astype("bfloat16"))


def test_a_remote_checkpoint_is_read_by_ranges_and_once(checkpoint, mesh_of, bucket, upload_folder, monkeypatch):
    saved, mesh = checkpoint("llama2", max_shard_size="40KB"), mesh_of((2, 2, 2))
    wanted = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    folder = upload_folder(saved.folder)
    monkeypatch.setattr(stacked, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(tensor_files, "_FIRST_READ", 64)
    found = safetensors_io.load(folder, saved.config, mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    ranges = [(path, start, end) for path, start, end in bucket.asked if path.endswith(".safetensors")]
    files = safetensors_io.weight_files(saved.folder)
    assert {path for path, *_ in ranges} == {f"bucket/model/{name}" for name in files}
    assert sum(end - start for _, start, end in ranges) == sum((saved.folder / name).stat().st_size for name in files)
    assert len(set(ranges)) == len(ranges) > 80
    assert safetensors_io.stored_dtype(folder) == "float32"


def test_a_remote_read_that_fails_midway(checkpoint, mesh_of, bucket, upload_folder, monkeypatch):
    saved, mesh = checkpoint("llama2"), mesh_of((1, 1, 1))
    folder = upload_folder(saved.folder)
    monkeypatch.setattr(stores, "RETRY_AFTER", (0.0, 0.0))
    failing = []

    def fault(what, path):
        if len(bucket.asked) == 9 and len(failing) < 2:
            failing.append(path)
            raise TimeoutError("the connection was reset")

    bucket.fault = fault
    found = safetensors_io.load(folder, saved.config, mesh, "float32")
    assert len(failing) == 2
    wanted = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    name = next(name for name in bucket.objects if name.endswith(".safetensors"))
    bucket.objects[name] = bucket.objects[name][:-8]
    with pytest.raises(
        UserError, match=r"gs://bucket/model/model.safetensors: not a whole safetensors file \(.* cut\)"
    ):
        safetensors_io.load(folder, saved.config, mesh, "float32")


def test_a_file_that_is_cut_while_it_is_read(checkpoint, mesh_of, tmp_path, monkeypatch):
    saved = checkpoint("llama2")
    file = tmp_path / "model.safetensors"
    shutil.copy(saved.folder / file.name, file)
    place = stacked.place

    def cut(*arguments):
        file.write_bytes(file.read_bytes()[:-100])
        return place(*arguments)

    monkeypatch.setattr(stacked, "place", cut)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(.* bytes came from byte .* it is cut"):
        safetensors_io.load(tmp_path, saved.config, mesh_of((1, 1, 1)), "float32")


def test_the_layout_is_the_one_that_is_asked_for(checkpoint, mesh_of):
    saved, mesh = checkpoint("llama2"), mesh_of((2, 2, 2))
    params = safetensors_io.load(saved.folder, saved.config, mesh, "float32", GENERATION)
    assert params["layers"]["attention"]["q"].sharding.spec == P(None, None, ("tensor", "fsdp"), None)
    jax.tree.map(
        np.testing.assert_array_equal, params, safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    )


def test_every_tensor_that_does_not_fit_has_a_line(checkpoint, mesh_of, tmp_path):
    saved = checkpoint("llama2")
    tensors = load_file(saved.folder / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"
    tensors[q] = tensors[q][:, :31].copy()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # old files have it
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        safetensors_io.load(tmp_path, saved.config, mesh_of((1, 1, 1)), "float32")
    assert list(caught.value.args) == [
        f"{tmp_path}: tensor model.layers.2.mlp.up_proj.weight [48, 32] is missing",
        f"{tmp_path}: tensor {q} has shape [32, 31], the config asks for [32, 32]",
        f"{tmp_path}: tensor model.layers.0.self_attn.q_norm.weight [8] is no part of this model; "
        "its config may be of another model",
        f"{tmp_path}: 1 tensors (model.norm.weight, …) are stored as I8; supported are ['BF16', 'F16', 'F32']: "
        "convert a quantised checkpoint first",
    ]


def test_a_tied_head_in_the_file_is_left_over_by_right(checkpoint, mesh_of, tmp_path):
    saved = checkpoint("qwen2")
    tensors = load_file(saved.folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head" not in safetensors_io.load(tmp_path, saved.config, mesh_of((1, 1, 1)), "float32")


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"no weights here: neither model.safetensors nor model.safetensors.index"):
        safetensors_io.weight_files(tmp_path)
    with pytest.raises(UserError, match=r"no such directory$"):
        safetensors_io.weight_files(tmp_path / "nowhere")


def test_a_bucket_or_folder_that_is_not_there(bucket):
    with pytest.raises(UserError) as caught:
        safetensors_io.weight_files("gs://bucket/model")
    assert str(caught.value) == "gs://bucket/model: no such directory or bucket"


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"holds pytorch_model.bin: pickled weights can run code and are not read"):
        safetensors_io.weight_files(tmp_path)


def test_a_truncated_file_is_named(checkpoint, mesh_of, tmp_path):
    saved = checkpoint("llama2")
    whole = (saved.folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file \(.*\); fetch it again"):
        safetensors_io.load(tmp_path, saved.config, mesh_of((1, 1, 1)), "float32")


def test_an_index_that_names_lost_files(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        safetensors_io.weight_files(tmp_path)
    assert len(caught.value.args) == 2
    assert "names model-00001-of-00002.safetensors, which is not in the directory" in str(caught.value)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not an index of safetensors files"):
        safetensors_io.weight_files(tmp_path)
