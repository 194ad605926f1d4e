"""Prefill and decode together: what is sampled is what the model says, whatever else is in the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.data.batches import Row, Shape
from selfreward_jax.model import llama
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.place import place
from selfreward_jax.training import step, trainer

COMPUTE, UNROLLED = llama.Compute(), llama.Compute(unroll=2)
SAMPLING = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=8, window=16)
STOP = np.array([3, 17, 30], np.int32)
SEED, PHASE = 5, 2
TIME = 6


@pytest.fixture
def params(small, mesh, random_params):
    return random_params(small, mesh)


@pytest.fixture(scope="module")
def prompts(small):
    """Four prompts that begin alike; the third only fills the batch."""
    rng = np.random.default_rng(3)
    start = rng.integers(0, small.vocab_size, size=2)
    return [np.concatenate([start, rng.integers(0, small.vocab_size, size=n)]) if n else [] for n in (4, 1, 0, 3)]


def run(config, mesh, params, prompts, requests, prefix=(), sampling=SAMPLING, seed=SEED, phase=PHASE):
    tokens = np.zeros((len(prompts), TIME), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    out = decode.sample(
        config, COMPUTE, UNROLLED, sampling, seed, phase, config.vocab_size, params, place(tokens, mesh),
        place(lengths, mesh), place(np.asarray(requests, np.int32), mesh), prefix, STOP,
    )  # fmt: skip
    return jax.tree.map(np.asarray, out)


REQUESTS = np.array([[0, 1], [2, 3], [4, 5], [6, 7]]) + 40


@pytest.fixture
def sampled(small, mesh, params, prompts):
    return run(small, mesh, params, prompts, REQUESTS)


def completions(out):
    return [tuple(row[:length]) for row, length in zip(out.tokens, out.lengths, strict=True)]


# --- what is returned -----------------------------------------------------------------------------------------------


def test_lengths_and_stops(sampled):
    assert 0 < sampled.stopped.sum() < 6  # both kinds are here
    for row in range(8):
        length, tokens = sampled.lengths[row], sampled.tokens[row]
        if row in (4, 5):  # the filler
            assert length == 0
            assert not sampled.stopped[row]
        else:
            stops = np.flatnonzero(np.isin(tokens[:length], STOP))
            if sampled.stopped[row]:
                assert stops.tolist() == [length - 1]  # the stop token is the last and is counted
            else:
                assert stops.size == 0
                assert length == 8
            assert (sampled.logps[row, :length] < 0).all()
        assert not tokens[length:].any()
        assert not sampled.logps[row, length:].any()
    assert sampled.steps == sampled.lengths.max() == 8


def test_logps_are_the_models(sampled, small, mesh, params, prompts):
    """Teacher forcing, as in training, gives the log-probs that were returned, at temperature 1."""
    real = [row for row in range(8) if row // 2 != 2]
    rows = [
        Row(tuple(map(int, (*prompts[row // 2], *completions(sampled)[row]))), len(prompts[row // 2])) for row in real
    ]
    forced = step.logprob_pass(small, COMPUTE, 8, params, trainer.place_rows(rows, 6, Shape(16, 8), mesh))
    np.testing.assert_allclose(sampled.logps[real], forced, atol=1e-4)


def test_tokens_are_the_requests_draws(sampled, small, mesh, params, prompts):
    """Token t of a request is chosen from the model's logits with the key of (seed, phase, request, t)."""
    whole = [[*prompts[row // 2], *completions(sampled)[row]] for row in range(8)]
    tokens = np.array([[*row, *[0] * (16 - len(row))] for row in whole], np.int32)
    hidden = jax.jit(llama.hidden_states, static_argnums=(0, 1))(
        small, COMPUTE, params, tokens, np.arange(16, dtype=np.int32)[None].repeat(8, 0)
    )
    logits = np.asarray(llama.logits(llama.head_weights(small, COMPUTE, params), hidden))
    keys = request_keys(SEED, PHASE, jnp.asarray(REQUESTS.ravel(), jnp.int32))
    pick = jax.jit(lambda logits, at: choose(logits, keys, jnp.full(8, at), SAMPLING)[0])
    seen = 0
    for at in range(8):
        ends = np.array([len(prompts[row // 2]) for row in range(8)])
        chosen = np.asarray(pick(logits[np.arange(8), np.maximum(ends + at - 1, 0)], jnp.asarray(at)))
        for row in range(8):
            if at < sampled.lengths[row]:
                assert chosen[row] == sampled.tokens[row, at]
                seen += 1
    assert seen == sampled.lengths.sum() > 30


# --- what does not matter -------------------------------------------------------------------------------------------


def test_the_rest_of_the_batch_does_not_matter(sampled, small, mesh, params, prompts):
    order = [3, 2, 0, 1]
    moved = run(small, mesh, params, [prompts[i] for i in order], REQUESTS[order])
    base = np.array(completions(sampled), dtype=object).reshape(4, 2)
    assert (np.array(completions(moved), dtype=object).reshape(4, 2) == base[order]).all()
    alone = run(small, mesh, params, [prompts[3]], [[47]])  # one prompt, one sample
    assert completions(alone) == [completions(sampled)[7]]
    np.testing.assert_allclose(alone.logps[0], sampled.logps[7], atol=1e-5)


def test_what_does_matter(sampled, small, mesh, params, prompts):
    base = completions(sampled)
    for change in ({"seed": SEED + 1}, {"phase": PHASE + 1}, {"requests": REQUESTS + 100}):
        other = completions(run(small, mesh, params, prompts, **{"requests": REQUESTS, **change}))
        assert sum(a != b for a, b in zip(base, other, strict=True)) >= 5
    assert base[0] != base[1]  # two samples of a prompt


def test_a_shared_prefix_changes_nothing(sampled, small, mesh, params, prompts):
    prefix = decode.prefix_keys(small, COMPUTE, params, jnp.asarray(prompts[0][:2], jnp.int32)[None])
    assert prefix.k.shape == (2, 1, 2, 2, 6)
    out = run(small, mesh, params, [prompt[2:] for prompt in prompts], REQUESTS, (prefix,))
    assert completions(out) == completions(sampled)
    np.testing.assert_allclose(out.logps, sampled.logps, atol=1e-5)
    np.testing.assert_array_equal(out.stopped, sampled.stopped)


def test_a_mesh_of_eight_samples_the_same(even, mesh_of, prompts, random_params):
    """Rows over data and fsdp, heads and vocabulary over tensor, the prefix on every device."""
    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            params = random_params(even, mesh)
            prefix = decode.prefix_keys(even, COMPUTE, params, jnp.asarray(prompts[0][:2] % 40, jnp.int32)[None])
            rest = [np.asarray(prompt[2:], int) % 40 for prompt in prompts]
            results.append(run(even, mesh, params, rest, REQUESTS, (prefix,)))
    one, eight = results
    assert completions(one) == completions(eight)
    assert one.lengths.sum() > 20
    np.testing.assert_allclose(one.logps, eight.logps, atol=1e-5)
    np.testing.assert_array_equal(one.stopped, eight.stopped)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_caches_are_not_copied(small, mesh, params):
    """Temporary memory is the rows' own cache once, one layer of it while it is read, and the prompts' keys once.

    With the cache as a scan's xs and ys there would be two of it, and prompts spread over their samples would be as
    much again. Measured: 1.33 times the cache for 4 layers, 1.17 for 8 (one CPU device, prompts short); here 1.5.
    """
    config = dataclasses.replace(small, layers=4)
    params = params | {"layers": jax.tree.map(lambda a: jnp.concatenate([a, a]), params["layers"])}
    time, samples, new = 64, 32, 64
    args = (
        config, COMPUTE, COMPUTE, dataclasses.replace(SAMPLING, max_new_tokens=new), 0, 0, 29, params,
        place(np.ones((1, time), np.int32), mesh), place(np.array([time], np.int32), mesh),
        place(np.arange(samples, dtype=np.int32)[None], mesh), (), STOP[:1],
    )  # fmt: skip
    compiled = decode.sample.lower(*args).compile()
    token = 2 * config.layers * config.kv_heads * config.head_dim * 4  # bytes of keys and values
    cache = samples * new * token
    assert cache <= compiled.memory_analysis().temp_size_in_bytes < 1.9 * cache
    traced = [leaf for leaf in args if isinstance(leaf, jax.Array | dict | tuple | np.ndarray)]
    out = compiled(0, 0, *traced)
    # Ids from `vocabulary` on, padding rows of the head, never appear.
    assert 20 < np.asarray(out.tokens).max() < 29
    assert np.asarray(out.lengths).max() == new
