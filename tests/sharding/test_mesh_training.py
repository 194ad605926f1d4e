"""One update on eight devices is the update on one, and nothing loses its axes on the way."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.sharding import rules
from selfreward_jax.training import step, trainer
from selfreward_jax.training.optimizer import Optimizer

SPEC = Optimizer(lr=1e-3, lr_end=1e-4, steps=10, weight_decay=0.1, clip=0.5)
OBJECTIVE = partial(step.dpo_objective, beta=0.1)
SHAPES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (3, 1, 1)]  # three pairs: in a row; and in three of eight, four and three


@pytest.fixture(scope="module")
def updates(mesh_of, even, random_params):
    """{mesh shape: (gradient sum, loss and weight, metrics, optimizer state, parameters, norm)} of one DPO update."""
    rng = np.random.default_rng(0)

    def row():
        length = int(rng.integers(6, 17))
        return Row(tuple(map(int, rng.integers(0, even.vocab_size, size=length))), int(rng.integers(1, 5)))

    pairs = [trainer.PairRow(row(), row(), *map(float, rng.normal(-40, 2, 2))) for _ in range(3)]
    result = {}
    for shape in SHAPES:
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            params = random_params(even, mesh)
            packed = packing.Shape(96, shape[0] * shape[1], 8, True)
            plan = trainer.Plan(SPEC, 1, 4, packed, 0, 0.0, 4, 0, 1)  # three pairs and one that only fills
            part = packing.Microbatch(96, [[0, 1, 2]] if packed.rows == 1 else [[0], [1], [2]], 0, 0)
            batch = trainer.collate_pairs(pairs, part, plan, mesh)
            total = step.no_gradient(params)
            state = step.State(params, *step.first_state(SPEC, params))
            total, metrics = step.add_gradient(
                even, llama.Compute(), OBJECTIVE, plan.chunk, 0.0, params, total, batch, jax.random.key(0)
            )
            kept = jax.tree.map(lambda a: jax.device_put(np.array(a), a.sharding), total)
            state, zero, norm, _ = step.apply_gradient(SPEC, state, total, jax.random.key(1))
            result[shape] = {
                "gradient": kept, "metrics": metrics, "state": state.moments, "params": state.params, "zero": zero,
                "norm": norm,
            }  # fmt: skip
    return result


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_numbers_are_the_same(shape, updates):
    one, other = jax.device_get((updates[1, 1, 1], updates[shape]))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for name, (value, weight) in one["metrics"].items():
        assert other["metrics"][name][1] == weight == 3.0
        close(other["metrics"][name][0] / 3, value / 3, err_msg=name)
    jax.tree.map(close, other["gradient"], one["gradient"])
    jax.tree.map(close, other["state"], one["state"])
    jax.tree.map(close, other["params"], one["params"])
    close(other["norm"], one["norm"])
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(one["gradient"][0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_moments_keep_their_axes(shape, updates, mesh_of, even):
    """In Auto mode they were seen to lose `fsdp`: every device then holds the whole optimizer."""
    got = updates[shape]
    adam = [part for part in jax.tree.leaves(got["state"], is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    assert len(adam) == 1
    trees = {
        "gradient": got["gradient"][0], "zeroed gradient": got["zero"][0], "parameters": got["params"],
        "first moment": adam[0].mu, "second moment": adam[0].nu,
    }  # fmt: skip
    specs = jax.tree.leaves(rules.specs(llama.logical_axes(even), rules.STORED), is_leaf=lambda x: isinstance(x, P))
    for name, tree in trees.items():
        for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True):
            assert jax.typeof(leaf).sharding.spec == spec, name
            shard = NamedSharding(mesh_of(shape), spec).shard_shape(leaf.shape)
            assert {piece.data.shape for piece in leaf.addressable_shards} == {shard}, name
    assert not any(leaf.any() for leaf in jax.tree.leaves(got["zero"]))
    if shape == (2, 2, 2):
        assert got["params"]["embed"].addressable_shards[0].data.size * 4 == got["params"]["embed"].size
