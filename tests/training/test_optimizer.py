"""AdamW and its schedule against the formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.training.optimizer import Optimizer, init, schedule, stochastic_round
from selfreward_jax.training.optimizer import update as updated


def rates(spec, count=None):
    every = np.asarray(schedule(spec)(jnp.arange(700)), np.float64)  # always one shape: compiled once
    return every[: count or spec.steps]


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(0, 50), st.floats(1e-7, 1e-2), st.floats(0.0, 1.0))
def test_the_schedule_is_the_formula(steps, warmup, lr, share):
    warmup = min(warmup, steps - 1)
    spec = Optimizer(lr=lr, lr_end=lr * share, steps=steps, warmup=warmup)
    got = rates(spec)
    last = max(1, steps - 1 - warmup)
    for update in range(steps):
        if update < warmup:
            want = lr * update / warmup
        else:
            turn = math.cos(math.pi * (update - warmup) / last)
            want = spec.lr_end + (lr - spec.lr_end) * (1 + turn) / 2
        assert got[update] == pytest.approx(want, rel=2e-5, abs=1e-6 * lr)


def test_the_papers_schedule():
    """SFT (3.1.3): 5.5e-6 to 1.1e-6, cosine: the first update at the top, the last exactly on the floor."""
    got = rates(Optimizer(lr=5.5e-6, lr_end=1.1e-6, steps=600), 700)
    assert got[0] == pytest.approx(5.5e-6, rel=1e-6)
    assert got[599] == pytest.approx(1.1e-6, rel=1e-6)
    assert got[598] > got[599]
    np.testing.assert_array_equal(got[599:], got[599])  # a longer run stays there
    assert (np.diff(got[:600]) < 0).all()
    assert got[299:301].mean() == pytest.approx(3.3e-6, rel=1e-4)


def test_warmup_starts_at_zero_and_meets_the_cosine():
    got = rates(Optimizer(lr=1.0, lr_end=0.1, steps=20, warmup=4))
    np.testing.assert_allclose(got[:5], [0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)
    assert got[-1] == pytest.approx(0.1, rel=1e-6)


def test_one_update():
    assert rates(Optimizer(lr=1e-3, lr_end=1e-4, steps=1))[0] == pytest.approx(1e-3, rel=1e-6)


BASE = Optimizer(lr=0.1, lr_end=0.01, steps=5, warmup=0, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip=1.0)
CHANGES = {
    "lr": 0.2, "lr_end": 0.05, "steps": 9, "warmup": 2, "b1": 0.7, "b2": 0.8, "eps": 0.1, "weight_decay": 0.2,
    "clip": 0.5, "name": "adafactor", "moments": "bfloat16",
}  # fmt: skip


def three_updates(spec):
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = init(spec, params)
    for scale in (1.0, -3.0, 0.2):
        gradients = {"w": scale * jnp.array([0.3, -0.5, 0.9])}
        params, state = updated(spec, params, state, gradients, jax.random.key(0))
    return np.asarray(params["w"])


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_reaches_the_update(field):
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(Optimizer)} - {"spike"}  # test_trainer.py
    changed = dataclasses.replace(BASE, **{field: CHANGES[field]})
    assert np.abs(three_updates(changed) - three_updates(BASE)).max() > 1e-5


def test_clip_of_zero_is_no_clipping():
    none, wide = (three_updates(dataclasses.replace(BASE, clip=clip)) for clip in (0.0, 1e9))
    np.testing.assert_allclose(none, wide, rtol=1e-6)
    assert np.abs(none - three_updates(BASE)).max() > 1e-4


# --- bfloat16, rounded by chance ------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 9))
def test_rounding_is_to_a_neighbour_and_right_in_the_mean(value, seed):
    count = 4096
    got = np.asarray(stochastic_round(jnp.full((count,), value, jnp.float32), jax.random.key(seed)), np.float64)
    bits = np.float32(value).view(np.uint32)
    below = np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = np.uint32((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    assert set(got) <= {below, above}
    share = (float(np.float32(value)) - below) / (above - below)
    assert abs((got == above).mean() - share) < 5 * math.sqrt(max(share * (1 - share), 1 / count) / count)


def test_rounding_keeps_what_is_exact_or_not_finite():
    exact = jnp.asarray([0.0, -0.0, 1.5, -2.0**-120, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    got = stochastic_round(exact, jax.random.key(0))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), exact)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_thousand_small_updates_move_bfloat16_as_far(moments):
    """lr 1e-6, as the paper's DPO: along the float32 run's way within 5 %; rounded to the nearest, nothing moves."""
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(0, 0.02, (96, 64)), jnp.bfloat16)
    drift = rng.normal(size=start.shape)
    spec = Optimizer(1e-6, 1e-6, 1000, moments=moments)
    plain = dataclasses.replace(spec, moments="float32")
    step = jax.jit(updated, static_argnums=0)
    ours, wide, nearest = (start, init(spec, start)), (start.astype(jnp.float32),) * 2, (start, None)
    wide = (wide[0], init(plain, wide[0]))
    nearest = (start, init(plain, start.astype(jnp.float32)))
    to_nearest = jax.jit(
        lambda p, s, g, k: [x.astype(jnp.bfloat16) if i == 0 else x for i, x in enumerate(updated(plain, p, s, g, k))]
    )
    for number in range(1000):
        gradient = jnp.asarray(drift + rng.normal(size=start.shape), jnp.float32)
        key = jax.random.key(number)
        ours = step(spec, *ours, gradient, key)
        wide = step(plain, *wide, gradient, key)
        nearest = to_nearest(nearest[0].astype(jnp.float32), nearest[1], gradient, key)
    far, got, none = (
        np.asarray(x, np.float64) - np.asarray(start, np.float64) for x in (wide[0], ours[0], nearest[0])
    )
    assert ours[0].dtype == jnp.bfloat16 and jax.tree.leaves(ours[1])[1].dtype == moments
    assert np.vdot(got, far) / np.vdot(far, far) == pytest.approx(1, abs=0.05)
    assert (none == 0).mean() > 0.9


def test_the_same_key_rounds_the_same_way_and_leaves_differ():
    spec = Optimizer(1e-6, 1e-6, 10, moments="bfloat16")
    params = {"a": jnp.full((64,), 0.02, jnp.bfloat16), "b": jnp.full((64,), 0.02, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    run = lambda key: jax.device_get(updated(spec, params, init(spec, params), gradients, jax.random.key(key)))  # noqa: E731
    one, same, other = run(0), run(0), run(1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    nu = lambda tree: jax.tree.leaves(tree[1])[-2:]  # noqa: E731
    assert (nu(one)[0] != nu(one)[1]).any() and (nu(one)[0] != nu(other)[0]).any()


# --- Adafactor ------------------------------------------------------------------------------------------------------


def test_adafactor_is_the_formula():
    """Shazeer and Stern 2018, algorithm 4, without relative steps: factored second moments, updates clipped to RMS 1."""
    rng = np.random.default_rng(2)
    spec = Optimizer(1e-2, 1e-2, 9, weight_decay=0.1, clip=0.0, name="adafactor")
    start = rng.normal(size=(130, 140))
    params = jnp.asarray(start, jnp.float32)
    state = init(spec, params)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 140  # rows and columns, no matrix
    want, row, column = start.copy(), np.zeros(130), np.zeros(140)
    for number in range(4):
        gradient = rng.normal(size=start.shape) * (1 + number)
        params, state = updated(spec, params, state, jnp.asarray(gradient, jnp.float32), jax.random.key(0))
        decay = 1 - (number + 1) ** -0.8
        square = gradient**2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1)
        column = decay * column + (1 - decay) * square.mean(0)
        step = gradient / np.sqrt(np.outer(row, column) / row.mean())
        step /= max(1.0, np.sqrt((step**2).mean()))
        want -= 1e-2 * (step + 0.1 * want)
        np.testing.assert_allclose(params, want, rtol=1e-4, atol=1e-5)
