"""The host side of sampling: parts, which no mesh decides, and what is in them."""

import dataclasses

import numpy as np
import pytest

from selfreward_jax.model import llama
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.engine import Engine, Request
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.rules import GENERATION
from selfreward_jax.weights.source import load_params, open_source

COMPUTE = llama.Compute(remat="none", layout="generation")
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=6, window=64)
MESHES = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1)]


def opened(mesh_of, shape, rows, part):
    mesh = mesh_of(shape)
    source = open_source("random:tiny")
    params = load_params(source, mesh, "float32", GENERATION)
    return Engine(source.config, COMPUTE, COMPUTE, params, mesh, (2,), source.config.vocab_size, rows, part, 16)


def requests(count, samples):
    rng = np.random.default_rng(0)
    return [
        Request((7, 8, *map(int, rng.integers(3, 900, size=1 + i % 5))), tuple(range(i * samples, (i + 1) * samples)))
        for i in range(count)
    ]


@pytest.mark.parametrize(("count", "samples", "rows", "width"), [(96, 3, 64, 21), (5, 3, 64, 5), (9, 4, 2, 1)])
def test_the_requests_of_a_part_are_the_same_on_every_mesh(mesh_of, count, samples, rows, width):
    for shape in MESHES:
        made = Engine(None, COMPUTE, COMPUTE, None, mesh_of(shape), (), 1, 2, rows, 16)  # type: ignore[arg-type]
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
