"""The host side of sampling: parts, which no mesh decides, slots that are refilled, and what comes out of them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.engine import Engine, Request
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.rules import GENERATION
from selfreward_jax.weights.source import load_params, open_source

COMPUTE = llama.Compute(remat="none", layout="generation")
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=6, window=64)
MESHES = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1)]


def opened(mesh_of, shape, rows, part, narrowest=1, cached=None):
    mesh = mesh_of(shape)
    source = open_source("random:tiny")
    params = load_params(source, mesh, "float32", GENERATION)
    vocabulary = source.config.vocab_size
    return Engine(
        source.config, COMPUTE, COMPUTE, params, mesh, (2,), vocabulary, rows, cached or rows, part, 16, narrowest
    )


def requests(count, samples):
    rng = np.random.default_rng(0)
    return [
        Request((7, 8, *map(int, rng.integers(3, 900, size=1 + i % 5))), tuple(range(i * samples, (i + 1) * samples)))
        for i in range(count)
    ]


@pytest.mark.parametrize(("count", "samples", "rows", "width"), [(96, 3, 64, 21), (5, 3, 64, 5), (9, 4, 2, 1)])
def test_the_requests_of_a_part_are_the_same_on_every_mesh(mesh_of, count, samples, rows, width):
    for shape in MESHES:
        made = Engine(None, COMPUTE, COMPUTE, None, mesh_of(shape), (), 1, 2, 2, rows, 16, 1)  # type: ignore[arg-type]
        assert engines.per_part(made, requests(count, samples)) == width
        assert engines.padded(made, width) % shape[0] == 0
        assert width <= engines.padded(made, width) < width + 8


@pytest.mark.parametrize("how", [GREEDY, dataclasses.replace(GREEDY, temperature=0.9, top_p=0.8)], ids=["greedy", "drawn"])
def test_completions_are_those_of_one_device_and_parts_can_be_mixed(mesh_of, how):
    asked = requests(7, 3)  # parts of 3 requests: no multiple of the shards
    found = []
    for shape in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):
        made = opened(mesh_of, shape, 6, 9)
        found.append(list(engines.run(made, how, asked, 0, "test")))
        second = list(engines.run(made, how, asked, 0, "test", [True, False, True]))
        assert [part for part, _, _ in found[-1]] == [0, 1, 2]
        assert [part for part, _, _ in second] == [1]
        assert second[0][1] == found[-1][1][1]
        assert [len(completions) for _, completions, _ in found[-1]] == [3, 3, 1]
    ids = [[[one.ids for one in some] for _, part, _ in run for some in part] for run in found]
    assert ids[0] == ids[1] == ids[2]
    for other in found[1:]:
        for (_, a, _), (_, b, _) in zip(found[0], other, strict=True):
            for some, more in zip(a, b, strict=True):
                np.testing.assert_allclose(some[0].logprobs, more[0].logprobs, atol=1e-4)


def test_rows_that_fill_the_batch_count_no_tokens(mesh_of):
    made = opened(mesh_of, (2, 2, 2), 3, 9)
    ((_, completions, counts),) = engines.run(made, dataclasses.replace(GREEDY, max_new_tokens=2), requests(1, 3), 0, "x")
    assert counts.tokens == sum(len(one.ids) for some in completions for one in some) <= 6


# --- slots ----------------------------------------------------------------------------------------------------------

DRAWN = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.9, max_new_tokens=10)
STOPS = tuple(range(2, 90))  # so that many completions end early


def sampled(made, asked, how=DRAWN, **more):
    """Completions of each request, the counts of all parts, and what `advance` was told."""
    told, found, total = [], [], engines.Counts()
    for _, some, counts in engines.run(made, how, asked, 3, "slots", advance=lambda *news: told.append(news), **more):
        found += some
        total += counts
    return found, total, told


def assert_alike(got, want):
    assert [[one.ids for one in some] for some in got] == [[one.ids for one in some] for some in want]
    assert [[one.finish_reason for one in some] for some in got] == [[one.finish_reason for one in some] for some in want]
    for some, others in zip(got, want, strict=True):
        for one, other in zip(some, others, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def stopping(made):
    return dataclasses.replace(made, stop_ids=STOPS)


@pytest.fixture
def alone(mesh_of):
    """Each of 11 requests with 3 samples in a part and a slot of its own."""
    found, total, _ = sampled(stopping(opened(mesh_of, (1, 1, 1), 3, 3)), requests(11, 3))
    lengths = [len(one.ids) for some in found for one in some]
    reasons = [one.finish_reason for some in found for one in some]
    assert 5 < reasons.count("stop") < 30
    for some in found:
        for one in some:
            assert (one.finish_reason == "stop") == (one.ids[-1] in STOPS)
            assert not set(one.ids[:-1]) & set(STOPS)
            assert len(one.ids) == len(one.logprobs) <= 10
            assert one.finish_reason == "stop" or len(one.ids) == 10
    assert total.tokens == sum(lengths)
    return found


@pytest.mark.parametrize(
    ("shape", "rows", "part"),
    [((1, 1, 1), 6, 100), ((1, 1, 1), 33, 100), ((1, 1, 1), 100, 15), ((2, 1, 1), 12, 100), ((4, 2, 1), 9, 18), ((2, 2, 2), 6, 27)],
)  # fmt: skip
def test_slots_parts_and_meshes_change_nothing(alone, mesh_of, shape, rows, part):
    found, total, told = sampled(stopping(opened(mesh_of, shape, rows, part, cached=rows * 3 // 2)), requests(11, 3))
    assert_alike(found, alone)
    assert sum(count for count, _ in told) == 33
    assert total.tokens == sum(len(one.ids) for some in found for one in some)
    assert total.places - total.lost == total.tokens - 33  # the first token of each comes with the prompt
    assert 0 <= total.lost < total.places
    assert len(total.shapes) <= 4 + 3


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_that_go_on_are_computed_in_fewer(alone, mesh_of, shape):
    """The same completions, in a part of the places."""
    wide, narrow, spare = (
        sampled(stopping(opened(mesh_of, shape, 24, 100, narrowest, cached)), requests(11, 3))
        for narrowest, cached in ((24, 24), (6, 24), (6, 33))
    )
    for (found, counts, _), used in ((wide, {24}), (narrow, {6, 24} if shape == (1, 1, 1) else {24}), (spare, {24})):
        assert_alike(found, alone)
        assert used <= {shape[3] for shape in counts.shapes if len(shape) == 4} <= {6, 24}
        assert counts.places - counts.lost == counts.tokens - 33
    assert narrow[1].lost <= wide[1].lost
    assert spare[1].lost < 0.5 * wide[1].lost and spare[1].steps < wide[1].steps


@pytest.mark.parametrize(
    ("shape", "rows", "samples", "narrowest", "widths"),
    [
        ((1, 1, 1), 48, 4, 8, [12, 48]), ((1, 1, 1), 48, 4, 48, [48]), ((1, 1, 1), 9, 3, 1, [9]), ((2, 2, 2), 24, 3, 1, [6, 24]),
        ((4, 2, 1), 9, 3, 1, [12]), ((4, 2, 1), 1000, 3, 1, [120]),
    ],
)  # fmt: skip
def test_widths_are_quartered_while_every_shard_keeps_whole_rows(mesh_of, shape, rows, samples, narrowest, widths):
    assert engines._widths(opened(mesh_of, shape, rows, rows, narrowest), 40, samples) == widths


def test_layers_that_lie_apart_change_nothing(alone, mesh_of):
    made = stopping(opened(mesh_of, (2, 1, 1), 9, 100))
    with jax.set_mesh(made.mesh):
        made = dataclasses.replace(made, params=llama.apart(made.config, made.params))
    assert_alike(sampled(made, requests(11, 3))[0], alone)


def test_heads_that_lie_apart_change_nothing(alone, mesh_of):
    """The layout of q for a TPU, in which a CPU computes too."""
    made = stopping(opened(mesh_of, (2, 2, 2), 9, 100))
    turned = llama.heads_apart(made.params)
    q, was = (params["layers"]["attention"]["q"] for params in (turned, made.params))
    assert q.format.layout.major_to_minor == (0, 2, 1, 3) and q.sharding == was.sharding
    assert_alike(sampled(dataclasses.replace(made, params=turned), requests(11, 3))[0], alone)


def test_a_prefix_that_all_share_is_the_only_one_read_apart(alone, mesh_of, monkeypatch):
    made, lengths = stopping(opened(mesh_of, (1, 1, 1), 9, 15)), []
    read_shared = engines._read_shared
    monkeypatch.setattr(engines, "_read_shared", lambda engine, shared: (lengths.append(shared), read_shared(engine, shared))[1])
    assert_alike(sampled(made, requests(11, 3))[0], alone)
    assert lengths == [(7, 8)]  # once for all parts
    other = [*requests(11, 3), Request((9, 9), (900, 901, 902))]  # begins otherwise: nothing is shared
    assert_alike(sampled(made, other)[0][:11], alone)
    assert lengths[1:] == [()]


def test_a_part_that_was_skipped_is_not_sampled(alone, mesh_of):
    made = stopping(opened(mesh_of, (1, 1, 1), 9, 15))
    parts = list(engines.run(made, DRAWN, requests(11, 3), 3, "slots", [True, False]))
    assert [part for part, _, _ in parts] == [1, 2]
    assert_alike([some for _, found, _ in parts for some in found], alone[5:])


def test_one_token_is_enough(mesh_of):
    found, total, _ = sampled(
        opened(mesh_of, (1, 1, 1), 6, 100), requests(5, 2), dataclasses.replace(DRAWN, max_new_tokens=1)
    )
    assert [len(one.ids) for some in found for one in some] == [1] * 10
    assert (total.steps, total.tokens) == (0, 10)


def test_prompts_that_cannot_be_completed_are_counted(mesh_of):
    made = opened(mesh_of, (1, 1, 1), 6, 100)
    long = Request(tuple([5] * (made.config.context - 5)), (1,))
    with pytest.raises(UserError) as raised:
        list(engines.run(made, DRAWN, [Request((), (0,)), long, Request((4, 5), (2,))], 0, "bad"))
    context = made.config.context
    assert raised.value.args == (
        "1 of 3 prompts have no token; leave them out",
        f"1 of 3 prompts have more than {context - 10} tokens, and the model's context is {context} with 10 for the"
        " completion; leave them out or allow fewer",
    )
    assert list(engines.run(made, DRAWN, [], 0, "none")) == []


@given(st.integers(1, 100_000), st.sampled_from([1, 16, 64, 256]))
def test_extents_are_few_and_tight(length, pad):
    size = engines.extent(length, pad)
    assert size % pad == 0
    assert length <= size < max(1.5 * length, length + pad)
    assert engines.extent(size, pad) == size


def test_lengths_up_to_100_000_have_25_extents():
    assert len({engines.extent(length, 64) for length in range(1, 100_000, 64)}) <= 25
