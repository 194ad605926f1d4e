"""Token choice against a float64 reference by a whole sort, and the draws against the numbers they come from."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from selfreward_jax.errors import UserError
from selfreward_jax.sampling import tokens as tokens_module
from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.place import place

DRAWS = 100_000
VOCABULARY = 50
WIDE = 200  # enough for a first look by blocks: an eighth of a window of 8 is 1, and there are 6 blocks


@cache
def chooser(sampling):
    return jax.jit(partial(choose, sampling=sampling))


def draw(logits, sampling, requests, position: Any = 0, seed=0, phase=0):
    """Tokens, log-probs and fallback flags of rows of logits, or of one row for all requests."""
    requests = jnp.asarray(requests, jnp.int32)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (len(requests), np.shape(logits)[-1]))
    places = jnp.broadcast_to(jnp.asarray(position, jnp.int32), requests.shape)
    out = chooser(sampling)(jnp.asarray(rows), request_keys(seed, phase, requests), places)
    return tuple(np.asarray(x) for x in out)


def many(logits, sampling, count=DRAWS):
    """Tokens of so many requests for one row of logits, and whether any needed more than the window."""
    parts = [draw(logits, sampling, np.arange(first, first + 10_000)) for first in range(0, count, 10_000)]
    return np.concatenate([part[0] for part in parts]), any(part[2].any() for part in parts)


def reference(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Probabilities [V] in float64: temperature, top-k, nucleus of what is left, min-p; of equal logits the first."""
    wide = np.asarray(logits, np.float64)
    order = np.argsort(-wide, kind="stable")
    mass = np.exp((wide[order] - wide.max()) / temperature)
    if top_k:
        mass[top_k:] = 0
    mass /= mass.sum()
    if top_p < 1:
        mass[int(np.searchsorted(np.cumsum(mass), top_p * (1 - 1e-12))) + 1 :] = 0
    mass[mass < min_p * mass[0]] = 0
    kept = np.zeros_like(mass)
    kept[order] = mass / mass.sum()
    return kept


def nucleus(logits, temperature, top_p):
    return reference(logits, temperature, top_p)


def assert_distribution(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    kept = expected >= 5
    if kept.sum() == 1:
        return
    few = (probabilities > 0) & ~kept  # together: chi-square wants cells that are not nearly empty
    observed, wanted = counts[kept], expected[kept]
    if few.any():
        observed, wanted = np.append(observed, counts[few].sum()), np.append(wanted, expected[few].sum())
    p = stats.chisquare(observed, wanted).pvalue
    assert p > 1e-4, p


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(7).normal(0, 1.5, VOCABULARY)


@pytest.fixture(scope="module")
def wide_logits():
    """A long tail: at temperature 1 the nucleus of 0.9 holds a hundred tokens."""
    return np.random.default_rng(8).normal(0, 1.5, WIDE)


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "falls_back"), [(30, False), (5, True)])
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


# Options, the tokens that they leave of 200, and whether a window of 8 is too narrow for them.
COMBINED = [
    ({"temperature": 1.0, "top_p": 1.0}, 200, False),
    ({"temperature": 1.3, "top_p": 1.0, "min_p": 0.1}, 61, False),
    ({"temperature": 1.0, "top_p": 0.8, "top_k": 8}, 6, False),
    ({"temperature": 1.0, "top_p": 0.8, "top_k": 60}, 29, False),
    ({"temperature": 0.7, "top_p": 0.9, "min_p": 0.3}, 7, False),
    ({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}, 29, True),
    ({"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.15}, 26, False),
]


@pytest.mark.parametrize(("options", "left", "falls_back"), COMBINED, ids=[str(row[0]) for row in COMBINED])
def test_the_distribution_of_all_options_together(options, left, falls_back, wide_logits, mesh):
    want = reference(wide_logits, **options)
    assert (want > 0).sum() == left
    tokens, fell = many(wide_logits, Sampling(window=8, **options))
    assert fell == falls_back
    assert_distribution(tokens, want)


def test_positions_are_draws_too(logits, mesh):
    """One request over many positions: one random key for every step would give one token."""
    sampling = Sampling(temperature=1.0, top_p=0.95, window=VOCABULARY)
    requests, places = np.tile(np.arange(100), 1000), np.repeat(np.arange(1000), 100)
    tokens = draw(logits, sampling, requests, position=places)[0]
    assert_distribution(tokens, nucleus(logits, 1.0, 0.95))
    pairs = tokens.reshape(1000, 100)
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


def test_the_limits_come_in_the_order_of_transformers(mesh):
    """Each set is another if two of its limits change places."""
    cases: list[tuple[list[float], dict[str, Any], int]] = [
        ([0.5, 0.2, 0.2, 0.1], {"top_k": 2, "top_p": 0.6}, 1),  # the nucleus of all would hold two
        ([0.4, 0.25, 0.25, 0.1], {"top_p": 0.7, "min_p": 0.3}, 3),  # of what min-p leaves it would hold two
    ]
    for probabilities, options, left in cases:
        tokens = draw(np.log(probabilities), Sampling(1.0, **options), np.arange(5000))[0]
        assert set(tokens) == set(range(left)), options
        assert_distribution(tokens, reference(np.log(probabilities), **options))


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_keeps_what_transformers_keeps(seed):
    """Its warpers, in the order in which its `generate` puts them."""
    import torch
    from transformers.generation import logits_process

    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, WIDE)
    options = {
        "temperature": float(rng.choice([0.7, 1.0, 2.0])), "top_k": int(rng.choice([5, 40, 200])),
        "top_p": float(rng.choice([0.3, 0.6, 0.9])), "min_p": float(rng.choice([0.01, 0.1, 0.3])),
    }  # fmt: skip
    scores = torch.tensor(logits)[None]
    for name, value in options.items():
        kind = "".join(part.capitalize() for part in name.split("_"))
        scores = getattr(logits_process, f"{kind}LogitsWarper")(value)(None, scores)
    kept = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(kept, reference(logits, **options), atol=1e-12)


# --- the draws, number by number ------------------------------------------------------------------------------------

OPTIONS = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.97, "min_p": 0.02},
]
PEAKS = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 2.0, 6.0]), st.sampled_from([0.0, 0.25, 1.0]))


def peaked(seed, scale, grid, rows=16, vocabulary=WIDE):
    """Rows of logits of any sharpness; on a grid many are equal. Some are -inf."""
    rng = np.random.default_rng(seed)
    made = rng.normal(0, scale, (rows, vocabulary))
    made = np.round(made / grid) * grid + 0.0 if grid else made  # + 0.0: without -0.0, which comes after 0.0
    made[rng.random(made.shape) < rng.choice([0, 0.2])] = -np.inf
    made[:, 0] = np.maximum(made[:, 0], 0)
    return made.astype(np.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=20)
@given(PEAKS)
def test_a_token_is_where_its_number_falls_in_the_sorted_reference(mesh_of, options, peaks):
    """Float64, and the same uniform numbers: only one that falls within 1e-5 of an edge may choose otherwise."""
    rows = peaked(*peaks)
    requests = np.arange(len(rows))
    with jax.set_mesh(mesh_of((1, 1, 1))):
        tokens = draw(rows, Sampling(window=8, **options), requests, position=3)[0]
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(request_keys(0, 0, jnp.asarray(requests)), 3)
        numbers = np.asarray(jax.vmap(jax.random.uniform)(keys), np.float64)
    for row, token, number in zip(rows, tokens, numbers, strict=True):
        order = np.argsort(-row, kind="stable")
        allowed = set()
        for slack in (-1e-5, 0.0, 1e-5):  # of the edge of the nucleus
            about = options | {"top_p": min(options["top_p"] + slack, 1.0)}
            ends = np.cumsum(reference(row, **about)[order])
            allowed |= set(order[np.searchsorted(ends, number + np.array([-1e-5, 0, 1e-5]), side="right")])
        assert token in allowed


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0.3, "top_p": 0.999, "min_p": 1e-4}], ids=str)
@settings(max_examples=15)
@given(PEAKS)
def test_every_window_chooses_the_same(mesh_of, options, peaks):
    """By blocks, then of the whole, then by a sort (8 of 200); of the whole, then by a sort (5); by a sort alone."""
    rows = peaked(*peaks)
    rows[:, 50:60] *= np.where(rows[:, 50:60] == 0, -1, 1)  # -0.0 has the same place in all of them
    with jax.set_mesh(mesh_of((1, 1, 1))):
        by_size = {size: draw(rows, Sampling(window=size, **options), np.arange(16)) for size in (5, 8, WIDE)}
    whole = by_size[WIDE]
    assert not whole[2].any()
    for size in (5, 8):
        np.testing.assert_array_equal(by_size[size][0], whole[0])
        np.testing.assert_allclose(by_size[size][1], whole[1], rtol=1e-6, atol=1e-6)
        if "top_k" in options:
            assert not by_size[size][2].any()  # top-k is a window of its own
            continue
        for row, fell in zip(rows, by_size[size][2], strict=True):
            before = reference(row, options["temperature"])
            mass, least = np.sort(before)[-size:].sum(), np.sort(before)[-size] / before.max()
            min_p = options.get("min_p", 0.0)
            if abs(mass - options["top_p"]) > 1e-4 and abs(least - min_p) > 1e-4 * min_p:
                assert fell == (mass < options["top_p"] and least >= min_p)


@pytest.mark.parametrize("min_p", [0.0, 1e-3])
@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 3.0]))
def test_without_a_nucleus_a_token_is_where_two_numbers_fall(mesh_of, min_p, seed, scale):
    """Of 131,072 tokens: the block of 32 by the first, a token of it by the second, in float64."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, scale, (4, 131_072)).astype(np.float32)
    rows[:, rng.integers(0, 131_072, 1000)] = -np.inf
    with jax.set_mesh(mesh_of((1, 1, 1))):
        tokens = draw(rows, Sampling(1.0, 1.0, min_p=min_p), np.arange(4))[0]
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(request_keys(0, 0, jnp.arange(4)), 0)
        numbers = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), np.float64) + 2**-24
    for row, token, (first, second) in zip(rows, tokens, numbers, strict=True):
        mass = reference(row, min_p=min_p).reshape(-1, 32)
        ends = np.cumsum(mass.sum(-1))
        blocks = {int(np.searchsorted(ends, first + shift, side="right")) for shift in (-1e-6, 0, 1e-6)}
        assert token // 32 in blocks
        inside = np.cumsum(mass[token // 32]) / mass[token // 32].sum()
        assert token % 32 in {
            int(np.searchsorted(inside, second + shift, side="right")) for shift in (-1e-6, 0, 1e-6)
        }


def test_without_top_k_and_top_p_nothing_is_sorted(mesh):
    def program(sampling):
        keys = request_keys(0, 0, jnp.arange(4, dtype=jnp.int32))
        return str(jax.make_jaxpr(partial(choose, sampling=sampling))(jnp.zeros((4, 4096)), keys, jnp.zeros(4, int)))

    for free in (Sampling(top_p=1.0), Sampling(top_p=1.0, min_p=0.1), Sampling(top_p=1.0, top_k=4096)):
        assert not any(name in program(free) for name in (" sort[", " top_k[", " while["))
    assert " sort[" in program(Sampling()) and " top_k[" in program(Sampling())


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 0.99]))
def test_a_place_without_mass_is_never_drawn(seed, empty):
    """Not even by a number next to an edge, where float32's sums of the same parts differ in their last bit."""
    rng = np.random.default_rng(seed)
    mass = (rng.random(2000) * (rng.random(2000) >= empty)).astype(np.float32)
    mass[-500:] = 0
    mass[7] = 1
    edges = (np.cumsum(mass, dtype=np.float64) / mass.sum(dtype=np.float64)).astype(np.float32)
    edges = edges[rng.choice(np.flatnonzero(mass == 0), 100)]
    numbers = np.concatenate(
        [edges, np.nextafter(edges, 0, dtype=np.float32), np.nextafter(edges, 1, dtype=np.float32)]
    )
    numbers = np.clip(np.append(numbers, [0.0, 2**-24]), 0, 1 - 2**-24).astype(np.float32)
    places = np.asarray(invert(np.broadcast_to(mass, (len(numbers), 2000)), numbers))
    assert (mass[places] > 0).all()
    wide = np.cumsum(mass, dtype=np.float64) / mass.sum(dtype=np.float64)
    assert (wide[places] > numbers - 1e-6).all()
    assert (wide[places] - mass[places] / mass.sum(dtype=np.float64) < numbers + 1e-6).all()


invert = jax.jit(tokens_module._invert)


@settings(max_examples=30)
@given(PEAKS, st.sampled_from([1, 7, 60, 200, 1000]))
def test_the_highest_logits_in_order(peaks, width):
    """By blocks (1, 7), of the whole (60) and by a sort; of equal logits the first of the vocabulary comes first."""
    rows = peaked(*peaks, rows=8, vocabulary=1000)
    top, ids = highest(width, rows)
    order = np.argsort(-rows, axis=-1, kind="stable")
    np.testing.assert_array_equal(top, np.take_along_axis(rows, order, -1)[:, :width])
    finite = np.isfinite(rows[np.arange(8), ids])
    np.testing.assert_array_equal(ids[finite], order[np.arange(8), np.arange(8) * width // 8][finite])


@cache
def highest_of(width):
    """The highest logits of 8 rows, and the token of one place of each row, eighth by eighth."""

    @jax.jit
    def ways(rows):
        top, token_at = tokens_module._descending(rows, width)
        return top, token_at(jnp.arange(8) * width // 8)

    return ways


def highest(width, rows):
    return tuple(np.asarray(x) for x in highest_of(width)(rows))


# --- the support ----------------------------------------------------------------------------------------------------

short_logits = arrays(
    np.float32, (20,), elements=st.one_of(st.floats(-60, 60, width=32, allow_subnormal=False), st.just(-np.inf))
)


# Temperature, top-p, top-k and min-p.
LIMITS = [
    (0.3, 0.9, 0, 0.0), (0.7, 0.05, 0, 0.0), (1.5, 1.0, 0, 0.0), (1.5, 1.0, 0, 0.05),
    (0.7, 0.9, 0, 0.05), (0.7, 1.0, 6, 0.0), (1.5, 0.9, 6, 0.05), (1.5, 1.0, 1, 0.0),
]  # fmt: skip


@settings(max_examples=100)
@given(
    short_logits,
    st.sampled_from(LIMITS),
    st.integers(0, 1000),
)
def test_never_outside_what_the_limits_leave(mesh_of, logits, options, first):
    """Any logits, ties and -inf too. The mass that float32 rounds is the only freedom: an edge may move by 1e-5."""
    temperature, top_p, top_k, min_p = options
    logits[3] = 0.0  # one at least is not -inf
    logits += 0.0  # -0.0 is 0.0
    allowed = reference(logits, temperature, min(1.0, top_p + 1e-5), top_k, min_p * (1 - 1e-5)) > 0
    with jax.set_mesh(mesh_of((1, 1, 1))):
        sampling = Sampling(temperature, top_p, window=4, top_k=top_k, min_p=min_p)
        tokens, logps, _ = draw(logits, sampling, np.arange(first, first + 64))
    assert allowed[tokens].all()
    wide = logits.astype(np.float64)
    want = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    np.testing.assert_allclose(logps, want[tokens], rtol=1e-5, atol=2e-5)  # at temperature 1, whatever was used


def test_of_equal_logits_the_first_are_kept(mesh):
    flat = np.zeros(VOCABULARY)
    for options, left in (({"top_k": 3}, 3), ({"top_p": 0.5}, 25), ({"top_k": 10, "top_p": 0.5}, 5)):
        sampling = Sampling(0.7, **{"top_p": 1.0, "window": 5, **options})
        assert set(draw(flat, sampling, np.arange(2000))[0]) == set(range(left))


@pytest.mark.parametrize("others", [1, 20])
def test_a_flat_row_is_sorted_and_its_batch_is_not(others, mesh):
    """One, or more than are drawn again at once; each chooses what it would alone."""
    rows = np.random.default_rng(1).normal(0, 1, (64, WIDE))
    rows[np.arange(64), np.arange(64) * 3] = 30
    flat = np.arange(others) * 3
    rows[flat] = 0
    sampling = Sampling(0.7, 0.9, window=8)
    tokens, _, fell = draw(rows, sampling, np.arange(64))
    assert (np.flatnonzero(fell) == flat).all()
    sharp = np.setdiff1d(np.arange(64), flat)
    np.testing.assert_array_equal(tokens[sharp], sharp * 3)
    for row in flat:
        assert draw(rows[row], sampling, [row])[0][0] == tokens[row]
    assert len(set(tokens[flat])) > 0.8 * others


def test_min_p_makes_a_window_enough_that_top_p_does_not(mesh):
    """Five tokens hold half of the mass, and the others less than a tenth of the first's probability each."""
    probabilities = np.full(VOCABULARY, 0.5 / 45)
    probabilities[:5] = [0.12, 0.11, 0.1, 0.09, 0.08]
    for min_p, falls_back in ((0.05, True), (0.1, False)):
        sampling = Sampling(1.0, 0.9, window=6, min_p=min_p)
        tokens, _, fell = draw(np.log(probabilities), sampling, np.arange(20_000))
        assert (fell == falls_back).all()
        assert_distribution(tokens, reference(np.log(probabilities), 1.0, 0.9, min_p=min_p))


def test_padding_rows_of_the_head_are_never_chosen(mesh):
    logits = np.zeros(VOCABULARY)
    logits[40:] = -np.inf
    logits[:5] = -np.inf
    for sampling in (Sampling(1.5, 1.0), Sampling(1.5, 0.999, window=5), Sampling(1.5, 1.0, top_k=45)):
        tokens, logps, _ = draw(logits, sampling, np.arange(5000))
        assert tokens.min() == 5 and tokens.max() == 39
        np.testing.assert_allclose(logps, -np.log(35), rtol=1e-5)


def test_temperatures_that_float32_does_not_hold(mesh):
    logits = np.array([1.0, 3.0, 2.999, -np.inf])
    for top_p, min_p in ((0.9, 0.0), (1.0, 0.5)):
        assert set(draw(logits, Sampling(1e-300, top_p, min_p=min_p), np.arange(300))[0]) == {1}
        assert set(draw(logits, Sampling(1e300, top_p, min_p=min_p), np.arange(300))[0]) == {0, 1, 2}


def test_greedy(mesh, logits):
    rows = np.random.default_rng(1).permutation(np.tile(logits, 8)).reshape(8, -1)
    rows[:, 30] = rows[:, 20] = rows.max(-1)  # of equal ones the first
    greedy = Sampling(temperature=0.0)
    tokens, logps, fell = draw(rows, greedy, np.arange(8))
    np.testing.assert_array_equal(tokens, rows.argmax(-1))
    np.testing.assert_allclose(logps, rows.max(-1) - np.log(np.exp(rows).sum(-1)), rtol=1e-5)
    assert not fell.any()
    again = draw(rows, greedy, np.arange(8, 16), position=3, seed=4)
    np.testing.assert_array_equal(again[0], tokens)  # nothing random in it
    limited = draw(rows, Sampling(0.0, top_p=0.1, top_k=2, min_p=0.9), np.arange(8))
    np.testing.assert_array_equal(limited[0], tokens)  # and no limit changes it
    many_tokens = np.random.default_rng(2).integers(0, 9, (8, WIDE))
    np.testing.assert_array_equal(draw(many_tokens, greedy, np.arange(8))[0], many_tokens.argmax(-1))


# --- the keys -------------------------------------------------------------------------------------------------------


def test_every_part_of_a_key_counts(mesh):
    """Over a flat vocabulary of 4096 two independent draws agree once in 4096 times."""
    flat = np.zeros(4096)
    for sampling in (Sampling(1.0, 1.0), Sampling(1.0, 0.999, window=4096)):
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


@pytest.mark.parametrize("top_p", [0.99, 1.0])
def test_the_place_in_the_batch_does_not_count(top_p, logits, mesh):
    sampling = Sampling(1.0, top_p, window=VOCABULARY)
    requests, places = np.arange(100, 164), np.arange(64) % 5
    base = draw(logits, sampling, requests, places)[0]
    shuffled = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(draw(logits, sampling, requests[shuffled], places[shuffled])[0], base[shuffled])
    np.testing.assert_array_equal(draw(logits, sampling, requests[5:9], places[5:9])[0], base[5:9])


def test_each_row_has_a_place_of_its_own(logits, mesh):
    """Rows do not step together: each draws what a batch does in which all are at its place."""
    sampling = Sampling(1.0, 0.95, window=VOCABULARY)
    together = {place: draw(logits, sampling, np.arange(12), place)[0] for place in range(4)}
    assert not (together[0] == together[1]).all()
    mixed = draw(logits, sampling, np.arange(12), np.arange(12) % 4)[0]
    np.testing.assert_array_equal(mixed, [together[row % 4][row] for row in range(12)])


def test_the_draws_of_a_seed_stay_what_they_were(logits, mesh):
    """A run that goes on with a later version of this package goes on with the same tokens."""
    tokens = draw(np.arange(VOCABULARY) / 10, Sampling(0.7, 0.9, window=16), np.arange(12), position=2, seed=3)[0]
    assert tokens.tolist() == [47, 49, 45, 42, 45, 41, 45, 44, 49, 38, 47, 44]


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"min_p": 0.1}, {"top_p": 1.0}], ids=str)
@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_shards_choose_what_one_device_does(options, mesh, mesh_of, logits):
    sampling = Sampling(0.7, **{"top_p": 0.9, "window": 5, **options})
    rows = np.random.default_rng(2).normal(0, [[9.0]] * 4 + [[1.0]] * 4, (8, VOCABULARY)).astype(np.float32)
    requests, places = np.arange(8, dtype=np.int32), np.array([2, 2, 0, 1, 5, 2, 7, 1], np.int32)
    keys = request_keys(3, 1, place(requests, mesh))
    tokens, _, fell = chooser(sampling)(place(rows, mesh), keys, place(places, mesh))
    with jax.set_mesh(mesh_of((1, 1, 1))):
        alone = draw(rows, dataclasses.replace(sampling, window=VOCABULARY), requests, places, seed=3, phase=1)
    np.testing.assert_array_equal(tokens, alone[0])
    assert not np.asarray(fell)[:4].any()
    assert np.asarray(fell)[4:].any() == (options.get("top_p") != 1.0 and "top_k" not in options)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"temperature": -0.1}, ["temperature=-0.1: a number that is not negative"]),
        ({"temperature": float("nan")}, ["temperature=nan: a number that is not negative"]),
        ({"temperature": float("inf")}, ["temperature=inf: a number that is not negative"]),
        ({"top_p": 0.0}, ["top_p=0.0: in (0, 1]"]),
        ({"top_p": 1.01}, ["top_p=1.01: in (0, 1]"]),
        ({"top_k": -1}, ["top_k=-1: not negative; 0 is no limit"]),
        ({"min_p": -0.1}, ["min_p=-0.1: in [0, 1); 0 is no limit"]),
        ({"min_p": 1.0}, ["min_p=1.0: in [0, 1); 0 is no limit"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0: at least 1"]),
        ({"window": 0}, ["window=0: at least 1"]),
        (
            {"temperature": -1.0, "top_k": -5, "window": -1},
            [
                "temperature=-1.0: a number that is not negative",
                "top_k=-5: not negative; 0 is no limit",
                "window=-1: at least 1",
            ],
        ),
    ],
)  # fmt: skip
def test_impossible_options_are_said_at_once(options, lines):
    with pytest.raises(UserError) as caught:
        Sampling(**options)
    assert list(caught.value.args) == [f"sampling: {line}" for line in lines]


def test_the_ends_of_the_ranges_are_taken():
    Sampling(temperature=0.0, top_p=1.0, max_new_tokens=1, window=1, top_k=0, min_p=0.0)
    Sampling(temperature=100.0, top_p=1e-9, top_k=10**9, min_p=0.999)
