"""Two layouts of the same parameters: they move between meshes on the devices, and lie as the tables say."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.sharding import rules
from selfreward_jax.sharding.mesh import make_mesh, regrouped
from selfreward_jax.sharding.place import fetch, move, place
from selfreward_jax.training.optimizer import Optimizer, make

TRAINING, SAMPLING = (1, 4, 2), (2, 2, 2)


def layout(config, mesh, table):
    return rules.shardings(llama.logical_axes(config), mesh, table)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [SAMPLING, (8, 1, 1), (4, 1, 2), (2, 4, 1)])
def test_parameters_move_to_the_generation_layout_without_the_host(mesh_of, even, random_params, sizes, dtype):
    mesh = mesh_of(TRAINING)
    grouped = regrouped(mesh, sizes)
    with jax.set_mesh(mesh):
        params = random_params(even, mesh)
        before = jax.tree.map(lambda a: np.array(a).astype(dtype), params)
        leaves = jax.tree.leaves(params)
        target = layout(even, grouped, rules.GENERATION)
        with jax.transfer_guard("disallow"):
            moved = move(params, target, dtype)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert jax.tree.map(lambda a: a.sharding, moved) == target
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, moved), before)
    # 8x1x1: copies; 2x4x1: kv heads are whole, a seventh of this small model; else all but the norms' scales
    share = {(8, 1, 1): 0.0, (2, 4, 1): 1 - (768 + 80) / 5968}.get(sizes, 1 - 80 / 5968)
    got = rules.check_covered(llama.logical_axes(even), moved, grouped, rules.GENERATION)
    assert got == pytest.approx(share, abs=1e-9)
    with jax.set_mesh(mesh):  # and back
        back = move(moved, layout(even, mesh, rules.STORED), "float32")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, back), jax.tree.map(np.float32, before))


def test_where_nothing_changes_nothing_moves(mesh_of, even, random_params):
    mesh = mesh_of((1, 1, 1))
    with jax.set_mesh(mesh):
        params = random_params(even, mesh)
        moved = move(params, layout(even, mesh, rules.STORED), "float32")
    assert moved["embed"] is params["embed"] and not moved["embed"].is_deleted()


def test_heads_are_cut_over_both_axes_and_kv_heads_over_one():
    axes = rules.spec(("layers", "embed", "q_heads", "head_dim"), rules.GENERATION)
    assert axes == P(None, None, ("tensor", "fsdp"), None)
    assert rules.spec(("layers", "embed", "kv_heads", "head_dim"), rules.GENERATION) == P(None, None, "tensor", None)
    assert set(rules.GENERATION) == set(rules.STORED) == set(rules.COMPUTED)  # no axis is forgotten in one of them


def test_bytes_that_lie_elsewhere_are_refused_by_name(mesh_of, even, random_params):
    mesh = mesh_of(TRAINING)
    with jax.set_mesh(mesh):
        params = random_params(even, mesh)
        params["layers"]["mlp"]["gate"] = jax.device_put(params["layers"]["mlp"]["gate"], NamedSharding(mesh, P()))
    with pytest.raises(UserError) as caught:
        rules.check_covered(llama.logical_axes(even), params, mesh)
    assert "of the parameter bytes are cut over the mesh as meant" in caught.value.args[0]
    assert any(
        line.startswith("layers/mlp/gate [2, 16, 24] lies as") and "meant is" in line for line in caught.value.args[1:]
    )


def test_axes_of_one_device_cut_nothing(mesh_of, even, random_params):
    for sizes, share in (((8, 1, 1), 0.0), ((1, 1, 1), 0.0), ((4, 2, 1), 1 - 80 / 5968), ((4, 1, 2), 1 - 80 / 5968)):
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh):
            params = random_params(even, mesh)
        assert rules.check_covered(llama.logical_axes(even), params, mesh) == pytest.approx(share, abs=1e-9)


def test_moments_that_lie_otherwise_are_refused_by_name(mesh_of, even, random_params):
    mesh = mesh_of(TRAINING)
    with jax.set_mesh(mesh):
        params = random_params(even, mesh)
        state = jax.jit(make(Optimizer(1e-3, 1e-4, 5)).init)(params)
        rules.check_alike(params, state)
        whole = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P())), params)
        lost = jax.jit(make(Optimizer(1e-3, 1e-4, 5)).init)(whole)  # what Auto mode was seen to do
    with pytest.raises(UserError) as caught:
        rules.check_alike(params, lost)
    first, *lines = caught.value.args
    assert first == "--config.mesh: the optimizer's arrays lie otherwise than their parameters"
    assert len(lines) == 2 * 9 and sum(line.startswith("layers/attention/q: ") for line in lines) == 2


def test_results_come_back_whole(mesh_of):
    mesh = mesh_of((2, 2, 2))
    rows = np.arange(32, dtype=np.int32).reshape(8, 4)
    for table in (rules.STORED, rules.GENERATION):
        placed = place(rows, mesh, table)
        assert not placed.sharding.is_fully_replicated
        got = fetch({"rows": placed}, mesh)["rows"]
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, rows)


def test_regrouping_keeps_the_order_of_the_devices():
    mesh = make_mesh(1, 4, 2)
    grouped = regrouped(mesh, (2, 1, 4))
    assert list(grouped.devices.flat) == list(mesh.devices.flat)
    assert regrouped(mesh, (1, 4, 2)) is mesh
