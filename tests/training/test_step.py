"""One update: accumulation is exact, AdamW is the formula, buffers are given up."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.sharding.place import replicate
from selfreward_jax.training import step, trainer
from selfreward_jax.training.logprobs import Batch
from selfreward_jax.training.optimizer import Optimizer

# (length, start) of six rows: the two microbatches of a run have 23 and 3 targets.
SPANS = [(13, 6), (8, 1), (9, 4), (12, 8), (7, 6), (10, 8)]


@pytest.fixture
def rows(small):
    rng = np.random.default_rng(4)
    return [Row(tuple(map(int, rng.integers(0, small.vocab_size, size=n))), start) for n, start in SPANS]


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params), jnp.float32(0)


@pytest.fixture
def add(small, mesh, rows_apart):
    """`add(params, total, rows)`: the step over rows of a sequence each."""

    def go(params, total, rows):
        batch = rows_apart(rows, 4, 16, mesh)
        return step.add_gradient(
            small, llama.Compute(), step.sft_objective, 3, 0.0, params, total, batch, jax.random.key(0)
        )

    return go


def whole_gradient(small, params, rows):
    """Gradient of the mean over all targets of all rows, by a whole softmax."""

    @jax.jit
    def gradient(params, tokens, positions, targets):
        def loss(params):
            hidden = llama.hidden_states(small, llama.Compute(remat="none"), params, tokens, positions)
            logps = jax.nn.log_softmax(hidden @ params["head"])
            picked = jnp.sum(logps[:, :-1] * jax.nn.one_hot(tokens[:, 1:], small.vocab_size), axis=-1)
            return -jnp.sum(picked * targets[:, 1:]) / jnp.sum(targets)

        return jax.value_and_grad(loss)(params)

    tokens = np.zeros((len(rows), 16), np.int32)
    targets = np.zeros((len(rows), 16), np.float32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        targets[index, row.start : len(row.tokens)] = row.weight
    return gradient(params, tokens, np.arange(16, dtype=np.int32)[None].repeat(len(rows), 0), targets)


def test_accumulation_is_one_big_batch(rows, small, mesh, random_params, add):
    params = random_params(small, mesh)
    total, first = add(params, zeros(params), rows[:4])
    alone = [jax.tree.map(lambda g: np.array(g / total[1]), total[0])]
    total, second = add(params, total, rows[4:])  # two rows, and two that fill
    assert float(first["loss"][1]) == 23
    assert float(second["loss"][1]) == 3
    assert float(total[1]) == 26
    loss, want = whole_gradient(small, params, rows)
    assert float(first["loss"][0] + second["loss"][0]) / 26 == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g / 26, w, rtol=1e-4, atol=1e-5), total[0], want)
    # A mean of the two means is something else.
    other, _ = add(params, zeros(params), rows[4:])
    alone.append(jax.tree.map(lambda g: np.array(g / other[1]), other[0]))
    difference = jax.tree.map(lambda a, b, w: np.abs((a + b) / 2 - w).max(), *alone, want)
    assert max(jax.tree.leaves(difference)) > 0.01


def test_a_mixing_weight_weighs_an_examples_targets(rows, small, mesh, random_params, add):
    params = random_params(small, mesh)
    mixed = [dataclasses.replace(row, weight=2.5 if index % 2 else 1.0) for index, row in enumerate(rows)]
    total, first = add(params, zeros(params), mixed[:4])
    total, second = add(params, total, mixed[4:])
    weight = sum((len(row.tokens) - row.start) * row.weight for row in mixed)
    assert float(total[1]) == weight
    loss, want = whole_gradient(small, params, mixed)
    assert float(first["loss"][0] + second["loss"][0]) / weight == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g / weight, w, rtol=1e-4, atol=1e-5), total[0], want)


def test_the_sum_is_donated_and_the_parameters_are_not(rows, small, mesh, random_params, add):
    params = random_params(small, mesh)
    total = zeros(params)
    add(params, total, rows[:4])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(total[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# --- AdamW ----------------------------------------------------------------------------------------------------------

SPEC = Optimizer(
    lr=0.05, lr_end=0.01, steps=6, warmup=2, b1=0.85, b2=0.92, eps=1e-4, weight_decay=0.3, clip=2.0
)  # fmt: skip


def adamw(spec, params, gradients):
    """Loshchilov and Hutter 2019, algorithm 2, with clipping by the global norm, in float64."""
    mean = {name: np.zeros_like(value) for name, value in params.items()}
    square = {name: np.zeros_like(value) for name, value in params.items()}
    for update, gradient in enumerate(gradients):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, spec.clip / norm)
        if update < spec.warmup:
            lr = spec.lr * update / spec.warmup
        else:
            turn = math.pi * (update - spec.warmup) / (spec.steps - 1 - spec.warmup)
            lr = spec.lr_end + (spec.lr - spec.lr_end) * (1 + math.cos(turn)) / 2
        for name, raw in gradient.items():
            g = raw * scale
            mean[name] = spec.b1 * mean[name] + (1 - spec.b1) * g
            square[name] = spec.b2 * square[name] + (1 - spec.b2) * g**2
            m = mean[name] / (1 - spec.b1 ** (update + 1))
            v = square[name] / (1 - spec.b2 ** (update + 1))
            params[name] = params[name] - lr * (m / (np.sqrt(v) + spec.eps) + spec.weight_decay * params[name])
        yield {name: value.copy() for name, value in params.items()}, norm


def test_apply_gradient_is_adamw():
    rng = np.random.default_rng(0)
    draw = lambda scale: {"a": rng.normal(0, scale, (3, 4)), "b": rng.normal(0, scale, (5,))}  # noqa: E731
    start = draw(1.0)
    gradients = [draw(scale) for scale in (0.1, 3.0, 0.3, 30.0, 1.0, 0.01)]  # clipped at some updates, not at others
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    params = single(start)
    state = step.State(params, *step.first_state(SPEC, params))
    norms = []
    for weight, gradient, (want, norm) in zip(
        (1, 7, 3, 1, 2, 5), gradients, adamw(SPEC, dict(start), gradients), strict=True
    ):
        total = (single(jax.tree.map(lambda g: g * weight, gradient)), jnp.float32(weight))  # noqa: B023
        before = state.params
        state, zero, got_norm, bad = step.apply_gradient(SPEC, state, total, jax.random.key(0))
        assert not bad
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), state.params, want)
        assert float(got_norm) == pytest.approx(norm, rel=1e-5)  # of the mean, before clipping
        assert not any(leaf.any() for leaf in jax.tree.leaves(zero))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before, total[0])))
        norms.append(norm)
    assert min(norms) < SPEC.clip < max(norms)


# --- the objectives -------------------------------------------------------------------------------------------------


def pair_batch(logps, reference, pair_weights):
    """A batch whose log-probs are given: rows of three targets, the last of each rejected row is padding."""
    weights = np.ones((len(logps), 3), np.float32)
    weights[1::2, 2] = 0
    empty = jnp.zeros(weights.shape, jnp.int32)
    sequences = jnp.broadcast_to(jnp.arange(len(logps))[:, None], weights.shape)
    rows = Batch(empty, empty, empty, empty, empty, jnp.asarray(weights), sequences)
    return step.PairBatch(rows, jnp.asarray(reference, jnp.float32), jnp.asarray(pair_weights, jnp.float32))


def test_dpo_objective_pairs_neighbours_and_skips_filler(mesh):
    rng = np.random.default_rng(3)
    logps = rng.uniform(-4, 0, (8, 3)).astype(np.float32)
    logps[1::2, 2] = 0
    reference = rng.uniform(-9, 0, 8).astype(np.float32)
    weights = [1, 1, 1, 0]
    batch = pair_batch(logps, reference, weights)
    total, weight, metrics = step.dpo_objective(batch, lambda rows: jnp.asarray(logps), beta=0.5)
    gain = 0.5 * (logps.astype(np.float64).sum(1) - reference)
    margins = (gain[0::2] - gain[1::2])[:3]
    assert float(weight) == 3
    assert float(total) == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-5)
    want = {
        "loss": float(total), "reward_chosen": gain[0:6:2].sum(), "reward_rejected": gain[1:6:2].sum(),
        "margin": margins.sum(), "kl": -gain[:6].sum() / 2 / 0.5, "accuracy": (margins > 0).sum(), "logp_chosen": logps[0:6:2].sum(),
        "logp_rejected": logps[1:6:2].sum(), "length_chosen": 9, "length_rejected": 6,
    }  # fmt: skip
    assert set(metrics) == set(want)
    assert 0 < want["accuracy"] < 3
    for name, value in want.items():
        assert (float(metrics[name][0]), float(metrics[name][1])) == (pytest.approx(value, rel=1e-5), 3), name


def test_dpo_starts_at_ln_2(rows, small, mesh, random_params, rows_apart):
    """The reference's pass and the policy's own log-probs are one function: no reward before the first update."""
    params = random_params(small, mesh)
    plan = trainer.Plan(SPEC, 1, 2, packing.Shape(48, 1, 1, True), 0, 0.0, 3, 0, 1)
    logps = lambda batch: step.logprob_pass(small, llama.Compute(), 3, params, batch)  # noqa: E731
    sums = np.asarray(logps(rows_apart(rows[:4], 4, 16, mesh)).sum(-1))
    pairs = [trainer.PairRow(rows[i], rows[i + 1], float(sums[i]), float(sums[i + 1])) for i in (0, 2)]
    (part,) = packing.microbatches([pair.rows for pair in pairs], plan.shape)
    batch = trainer.collate_pairs(pairs, part, plan, mesh)
    total, weight, metrics = step.dpo_objective(batch, logps, beta=0.1)
    assert float(total / weight) == pytest.approx(math.log(2), rel=1e-6)
    assert abs(float(metrics["margin"][0])) < 1e-6
    shifted = batch._replace(reference=replicate(np.roll(np.asarray(batch.reference), 1), mesh))
    assert abs(float(step.dpo_objective(shifted, logps, beta=0.1)[0] / weight) - math.log(2)) > 1e-2
