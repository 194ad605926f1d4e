"""Rows of files into sharded stacked arrays and back: each read once, each value at its place, nothing held twice."""

import dataclasses
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sharding.rules import GENERATION, STORED, spec
from selfreward_jax.weights import mapping, stacked

# How a stored tensor is turned, written anew: rows of einsum, whose letters are those of the table.
TURNED = {
    "embed": "VD->VD", "head": "VD->DV", "q": "(NH)D->DNH", "k": "(KH)D->DKH", "v": "(KH)D->DKH", "o": "D(NH)->NHD",
    "gate": "FD->DF", "up": "FD->DF", "down": "DF->FD",
}  # fmt: skip


@pytest.fixture
def everything(even):
    """A config with every optional parameter."""
    return dataclasses.replace(even, qkv_bias=True, o_bias=True, mlp_bias=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stacked, "BLOCK_BYTES", 256)
    monkeypatch.setattr(stacked, "_TILE", 3)


def stored_tensors(config, dtype="float32"):
    """Random values of each tensor of a file, by (path, layer)."""
    rng = np.random.default_rng(0)
    return {
        (tensor.path, layer): rng.normal(size=mapping.stored_shape(tensor, config)).astype(dtype)
        for tensor in mapping.tensors(config)
        for layer in range(config.layers if tensor.layered else 1)
    }


def in_our_axes(config, path, stored):
    """The array of a row in the layout of `llama.abstract`, by splitting, transposing and stacking."""
    form = TURNED.get(path.rsplit("/", 1)[-1])
    layers = [array for (name, _), array in sorted(stored.items()) if name == path]
    if form is not None:
        left, right = form.split("->")
        size, letters = mapping.sizes(config), left.replace("(", "").replace(")", "")
        split = [array.reshape([size[letter] for letter in letters]) for array in layers]
        layers = [array.transpose([letters.index(letter) for letter in right]) for array in split]
    shape = mapping.flat(llama.abstract(config))[path].shape
    return (np.stack(layers) if path.startswith("layers/") else layers[0]).reshape(shape)


def from_tensors(stored, log=None):
    def read(tensor, layer, rows):
        block = stored[tensor.path, layer][rows]
        if log is not None:
            log.append((tensor.path, layer, rows.start, rows.stop, block.size))
        return block

    return read


MESHES = [(STORED, (1, 1, 1)), (STORED, (2, 2, 2)), (STORED, (1, 4, 2)), (STORED, (1, 2, 1)), (GENERATION, (8, 1, 1))]
MESHES += [(GENERATION, (2, 2, 2)), (GENERATION, (1, 2, 2)), ({**STORED, "layers": "data", "vocab": None}, (2, 1, 2))]


@pytest.mark.parametrize(("rules", "shape"), MESHES)
def test_every_value_lies_where_the_table_says(rules, shape, everything, mesh_of, small_blocks):
    stored, mesh = stored_tensors(everything), mesh_of(shape)
    params = mapping.flat(stacked.place(everything, mesh, "float32", from_tensors(stored), rules))
    axes = mapping.flat(llama.logical_axes(everything))
    for path, array in params.items():
        assert array.sharding == NamedSharding(mesh, spec(axes[path], rules)), path
        wanted = in_our_axes(everything, path, stored)
        np.testing.assert_array_equal(np.asarray(array), wanted, err_msg=path)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index], err_msg=path)
    assert params.keys() == mapping.flat(llama.abstract(everything)).keys()


@pytest.mark.parametrize("rules", [STORED, GENERATION], ids=["training", "generation"])
def test_each_value_is_read_once_however_many_devices_hold_it(rules, everything, mesh_of, small_blocks):
    log = []
    read = from_tensors(stored_tensors(everything), log)
    params = stacked.place(everything, mesh_of((2, 2, 2)), "bfloat16", read, rules)
    assert sum(size for *_, size in log) == everything.parameter_count()
    assert len(set(log)) == len(log)
    assert max(2 * size for path, *_, size in log if path == "embed") <= 256
    assert {array.dtype.name for array in mapping.flat(params).values()} == {"bfloat16"}


@pytest.mark.parametrize("stored_as", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casts_round_to_nearest(dtype, stored_as, even, mesh_of):
    stored = stored_tensors(even, stored_as)
    params = mapping.flat(stacked.place(even, mesh_of((1, 2, 2)), dtype, from_tensors(stored)))
    for path, array in params.items():
        wanted = jax.numpy.asarray(in_our_axes(even, path, stored)).astype(dtype)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted), err_msg=path)


@pytest.mark.parametrize("host", [True, False], ids=["cpu", "as on an accelerator"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_way_back_gives_the_files_tensors(shape, dtype, host, everything, mesh_of, small_blocks, monkeypatch):
    monkeypatch.setattr(stacked, "_in_host_memory", lambda array: host)
    stored, mesh = stored_tensors(everything), mesh_of(shape)
    params = stacked.place(everything, mesh, "float32", from_tensors(stored))
    with ThreadPoolExecutor(2) as pool, jax.set_mesh(mesh):
        for tensor in mapping.tensors(everything):
            for layer in range(everything.layers if tensor.layered else 1):
                parts = stacked.gather(mapping.leaf(params, tensor), layer if tensor.layered else None)
                blocks = list(stacked.stored_rows(tensor, everything, parts, dtype, pool))
                wanted = stored[tensor.path, layer].astype(dtype)
                assert max(block.nbytes for block in blocks) <= max(256, wanted.nbytes // len(blocks) * 2)
                np.testing.assert_array_equal(np.concatenate(blocks), wanted, err_msg=tensor.path)


def test_blocks_are_the_union_of_the_spans_once():
    blocks = list(stacked._blocks({(0, 5), (3, 9), (20, 21), (3, 5)}, stacked.BLOCK_BYTES // 2))
    assert [value for low, high in blocks for value in range(low, high)] == [*range(9), 20]
    assert max(high - low for low, high in blocks) == 2
    assert list(stacked._blocks({(0, 2)}, 10 * stacked.BLOCK_BYTES)) == [(0, 1), (1, 2)]


# 17 million parameters, 68 MB in float32: large beside what Python needs.
WIDE = LlamaConfig(
    vocab_size=2048, embed=512, layers=4, q_heads=8, kv_heads=4, head_dim=64, ffn=2048, context=64, tied=False
)


def test_nothing_is_held_beside_the_arrays(mesh_of, monkeypatch):
    monkeypatch.setattr(stacked, "BLOCK_BYTES", 1 << 18)

    def read(tensor, layer, rows):
        return np.ones((rows.stop - rows.start, *mapping.stored_shape(tensor, WIDE)[1:]), np.float32)

    mesh = mesh_of((1, 4, 2))
    tracemalloc.start()
    try:
        params = stacked.place(WIDE, mesh, "float32", read)
        held, peak = tracemalloc.get_traced_memory()
        size = sum(array.nbytes for array in jax.tree.leaves(params))
        assert size <= held < 1.02 * size  # the arrays are the buffers that were filled
        assert peak < 1.1 * size
        tracemalloc.reset_peak()
        with ThreadPoolExecutor(2) as pool:
            for tensor in mapping.tensors(WIDE):
                for layer in range(WIDE.layers if tensor.layered else 1):
                    parts = stacked.gather(mapping.leaf(params, tensor), layer if tensor.layered else None)
                    for block in stacked.stored_rows(tensor, WIDE, parts, "bfloat16", pool):
                        assert block.nbytes <= 1 << 18
        assert tracemalloc.get_traced_memory()[1] < 1.1 * size
    finally:
        tracemalloc.stop()


def test_devices_with_the_same_part_share_it_and_may_give_it_away(even, mesh_of):
    """On a CPU the host's buffer is the array of several devices; donating it must not write into it."""
    mesh, stored = mesh_of((8, 1, 1)), stored_tensors(even)
    with jax.set_mesh(mesh):
        params = stacked.place(even, mesh, "float32", from_tensors(stored))
        embed = params["embed"]
        assert len({shard.data.unsafe_buffer_pointer() for shard in embed.addressable_shards}) == 1
        doubled = jax.jit(lambda array: array * 2, donate_argnums=0)(embed)
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), 2 * stored["embed", 0])


def test_reads_run_beside_each_other(even, mesh_of):
    meet, stored = threading.Barrier(even.layers, timeout=30), stored_tensors(even)

    def read(tensor, layer, rows):
        if tensor.path == "layers/mlp/gate":
            meet.wait()
        return stored[tensor.path, layer][rows]

    stacked.place(even, mesh_of((1, 1, 1)), "float32", read, threads=even.layers)


def test_an_error_of_a_reader_is_raised(even, mesh_of):
    def read(tensor, layer, rows):
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        stacked.place(even, mesh_of((1, 1, 1)), "float32", read)


def test_a_mesh_that_does_not_divide(even, mesh_of):
    with pytest.raises(UserError, match="mesh axis tensor=8 does not divide"):
        stacked.place(even, mesh_of((1, 1, 8)), "float32", from_tensors({}))


def test_progress_of_what_takes_long(monkeypatch, capsys):
    with stacked.megabytes("weights", 3_500_000) as advance:
        advance(1_000_000)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(stacked, "_QUIET", -1.0)
        advance(1_500_000)
        assert capsys.readouterr().out.startswith("[weights] 2/4 MB")
        advance(1_000_000)
    assert "[weights] 4/4 MB" in capsys.readouterr().out
