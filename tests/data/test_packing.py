"""Packed rows: each sequence sees its own tokens in their order, and a common prefix lies there once."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import packing
from selfreward_jax.data.batches import NOWHERE, Row
from selfreward_jax.data.packing import Shape


@st.composite
def some_groups(draw):
    """Pairs and single sequences over few tokens, so that many begin alike; some are the same, some another's beginning."""
    tokens = st.lists(st.integers(0, 1), min_size=2, max_size=12)
    sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=7))
    one = lambda: (ids := tuple(draw(tokens)), draw(st.integers(1, len(ids) - 1)))  # noqa: E731
    return [[Row(*one(), draw(st.sampled_from((1.0, 0.5)))) for _ in range(size)] for size in sizes]


shapes = st.builds(Shape, st.integers(24, 60), st.integers(1, 3), st.integers(1, 8), st.booleans())


@settings(max_examples=300)
@given(some_groups(), shapes)
def test_a_sequence_sees_itself_and_nothing_else(groups, shape):
    parts = packing.microbatches(groups, shape)
    assert sorted(index for part in parts for index in part.members) == list(range(len(groups)))
    assert packing.microbatches(groups, shape) == parts
    for part in parts:
        assert part.time in shape.times and len(part.rows) <= shape.rows
        rows = packing.lay(groups, part, shape)
        assert rows.tokens.shape == rows.positions.shape == rows.ends.shape == (shape.rows, part.time)
        assert {array.dtype for array in vars(rows).values()} == {np.dtype(np.int32), np.dtype(np.float32)}
        assert part.tokens == (rows.positions < NOWHERE).sum()
        places = np.arange(part.time)
        seen = (places <= places[:, None]) & (places[:, None] < rows.ends[:, None, :])
        number = 0
        for place, members in enumerate(part.rows):
            for row in (row for index in members for row in groups[index]):
                mine = (rows.sequences[place] == number) & (rows.weights[place] > 0)
                assert rows.targets[place, mine].tolist() == list(row.tokens[row.start :])
                assert (rows.weights[place, mine] == row.weight).all()
                for target, at in zip(range(row.start, len(row.tokens)), rows.at[place, mine], strict=True):
                    there = np.flatnonzero(seen[place, at])  # the tokens before the target, once each and in order
                    assert rows.tokens[place, there].tolist() == list(row.tokens[:target])
                    assert rows.positions[place, there].tolist() == list(range(target))
                number += 1
        assert rows.weights.astype(bool).sum() == sum(
            len(row.tokens) - row.start for index in part.members for row in groups[index]
        )
        padding = rows.positions == NOWHERE
        assert part.seen == seen[~padding].sum()
        assert (seen.sum(axis=2)[padding] == 1).all() and seen[:, places, places].all()
        assert padding[len(part.rows) :].all()


@settings(max_examples=100)
@given(some_groups(), shapes)
def test_rows_hold_a_prefix_tree(groups, shape):
    """With sharing a row has as many tokens as its sequences have different beginnings; without, as many as they are long."""
    for part in packing.microbatches(groups, shape):
        total = 0
        for members in part.rows:
            sequences = [row.tokens for index in members for row in groups[index]]
            beginnings = {ids[:end] for ids in sequences for end in range(1, len(ids) + 1)}
            total += len(beginnings) if shape.shared else sum(map(len, sequences))
        assert part.tokens == total


def test_the_layout_of_a_pair():
    prompt, chosen, rejected = (7, 8, 9), (4, 5), (4, 6, 2)
    groups = [[Row(prompt + chosen, 3), Row(prompt + rejected, 3)]]
    shape = Shape(8, 1, 1, True)
    (part,) = packing.microbatches(groups, shape)
    rows = packing.lay(groups, part, shape)
    assert rows.tokens[0].tolist() == [7, 8, 9, 4, 5, 6, 2, 0]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 4, 5, NOWHERE]
    assert rows.ends[0].tolist() == [7, 7, 7, 7, 5, 7, 7, 8]
    assert rows.at[0, :5].tolist() == [2, 3, 2, 3, 5]
    assert rows.targets[0, :5].tolist() == [4, 5, 4, 6, 2]
    assert rows.sequences[0, :5].tolist() == [0, 0, 1, 1, 1]


def test_a_group_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="row of 4 tokens"):
        packing.microbatches([[Row((1, 2, 3, 4, 5), 2)]], Shape(4, 1, 1, True))


def lengths_of(rng, count, low, high):
    return [int(x) for x in np.exp(rng.uniform(np.log(low), np.log(high), count))]


@pytest.mark.parametrize("shared", [True, False])
def test_real_lengths_waste_less_than_five_percent(shared):
    """16 pairs an update, as the paper's: prompts of 20 to 400 tokens, responses of 30 to 1,024, one row at a time."""
    rng = np.random.default_rng(0)
    updates = []
    for _ in range(12):
        groups = []
        for length in lengths_of(rng, 16, 20, 400):
            prompt = tuple(rng.integers(0, 9999, length).tolist())
            sides = lengths_of(rng, 2, 30, 1024)
            groups.append([Row(prompt + tuple(rng.integers(0, 9999, n).tolist()), length) for n in sides])
        updates.append(groups)
    shape = Shape(64, 1, 64, shared)
    shape = dataclasses.replace(shape, time=packing.choose_time(updates, shape, 4096, 1e-5))
    parts = [part for groups in updates for part in packing.microbatches(groups, shape)]
    assert packing.wasted(parts, shape) < 0.05
    assert len({part.time for part in parts}) <= 4
    whole = sum(len(row.tokens) for groups in updates for rows in groups for row in rows)
    held = sum(part.tokens for part in parts)
    assert held < 0.88 * whole if shared else held == whole


def test_judge_examples_read_their_rubric_once_a_row():
    rng = np.random.default_rng(1)
    rubric = tuple(rng.integers(0, 9999, 283).tolist())
    groups = [[Row(rubric + tuple(rng.integers(0, 9999, 247).tolist()), 470)] for _ in range(8)]
    shape = Shape(64, 1, 64, True)
    time = packing.choose_time([groups], shape, 2304, 0.0)
    parts = packing.microbatches(groups, dataclasses.replace(shape, time=time))
    assert [part.tokens for part in parts] == [283 + 8 * 247]
    # Attention over what other examples of the row say is not free: with a price on it rows get shorter.
    assert packing.choose_time([groups], shape, 2304, 1e-2) < time


def test_rows_are_not_longer_than_allowed_unless_one_group_is():
    groups = [[Row(tuple(range(100 * i, 100 * i + 90)), 10)] for i in range(6)]
    shape = Shape(32, 1, 32, True)
    assert packing.choose_time([groups], shape, 200, 0.0) <= 200
    assert packing.choose_time([groups], shape, 50, 0.0) == 96
