"""Token choice against a float64 nucleus by a whole sort."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.place import place

DRAWS = 100_000
VOCABULARY = 50


@cache
def chooser(sampling):
    return jax.jit(partial(choose, sampling=sampling))


def draw(logits, sampling, requests, position=0, seed=0, phase=0):
    """Tokens, log-probs and fallback flags of rows of logits, or of one row for all requests."""
    requests = jnp.asarray(requests, jnp.int32)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (len(requests), np.shape(logits)[-1]))
    out = chooser(sampling)(jnp.asarray(rows), request_keys(seed, phase, requests), jnp.asarray(position, jnp.int32))
    return tuple(np.asarray(x) for x in out)


def nucleus(logits, temperature, top_p):
    """Probabilities [V]: the smallest set of most probable tokens that reaches top_p, after the temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    mass = np.exp(scaled - scaled.max())
    mass /= mass.sum()
    order = np.argsort(-mass, kind="stable")
    count = int(np.searchsorted(np.cumsum(mass[order]), top_p * (1 - 1e-12)) + 1)
    kept = np.zeros_like(mass)
    kept[order[:count]] = mass[order[:count]]
    return kept / kept.sum()


def assert_distribution(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    if kept.sum() == 1:
        return
    p = stats.chisquare(counts[kept], probabilities[kept] * len(tokens)).pvalue
    assert p > 1e-4, p


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(7).normal(0, 1.5, VOCABULARY)


# --- the distribution -----------------------------------------------------------------------------------------------


# The window of 2 widens to 32 and that of 5 to all 50.
@pytest.mark.parametrize(("window", "falls_back"), [(VOCABULARY, False), (30, False), (2, True), (5, True)])
def test_the_distribution_is_the_nucleus(window, falls_back, logits, mesh):
    sampling = Sampling(temperature=0.7, top_p=0.9, window=window)
    want = nucleus(logits, 0.7, 0.9)
    assert 5 < (want > 0).sum() <= 30
    tokens, _, fell = draw(logits, sampling, np.arange(DRAWS))
    assert (fell == falls_back).all()
    assert_distribution(tokens, want)
    wrong = nucleus(logits, 0.8, 0.9)  # the test would see this much
    with pytest.raises(AssertionError):
        assert_distribution(tokens, wrong)


def test_positions_are_draws_too(logits, mesh):
    """One request over many positions: one random key for every step would give one token."""
    sampling = Sampling(temperature=1.0, top_p=0.95, window=VOCABULARY)
    keys = request_keys(0, 0, jnp.arange(100, dtype=jnp.int32))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (100, VOCABULARY))
    tokens = jax.jit(jax.vmap(lambda at: choose(rows, keys, at, sampling)[0]))(jnp.arange(1000))
    assert_distribution(np.asarray(tokens).ravel(), nucleus(logits, 1.0, 0.95))
    pairs = np.asarray(tokens)
    same = (pairs[1:] == pairs[:-1]).mean()  # neighbours agree as often as independent draws do
    assert same == pytest.approx((nucleus(logits, 1.0, 0.95) ** 2).sum(), abs=0.01)


def test_temperature_comes_before_the_nucleus(mesh):
    """At temperature 1 the nucleus of 0.6 holds two tokens, at 0.25 one; and at 4 it holds three."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    for temperature, count in ((1.0, 2), (0.25, 1), (4.0, 3)):
        want = nucleus(np.log(probabilities), temperature, 0.6)
        assert (want > 0).sum() == count
        tokens = draw(np.log(probabilities), Sampling(temperature, 0.6, window=4), np.arange(20_000))[0]
        assert set(tokens) == set(range(count))
        assert_distribution(tokens, want)


# --- the support ----------------------------------------------------------------------------------------------------

wide_logits = arrays(np.float32, (20,), elements=st.floats(-60, 60, width=32, allow_subnormal=False))


@settings(max_examples=60)
@given(wide_logits, st.sampled_from([0.3, 0.7, 1.5]), st.sampled_from([0.05, 0.9, 1.0]), st.integers(0, 1000))
def test_never_outside_the_nucleus(mesh_of, logits, temperature, top_p, first):
    """Any logits, ties too. The mass that float32 rounds is the only freedom: the edge may move by 1e-5."""
    allowed = nucleus(logits, temperature, min(1.0, top_p + 1e-5)) > 0
    with jax.set_mesh(mesh_of((1, 1, 1))):
        tokens, logps, _ = draw(logits, Sampling(temperature, top_p, window=4), np.arange(first, first + 64))
    edge = np.asarray(logits)[allowed].min()
    assert (np.asarray(logits)[tokens] >= edge).all()  # of equal logits at the edge, any
    wide = logits.astype(np.float64)
    want = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    np.testing.assert_allclose(logps, want[tokens], rtol=1e-5, atol=2e-5)  # at temperature 1, whatever was used


@settings(max_examples=40)
@given(wide_logits, st.integers(0, 1000))
def test_every_window_chooses_the_same(mesh_of, logits, first):
    """4 of 20 widens to all, 1 of 20 to 16 and then to all."""
    with jax.set_mesh(mesh_of((1, 1, 1))):
        by_size = {
            size: draw(logits, Sampling(0.7, 0.9, window=size), np.arange(first, first + 64)) for size in (1, 4, 20)
        }
    whole = by_size[20]
    assert not whole[2].any()
    for size in (1, 4):
        np.testing.assert_array_equal(by_size[size][0], whole[0])
        np.testing.assert_allclose(by_size[size][1], whole[1], rtol=1e-6, atol=1e-6)
        mass = np.sort(nucleus(logits, 0.7, 1.0))[-size:].sum()
        if abs(mass - 0.9) > 1e-4:
            assert (by_size[size][2] == (mass < 0.9)).all()


def test_one_flat_row_sends_its_batch_to_the_sort(mesh):
    peaked, flat = np.full(VOCABULARY, -9.0), np.zeros(VOCABULARY)
    peaked[3] = 9
    tokens, _, fell = draw(np.stack([peaked] * 7 + [flat]), Sampling(0.7, 0.9, window=5), np.arange(8))
    assert fell.all()
    assert (tokens[:7] == 3).all()
    alone = draw(flat, Sampling(0.7, 0.9, window=5), [7])
    assert alone[0][0] == tokens[7]  # and chooses for each row what it would alone


def test_padding_rows_of_the_head_are_never_chosen(mesh):
    logits = np.zeros(VOCABULARY)
    logits[40:] = -np.inf
    for window in (5, VOCABULARY):
        tokens, logps, _ = draw(logits, Sampling(1.5, 1.0, window=window), np.arange(5000))
        assert tokens.max() == 39
        np.testing.assert_allclose(logps, -np.log(40), rtol=1e-5)


def test_greedy(mesh, logits):
    rows = np.random.default_rng(1).permutation(np.tile(logits, 8)).reshape(8, -1)
    greedy = Sampling(temperature=0.0)
    tokens, logps, fell = draw(rows, greedy, np.arange(8))
    np.testing.assert_array_equal(tokens, rows.argmax(-1))
    np.testing.assert_allclose(logps, rows.max(-1) - np.log(np.exp(rows).sum(-1)), rtol=1e-5)
    assert not fell.any()
    again = draw(rows, greedy, np.arange(8, 16), position=3, seed=4)
    np.testing.assert_array_equal(again[0], tokens)  # nothing random in it


# --- the keys -------------------------------------------------------------------------------------------------------


def test_every_part_of_a_key_counts(mesh):
    """Over a flat vocabulary of 4096 two independent draws agree once in 4096 times."""
    flat = np.zeros(4096)
    sampling = Sampling(1.0, 1.0, window=4096)
    requests = np.arange(64)
    base = draw(flat, sampling, requests)[0]
    assert len(set(base)) > 58
    for change in ({"position": 1}, {"seed": 1}, {"phase": 1}, {"requests": requests + 64}):
        other = draw(flat, sampling, **{"requests": requests, **change})[0]
        assert (other == base).sum() <= 2, change
        assert (np.roll(other, 1) == base).sum() <= 2, change  # nor is it the same stream, shifted
    np.testing.assert_array_equal(draw(flat, sampling, requests)[0], base)
    swapped = draw(flat, sampling, requests, seed=1)[0], draw(flat, sampling, requests, phase=1)[0]
    assert (swapped[0] == swapped[1]).sum() <= 2  # (seed 1, phase 0) is not (seed 0, phase 1)


def test_the_place_in_the_batch_does_not_count(logits, mesh):
    sampling = Sampling(1.0, 0.99, window=VOCABULARY)
    requests = np.arange(100, 164)
    base = draw(logits, sampling, requests)[0]
    shuffled = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(draw(logits, sampling, requests[shuffled])[0], base[shuffled])
    np.testing.assert_array_equal(draw(logits, sampling, requests[5:9])[0], base[5:9])


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_shards_choose_what_one_device_does(mesh, mesh_of, logits):
    sampling = Sampling(0.7, 0.9, window=5)
    rows = np.random.default_rng(2).normal(0, [[9.0]] * 4 + [[1.0]] * 4, (8, VOCABULARY)).astype(np.float32)
    requests = np.arange(8, dtype=np.int32)
    keys = request_keys(3, 1, place(requests, mesh))
    tokens, _, fell = chooser(sampling)(place(rows, mesh), keys, jnp.asarray(2))
    with jax.set_mesh(mesh_of((1, 1, 1))):
        alone = draw(rows, dataclasses.replace(sampling, window=VOCABULARY), requests, position=2, seed=3, phase=1)
    np.testing.assert_array_equal(tokens, alone[0])
    assert fell.any()
    assert not fell.all()
