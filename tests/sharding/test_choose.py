"""Which mesh for how many devices: fixed answers for known slices, and properties over all of them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax import loaded
from selfreward_jax.config import Config, DpoConfig, MeshConfig, TrainConfig
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sharding import choose, rules
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.weights.source import open_source

LLAMA2_70B = LlamaConfig(32000, 8192, 80, 64, 8, 128, 28672, 4096)
LLAMA2_7B = LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096)
SMOL_135M = LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, 2048, tied=True)
GB = 10**9


def extents(config):
    return rules.extents(llama.logical_axes(config), llama.abstract(config))


@pytest.mark.parametrize(
    ("config", "devices", "rows", "sizes"),
    [
        (SMOL_135M, 1, 2, (1, 1, 1)),
        (LLAMA2_70B, 64, 16, (1, 16, 4)),  # v5p:4x4x4, the rows of the 70B preset
        (LLAMA2_70B, 8, 16, (1, 8, 1)),
        (LLAMA2_70B, 64, 64, (1, 64, 1)),
        (LLAMA2_7B, 8, 8, (1, 8, 1)),
        (LLAMA2_7B, 8, 2, (1, 2, 4)),
        (SMOL_135M, 6, 2, (1, 2, 3)),  # three kv heads: tensor=3 divides them
    ],
)
def test_training_meshes(config, devices, rows, sizes):
    assert choose.training(devices, extents(config), rows) == sizes


@pytest.mark.parametrize(
    ("config", "devices", "memory", "sizes"),
    [
        (SMOL_135M, 1, 0, (1, 1, 1)),
        (SMOL_135M, 8, 24 * GB, (8, 1, 1)),
        (LLAMA2_7B, 8, 80 * GB, (8, 1, 1)),  # 13.5 GB: a copy a device
        (LLAMA2_7B, 8, 16 * GB, (4, 1, 2)),  # half of 16 GB holds half of it
        (LLAMA2_70B, 8, 95 * GB, (2, 1, 4)),
        (LLAMA2_70B, 64, 16 * GB, (2, 4, 8)),  # more pieces than kv heads: query heads and ffn over fsdp too
        (LLAMA2_70B, 4, 16 * GB, (1, 1, 4)),  # never fits: as small as it gets
    ],
)
def test_generation_meshes(config, devices, memory, sizes):
    weights = 2 * config.parameter_count()
    assert choose.generation(devices, extents(config), weights, memory) == sizes


@given(
    st.sampled_from([SMOL_135M, LLAMA2_7B, LLAMA2_70B]), st.integers(1, 96), st.integers(1, 64), st.integers(1, 200)
)
def test_any_number_of_devices_has_a_mesh_that_divides_the_model(config, devices, rows, memory):
    sizes = extents(config)
    for table, (data, fsdp, tensor) in (
        (rules.STORED, choose.training(devices, sizes, rows)),
        (rules.GENERATION, choose.generation(devices, sizes, 2 * config.parameter_count(), memory * GB)),
    ):
        assert data * fsdp * tensor == devices
        assert rules.misfits(sizes, {"data": data, "fsdp": fsdp, "tensor": tensor}, table) == []


def test_the_rows_that_are_padding_are_counted_as_they_are_computed(capsys):
    config = Config(sft=TrainConfig(batch=8), dpo=DpoConfig(batch=4), mesh=MeshConfig(2, 2, 2))
    source = open_source("random:tiny")
    loaded.training_mesh(config, source.config)
    assert capsys.readouterr().out == ""
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, batch=1))
    loaded.training_mesh(config, source.config)
    assert capsys.readouterr().out == "dpo.batch=1: at least 3 of 4 rows, data x fsdp, are padding\n"


def test_a_named_mesh_that_cuts_query_heads_across_kv_heads_is_one_line():
    config = LlamaConfig(64, 16, 2, 12, 3, 4, 24, 64)  # a device's 6 query heads would read one and a half kv heads
    source = dataclasses.replace(open_source("random:tiny"), config=config)
    mesh = make_mesh(-1, 1, 1)
    with pytest.raises(UserError, match=r"--config.generation_mesh: fsdp=2 x tensor=1 cuts the 12 query heads across the 3"):
        loaded.generation_mesh(MeshConfig(4, 2, 1), source, "float32", mesh)
    chosen = loaded.generation_mesh(MeshConfig(), source, "float32", mesh)
    assert choose.whole_heads(tuple(chosen.shape.values()), extents(config))
