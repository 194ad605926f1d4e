"""Batches: everything is seen as often as planned, in an order that a step number restores."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import batches
from selfreward_jax.data.batches import NOWHERE, Row, Shape

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


# --- padding --------------------------------------------------------------------------------------------------------


@st.composite
def some_rows(draw):
    tokens = st.lists(st.integers(0, 99), min_size=2, max_size=12)
    return [
        Row(tuple(ids), draw(st.integers(1, len(ids) - 1))) for ids in draw(st.lists(tokens, min_size=1, max_size=5))
    ]


@settings(max_examples=100)
@given(some_rows(), st.integers(0, 3), st.integers(1, 8), st.integers(1, 8))
def test_padded_rows_hold_the_rows_and_nothing_else(rows, spare, time, targets):
    got = batches.pad_rows(rows, len(rows) + spare, Shape(time, targets))
    count, wide = got.tokens.shape
    most = max(len(row.tokens) - row.start for row in rows)
    assert count == len(rows) + spare
    assert got.positions.shape == (count, wide)
    assert wide % time == 0
    assert 0 <= wide - max(len(row.tokens) for row in rows) < time
    width = got.at.shape[1]
    assert got.at.shape == got.targets.shape == got.weights.shape == (count, width)
    assert width % targets == 0
    assert 0 <= width - most < targets
    for index, row in enumerate(rows):
        length = int((got.positions[index] < NOWHERE).sum())
        assert got.positions[index, :length].tolist() == list(range(length))
        assert (got.positions[index, length:] == NOWHERE).all()
        here = int(got.weights[index].sum())
        assert set(got.weights[index, :here]) <= {1}
        assert not got.weights[index, here:].any()
        assert Row(tuple(got.tokens[index, :length].tolist()), length - here) == row  # the round trip
        # Each target is the token after the one that predicts it.
        assert (got.at[index, :here] >= 0).all()
        np.testing.assert_array_equal(got.tokens[index, got.at[index, :here] + 1], got.targets[index, :here])
        assert got.at[index, :here].tolist() == list(range(row.start - 1, len(row.tokens) - 1))
    assert not got.weights[len(rows) :].any()
    assert (got.positions[len(rows) :, 0] == 0).all()
    assert (got.positions[len(rows) :, 1:] == NOWHERE).all()
    assert got.weights.dtype == np.float32
    assert {a.dtype for a in (got.tokens, got.positions, got.at, got.targets)} == {np.dtype(np.int32)}


def test_no_position_is_the_models():
    from selfreward_jax.model import attention

    assert NOWHERE == attention.NOWHERE
    assert np.iinfo(np.int32).max >= NOWHERE * 2 - 1  # differences of positions fit


# --- microbatches ---------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_microbatches_partition_the_batch(lengths, size):
    parts = batches.microbatches(lengths, size)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(len(part) == size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= size
    flat = [lengths[index] for part in parts for index in part]
    assert flat == sorted(lengths, reverse=True)
    assert parts == batches.microbatches(list(lengths), size)


def test_a_row_is_its_own_rows():
    row = Row((1, 2, 3), 1)
    assert row.rows == (row,)
