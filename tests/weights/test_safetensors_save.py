"""Saving: what was loaded comes back bit for bit, in files that are a function of the parameters."""

import errno
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized

from selfreward_jax.weights import safetensors_io, stacked

KINDS = ["llama2", "llama31", "mistral", "qwen2", "biased"]


def read_all(folder):
    tensors = {}
    for name in safetensors_io.weight_files(folder):
        tensors |= load_file(folder / name)
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_then_save_gives_the_original_tensors(kind, dtype, checkpoint, mesh_of, tmp_path):
    saved, mesh = checkpoint(kind, dtype), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        params = safetensors_io.load(saved.folder, saved.config, mesh, dtype)
        safetensors_io.save(params, saved.config, tmp_path, dtype)
    wanted, found = read_all(saved.folder), read_all(tmp_path)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype, name
        assert tensor.tobytes() == found[name].tobytes(), name


def test_shards_and_their_index(checkpoint, mesh_of, tmp_path):
    saved, mesh = checkpoint("llama2"), mesh_of((1, 1, 1))
    params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    safetensors_io.save(params, saved.config, tmp_path, "float32")
    names = safetensors_io.save(params, saved.config, tmp_path, "float32", max_shard_bytes=30_000)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)  # the single file before it is gone
    assert names[0] == f"model-00001-of-{len(names) - 1:05d}.safetensors"
    index = json.loads((tmp_path / names[-1]).read_text())
    found = read_all(tmp_path)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["weight_map"].keys() == found.keys() == read_all(saved.folder).keys()
    for name in names[:-1]:
        with safe_open(tmp_path / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 30_000  # noqa: SIM118


def test_the_bytes_are_a_function_of_the_parameters(checkpoint, mesh_of, tmp_path):
    saved = checkpoint("biased")
    for name, shape in (("a", (1, 1, 1)), ("b", (2, 2, 2))):
        with jax.set_mesh(mesh_of(shape)):
            params = safetensors_io.load(saved.folder, saved.config, mesh_of(shape), "float32")
            safetensors_io.save(params, saved.config, tmp_path / name, "bfloat16")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_files_are_byte_for_byte_the_librarys(checkpoint, mesh_of, tmp_path):
    saved, mesh = checkpoint("biased", "bfloat16"), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        params = safetensors_io.load(saved.folder, saved.config, mesh, "bfloat16")
        names = safetensors_io.save(params, saved.config, tmp_path, "bfloat16", max_shard_bytes=30_000)
    assert len(names) > 3
    for name in names[:-1]:
        wanted = serialized(load_file(tmp_path / name), metadata={"format": "pt"})
        assert (tmp_path / name).read_bytes() == wanted


def test_no_file_is_longer_than_asked_for_with_its_header(checkpoint, mesh_of, tmp_path):
    saved, mesh = checkpoint("llama2"), mesh_of((1, 1, 1))
    params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")

    def files(limit):
        names = safetensors_io.save(params, saved.config, tmp_path, "float32", max_shard_bytes=limit)
        return [
            (tmp_path / name, sum(array.nbytes for array in load_file(tmp_path / name).values()))
            for name in names[:-1]
        ]

    for limit in (30_000, 80_000, *(size for _, size in files(50_000))):  # sizes that tensors alone fill to the byte
        assert all(path.stat().st_size <= limit or len(load_file(path)) == 1 for path, _ in files(limit))


def breaking(monkeypatch, error, after):
    """The save fails after so many blocks."""
    blocks, rows = [], stacked.stored_rows

    def some(*arguments):
        for block in rows(*arguments):
            blocks.append(block)
            if len(blocks) > after:
                raise error
            yield block

    monkeypatch.setattr(stacked, "stored_rows", some)


def test_a_failed_save_leaves_no_half_file(checkpoint, mesh_of, tmp_path, monkeypatch):
    saved, mesh = checkpoint("llama2"), mesh_of((1, 1, 1))
    params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
    safetensors_io.save(params, saved.config, tmp_path, "float32")
    before = (tmp_path / "model.safetensors").read_bytes()
    breaking(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), 10)
    with pytest.raises(OSError, match="No space left"):
        safetensors_io.save(params, saved.config, tmp_path, "bfloat16")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_store_gets_the_same_files_and_no_half_ones(checkpoint, mesh_of, tmp_path, bucket, monkeypatch):
    saved, mesh = checkpoint("llama2"), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        params = safetensors_io.load(saved.folder, saved.config, mesh, "float32")
        names = safetensors_io.save(params, saved.config, tmp_path, "float32", max_shard_bytes=50_000)
        bucket.objects |= {"bucket/m/model.safetensors": b"old", "bucket/m/notes.txt": b"mine"}
        assert safetensors_io.save(params, saved.config, "gs://bucket/m", "float32", max_shard_bytes=50_000) == names
    assert bucket.objects.pop("bucket/m/notes.txt") == b"mine"
    assert bucket.objects == {f"bucket/m/{name}": (tmp_path / name).read_bytes() for name in names}
    assert bucket.published[-1] == "bucket/m/model.safetensors.index.json"
    before = dict(bucket.objects)
    breaking(monkeypatch, KeyboardInterrupt(), 10)
    with jax.set_mesh(mesh), pytest.raises(KeyboardInterrupt):
        safetensors_io.save(params, saved.config, "gs://bucket/m", "bfloat16")
    assert bucket.objects == before
    assert bucket.cancelled == ["bucket/m/model.safetensors"]


def test_a_mix_of_dtypes_is_kept_in_float32(checkpoint, tmp_path):
    from safetensors.numpy import save_file

    tensors = load_file(checkpoint("llama2", "bfloat16").folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert safetensors_io.stored_dtype(tmp_path) == "float32"
