"""The sharding table: every parameter on the axes that are meant, and no way to miss one silently."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sharding import rules
from selfreward_jax.sharding.mesh import AXES, make_mesh
from selfreward_jax.sharding.place import place, rows_multiple

LLAMA2_70B = LlamaConfig(
    vocab_size=32000, embed=8192, layers=80, q_heads=64, kv_heads=8, head_dim=128, ffn=28672, context=4096
)
SMOL_135M = LlamaConfig(
    vocab_size=49152, embed=576, layers=30, q_heads=9, kv_heads=3, head_dim=64, ffn=1536, context=2048, tied=True
)


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Explicit,) * 3)


def leaves(config, axes_rules=rules.STORED):
    """{path: (shape, spec)} of a model's parameters."""
    specs = jax.tree.leaves(rules.specs(llama.logical_axes(config), axes_rules), is_leaf=lambda x: isinstance(x, P))
    paths = jax.tree_util.tree_leaves_with_path(llama.abstract(config))
    return {
        "/".join(k.key for k in path): (array.shape, spec) for (path, array), spec in zip(paths, specs, strict=True)
    }


# --- one spec -------------------------------------------------------------------------------------------------------


def test_a_spec_is_read_from_the_table():
    assert rules.spec(("layers", "embed", "q_heads", "head_dim"), rules.STORED) == P(None, "fsdp", "tensor", None)
    assert rules.spec(("layers", "embed", "q_heads", "head_dim"), rules.COMPUTED) == P(None, None, "tensor", None)
    assert rules.spec((), rules.STORED) == P()


def test_an_axis_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        rules.spec(("ffn", "vocab"), rules.STORED)
    with pytest.raises(ValueError, match="twice"):
        rules.spec(("rows", "embed"), {"rows": ("data", "fsdp"), "embed": "fsdp"})
    assert rules.spec(("rows", "embed"), {"rows": ("data",), "embed": "fsdp"}) == P(("data",), "fsdp")


def test_there_is_no_catch_all():
    with pytest.raises(KeyError, match="embedding"):
        rules.spec(("vocab", "embedding"), rules.STORED)
    with pytest.raises(KeyError):
        rules.specs({"w": ("embed", "extra")}, rules.STORED)


def test_computing_gathers_fsdp_and_nothing_else():
    assert {axis for axis in rules.STORED if rules.STORED[axis] != rules.COMPUTED[axis]} == {"embed"}
    assert "fsdp" not in rules.COMPUTED.values()
    assert rules.BATCH == ("data", "fsdp")


# --- the model's table ----------------------------------------------------------------------------------------------


def test_the_layout_of_every_parameter():
    biased = LlamaConfig(8, 8, 2, 4, 2, 2, 8, 8, qkv_bias=True, o_bias=True, mlp_bias=True)
    got = {path: spec for path, (_, spec) in leaves(biased).items()}
    a, m = "layers/attention/", "layers/mlp/"
    assert got == {
        "embed": P("tensor", "fsdp"), "head": P("fsdp", "tensor"), "final_norm/scale": P(None),
        "layers/attention_norm/scale": P(None, None), "layers/mlp_norm/scale": P(None, None),
        a + "q": P(None, "fsdp", "tensor", None), a + "k": P(None, "fsdp", "tensor", None),
        a + "v": P(None, "fsdp", "tensor", None), a + "o": P(None, "tensor", None, "fsdp"),
        a + "q_bias": P(None, "tensor", None), a + "k_bias": P(None, "tensor", None),
        a + "v_bias": P(None, "tensor", None), a + "o_bias": P(None, None),
        m + "gate": P(None, "fsdp", "tensor"), m + "up": P(None, "fsdp", "tensor"),
        m + "down": P(None, "tensor", "fsdp"), m + "gate_bias": P(None, "tensor"), m + "up_bias": P(None, "tensor"),
        m + "down_bias": P(None, None),
    }  # fmt: skip
    assert jax.tree.leaves(rules.specs(llama.logical_axes(biased), rules.STORED), is_leaf=lambda x: isinstance(x, P)) == list(got.values())


@pytest.mark.parametrize("config", [LLAMA2_70B, SMOL_135M], ids=["70B", "135M"])
def test_nearly_all_bytes_are_sharded(config):
    sharded = {path for path, (_, spec) in leaves(config).items() if {"fsdp", "tensor"} <= set(spec)}
    size = {path: math.prod(shape) for path, (shape, _) in leaves(config).items()}
    assert sum(size[path] for path in sharded) >= 0.98 * sum(size.values())
    assert {path for path in size if path not in sharded} == {path for path in size if path.endswith("scale")}


def test_the_printed_table_counts_bytes():
    mesh = abstract_mesh(2, 4, 8)
    rows = rules.table(llama.logical_axes(LLAMA2_70B), llama.abstract(LLAMA2_70B, "bfloat16"), mesh)
    by_name = {row[0]: row for row in rows}
    assert by_name["layers/attention/q"][1] == "80x8192x64x128"
    assert by_name["layers/attention/q"][3] == 80 * (8192 // 4) * (64 // 8) * 128 * 2
    assert by_name["final_norm/scale"][3] == 8192 * 2
    whole = LLAMA2_70B.parameter_count() * 2
    assert whole / 32 <= sum(row[3] for row in rows) <= whole / 32 * 1.01


# --- the mesh -------------------------------------------------------------------------------------------------------


def test_what_does_not_divide_is_listed_at_once():
    check = lambda config, mesh: rules.check_divides(llama.logical_axes(config), llama.abstract(config), mesh)  # noqa: E731
    check(LLAMA2_70B, abstract_mesh(3, 64, 8))  # `data` divides rows, not parameters
    check(SMOL_135M, abstract_mesh(8, 64, 3))
    with pytest.raises(UserError) as caught:
        check(SMOL_135M, abstract_mesh(1, 5, 7))
    lines = caught.value.args
    assert all(line.startswith("--config.mesh: ") for line in lines)
    wrong = {"vocab": 49152, "embed": 576, "q_heads": 9, "kv_heads": 3, "ffn": 1536}
    assert len(lines) == len(wrong)
    for axis, size in wrong.items():
        name = "fsdp=5" if axis == "embed" else "tensor=7"
        assert any(f"{axis} has {size}" in line and name in line for line in lines)


def test_make_mesh_fills_in_the_rest():
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = make_mesh(-1, 1, 1)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1), (0, 1, 1), (-1, 0, 1)])
def test_make_mesh_refuses(sizes):
    with pytest.raises(UserError, match=r"mesh .*8"):
        make_mesh(*sizes)


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_shardings_and_place(mesh, even, random_params):
    tree = rules.shardings(llama.logical_axes(even), mesh)
    assert tree["embed"] == NamedSharding(mesh, P("tensor", "fsdp"))
    params = random_params(even, mesh)
    assert params["layers"]["mlp"]["up"].addressable_shards[0].data.shape == (2, 8, 12)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = place(rows, mesh)
    assert rows_multiple(mesh) == 4
    assert jax.typeof(placed).sharding.spec == P(("data", "fsdp"), None)
    np.testing.assert_array_equal(placed, rows)
