"""Slots on the device: what is sampled is what the model says, whatever else is in them and whatever was before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.model.attention import NOWHERE
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.stopping import stop_table
from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.place import place, rows_multiple
from selfreward_jax.training import step

COMPUTE, UNROLLED = llama.Compute(), llama.Compute(unroll=2)
SAMPLING = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=8, window=16)
STOP = np.array([3, 17, 30], np.int32)
STOPS = stop_table(STOP, 1000)
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


def run(config, mesh, params, prompts, requests, prefix=(), sampling=SAMPLING, seed=SEED, phase=PHASE, enough=100, few=0):
    """All prompts into slots of their own, and all their rows to the end, or until `enough` slots are free."""
    tokens = np.zeros((len(prompts), TIME), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    requests = np.asarray(requests, np.int32)
    shards = rows_multiple(mesh)
    where = np.arange(len(prompts), dtype=np.int32) % (len(prompts) // shards)
    program, inputs = called(config, params, prefix, sampling, seed, phase)
    slots = decode.blank(program, params, len(prompts), requests.shape[1], TIME)
    read = decode.read(program, inputs, place(tokens, mesh), place(lengths, mesh), place(requests, mesh))
    slots = decode.insert(slots, *read, place(np.where(lengths > 0, where, -1).astype(np.int32), mesh))
    slots, report = steps(program, inputs, slots, enough=enough, few=few)
    return jax.tree.map(np.asarray, report)


def called(config, params, prefix=(), sampling=SAMPLING, seed=SEED, phase=PHASE):
    """What is compiled, and what all calls read."""
    return decode.Program(config, COMPUTE, sampling, config.vocab_size), decode.Inputs(params, seed, phase, prefix, STOPS)


def steps(program, inputs, slots, limit=100, enough=100, few=0, width=None):
    width = width or len(slots.rows.done)
    return decode.advance(
        program._replace(compute=UNROLLED), inputs, slots, width, *map(np.int32, (limit, enough, 1000, few))
    )


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
    assert sampled.steps == sampled.lengths.max() - 1  # and ends when none goes on
    assert sampled.busy == sampled.lengths.sum() - 6  # the first token of each is sampled while the prompt is read
    assert sampled.done.all()


def test_logps_are_the_models(sampled, small, mesh, params, prompts, rows_apart):
    """Teacher forcing, as in training, gives the log-probs that were returned, at temperature 1."""
    real = [row for row in range(8) if row // 2 != 2]
    rows = [
        Row(tuple(map(int, (*prompts[row // 2], *completions(sampled)[row]))), len(prompts[row // 2])) for row in real
    ]
    forced = step.logprob_pass(small, COMPUTE, 8, params, rows_apart(rows, 6, 16, mesh))
    np.testing.assert_allclose(sampled.logps[real], forced[:, : sampled.logps.shape[1]], atol=1e-4)


def test_tokens_are_the_requests_draws(sampled, small, mesh, params, prompts):
    """Token t of a request is chosen from the model's logits with the key of (seed, phase, request, t)."""
    whole = [[*prompts[row // 2], *completions(sampled)[row]] for row in range(8)]
    tokens = np.array([[*row, *[0] * (16 - len(row))] for row in whole], np.int32)
    hidden = jax.jit(llama.hidden_states, static_argnums=(0, 1))(
        small, COMPUTE, params, tokens, np.arange(16, dtype=np.int32)[None].repeat(8, 0)
    )
    logits = np.asarray(llama.logits(small, llama.head_weights(small, COMPUTE, params), hidden))
    keys = request_keys(SEED, PHASE, jnp.asarray(REQUESTS.ravel(), jnp.int32))
    pick = jax.jit(lambda logits, at: choose(logits, keys, jnp.full((8,), at, jnp.int32), SAMPLING)[0])
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
    assert prefix.k.shape == (2, 1, 2, 2, 6)  # [L,1,K,S,H]
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
    """Prompts go into the slots in place, and steps update the rows' keys in place: beside the slots, which are
    donated, there is a layer of them while it is read.

    With the cache as a scan's xs and ys there would be a second one, and prompts spread over their samples would be
    as much again. Measured on one CPU device, prompts short: 0.28 times the rows' cache for 4 layers.
    """
    config = dataclasses.replace(small, layers=4)
    params = params | {"layers": jax.tree.map(lambda a: jnp.concatenate([a, a]), params["layers"])}
    time, samples, new, slots = 64, 32, 64, 4
    how = dataclasses.replace(SAMPLING, max_new_tokens=new)
    program = decode.Program(config, COMPUTE, how, 29)
    inputs = decode.Inputs(params, 0, 0, (), stop_table(STOP[:1], 1000))
    state = decode.blank(program, params, slots, samples, time)
    lengths = place(np.full(slots, time, np.int32), mesh)
    read = decode.read(
        program, inputs, place(np.ones((slots, time), np.int32), mesh), lengths,
        place(np.arange(slots * samples, dtype=np.int32).reshape(slots, samples), mesh),
    )  # fmt: skip
    cache = 2 * state.own.k.nbytes
    where = place(np.arange(slots, dtype=np.int32), mesh)
    compiled = decode.insert.lower(state, *read, where).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cache
    state = compiled(state, *read, where)
    more = tuple(map(np.int32, (100, slots + 1, 1000, 0)))
    compiled = decode.advance.lower(program._replace(compute=UNROLLED), inputs, state, slots * samples, *more).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * cache
    out = compiled(inputs, state, *more)[1]
    # Ids from `vocabulary` on, padding rows of the head, never appear.
    assert 20 < np.asarray(out.tokens).max() < 29
    assert np.asarray(out.lengths).max() == new
    assert out.steps == new - 1


# --- slots that are filled again ------------------------------------------------------------------------------------


def test_a_slot_forgets_what_it_held(sampled, small, mesh, params, prompts):
    """Two slots that are filled four times, at other steps each time, whose ring goes round more than once."""
    program, inputs = called(small, params)
    slots = decode.blank(program, params, 2, 2, TIME + 3)
    base = np.array(completions(sampled), dtype=object).reshape(4, 2)
    found = {}
    for turn, pair in enumerate([(0, 1), (3, None), (1, 3), (None, 0)]):
        tokens, lengths, where = np.zeros((2, TIME), np.int32), np.zeros(2, np.int32), np.full(2, -1, np.int32)
        keys = np.zeros((2, 2), np.int32)
        for at, which in enumerate(pair):
            if which is not None:
                tokens[at, : len(prompts[which])], lengths[at] = prompts[which], len(prompts[which])
                where[at], keys[at] = 1 - at, REQUESTS[which]
        read = decode.read(program, inputs, *(place(x, mesh) for x in (tokens, lengths, keys)))
        slots = decode.insert(slots, *read, place(where, mesh))
        slots, _ = steps(program, inputs, slots, limit=3)  # a dispatch ends anywhere
        slots, report = steps(program, inputs, slots, limit=100, enough=2)
        report = jax.tree.map(np.asarray, report)
        for at, which in enumerate(pair):
            if which is not None:
                rows = slice(2 * (1 - at), 2 * (1 - at) + 2)
                found[turn, which] = [
                    tuple(row[:length]) for row, length in zip(report.tokens[rows], report.lengths[rows], strict=True)
                ]
    assert len(found) == 6
    assert int(report.steps) > 2 * SAMPLING.max_new_tokens
    for (_, which), got in found.items():
        assert [tuple(map(int, row)) for row in got] == [tuple(map(int, row)) for row in base[which]]


@pytest.mark.parametrize("enough", [1, 2, 3, 4])
def test_steps_end_when_enough_slots_are_free(enough, sampled, small, mesh, params, prompts):
    ends = np.sort(sampled.lengths.reshape(4, 2).max(1))
    assert ends[0] == 0  # the filler's slot is free from the start
    assert 0 < ends[1] < ends[3]
    out = run(small, mesh, params, prompts, REQUESTS, enough=enough)
    assert out.steps == max(ends[enough - 1] - 1, 0)


@pytest.mark.parametrize("few", [0, 1, 3])
def test_steps_end_when_few_rows_go_on(few, sampled, small, mesh, params, prompts):
    ends = np.sort(sampled.lengths)[::-1]
    out = run(small, mesh, params, prompts, REQUESTS, few=few)
    assert out.steps == ends[few] - 1


def test_positions_tell_whose_keys_they_are(small, mesh, params):
    slots = decode.blank(called(small, params)[0], params, 2, 2, TIME)
    assert (np.asarray(slots.own.positions) == NOWHERE).all()
    assert (np.asarray(slots.prompts.positions) == NOWHERE).all()
    assert np.asarray(slots.rows.done).all()
