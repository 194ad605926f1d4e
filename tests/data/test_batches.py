"""Batches: everything is seen as often as planned, in an order that a step number restores."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import batches
from selfreward_jax.data.batches import NOWHERE, Row

counts, epochs, sizes, seeds = st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31 - 1)


@settings(max_examples=40)
@given(counts, epochs, sizes, seeds)
def test_every_example_is_seen_once_an_epoch(count, epochs, size, seed):
    steps = batches.updates(count, epochs, size)
    parts = [batches.batch_indices(count, epochs, seed, size, step) for step in range(steps)]
    assert all(len(part) == size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= size
    seen = [index for part in parts for index in part]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert len(seen) == epochs * count
    assert batches.batch_indices(count, epochs, seed, size, steps) == []


@settings(max_examples=20)
@given(counts, epochs, sizes, seeds, st.data())
def test_a_step_needs_no_history(count, epochs, size, seed, data):
    """The batch of any step, asked for alone and twice, is that of the sequence."""
    order = [batches.order(count, epochs, seed)[i] for i in range(count * epochs)]
    step = data.draw(st.integers(0, batches.updates(count, epochs, size) - 1))
    for _ in range(2):
        assert batches.batch_indices(count, epochs, seed, size, step) == order[step * size : (step + 1) * size]


def test_the_order_is_shuffled_by_seed_and_epoch():
    first, second = (batches.batch_indices(200, 2, 0, 200, step) for step in range(2))
    other = batches.batch_indices(200, 2, 1, 200, 0)
    for one, two in ((first, second), (first, other), (second, other), (first, list(range(200)))):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 10  # two random permutations agree once or so
    # More epochs do not change the ones before: a longer run begins like a shorter one.
    assert batches.batch_indices(200, 5, 0, 200, 1) == second


def test_no_position_is_the_models():
    from selfreward_jax.model import attention

    assert NOWHERE == attention.NOWHERE
    assert np.iinfo(np.int32).max >= NOWHERE * 2 - 1  # differences of positions fit


def test_a_row_is_its_own_rows():
    row = Row((1, 2, 3), 1)
    assert row.rows == (row,)
