"""AdamW and its schedule against the formulas."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.training.optimizer import Optimizer, make, schedule


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
    "clip": 0.5,
}  # fmt: skip


def three_updates(spec):
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    optimizer = make(spec)
    state = optimizer.init(params)
    for scale in (1.0, -3.0, 0.2):
        updates, state = optimizer.update({"w": scale * jnp.array([0.3, -0.5, 0.9])}, state, params)
        params = {"w": params["w"] + updates["w"]}
    return np.asarray(params["w"])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Optimizer)])
def test_every_field_reaches_the_update(field):
    changed = dataclasses.replace(BASE, **{field: CHANGES[field]})
    assert np.abs(three_updates(changed) - three_updates(BASE)).max() > 1e-5


def test_clip_of_zero_is_no_clipping():
    none, wide = (three_updates(dataclasses.replace(BASE, clip=clip)) for clip in (0.0, 1e9))
    np.testing.assert_allclose(none, wide, rtol=1e-6)
    assert np.abs(none - three_updates(BASE)).max() > 1e-4
