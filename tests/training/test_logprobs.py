"""Log-probs of targets against a float64 log-softmax over every position, and what the program does not hold."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.training import step
from selfreward_jax.training.logprobs import target_logprobs

COMPUTE = llama.Compute()


@pytest.fixture
def rows(small):
    """Three rows of different lengths (the fourth of the batch is filler); the second is all target but one token."""
    rng = np.random.default_rng(2)
    tokens = lambda length: tuple(map(int, rng.integers(0, small.vocab_size, size=length)))  # noqa: E731
    return [Row(tokens(13), 6), Row(tokens(8), 1), Row(tokens(5), 4)]


@pytest.fixture
def params(small, mesh, random_params):
    return random_params(small, mesh)


def reference(config, params, row):
    """log p(token | the tokens before it) of the row's targets: logits of all positions, a whole softmax, float64."""
    tokens = jnp.asarray(row.tokens, jnp.int32)[None]
    hidden = jax.jit(llama.hidden_states, static_argnums=(0, 1))(
        config, COMPUTE, params, jnp.pad(tokens, ((0, 0), (0, 16 - tokens.shape[1]))), jnp.arange(16)[None]
    )
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["head"], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [logps[index - 1, row.tokens[index]] for index in range(row.start, len(row.tokens))]


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_logprobs_are_the_shifted_log_softmax(chunk, rows, small, mesh, params, rows_apart):
    got = np.asarray(step.logprob_pass(small, COMPUTE, chunk, params, rows_apart(rows, 4, 16, mesh)))
    assert got.shape == (4, 16)
    assert got.dtype == np.float32
    for index, row in enumerate(rows):
        want = reference(small, params, row)
        np.testing.assert_allclose(got[index, : len(want)], want, rtol=1e-5, atol=1e-5)
        assert (got[index, len(want) :] == 0).all()  # padding is exactly nothing
    assert (got[3] == 0).all()  # and so is a row that only fills the batch
    assert got[:3].min() < -5
    assert np.abs(np.diff(got[0, :7])).min() > 1e-3


def test_padding_has_no_gradient(rows, small, mesh, params, rows_apart):
    """The same rows, padded with other tokens and to other shapes, give the same log-probs."""
    batch = rows_apart(rows, 4, 16, mesh)
    other = batch._replace(
        tokens=jnp.where(batch.positions < 100, batch.tokens, 7),
        targets=jnp.where(batch.weights > 0, batch.targets, 9),
        at=jnp.where(batch.weights > 0, batch.at, 15),
    )
    one, two = (step.logprob_pass(small, COMPUTE, 3, params, b) for b in (batch, other))
    np.testing.assert_array_equal(one, two)


def test_a_tied_head_and_bfloat16(rows, small, mesh, random_params, rows_apart):
    tied = dataclasses.replace(small, tied=True)
    params = random_params(tied, mesh)
    got = step.logprob_pass(
        tied, llama.Compute(dtype="bfloat16"), 8, params, rows_apart(rows, 4, 16, mesh)
    )
    assert got.dtype == jnp.float32  # sums over a response in bfloat16 would lose whole nats
    want = reference(tied, params | {"head": params["embed"].T}, rows[0])
    np.testing.assert_allclose(got[0, : len(want)], want, atol=0.15)


# --- no [B,T,V] -----------------------------------------------------------------------------------------------------


def shapes_in(jaxpr):
    """Shapes of every value of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


@pytest.mark.parametrize("backward", [False, True])
def test_no_logits_of_all_positions(backward, rows, small, mesh, params, rows_apart):
    """V meets at most `chunk` targets a row at a time, also in the backward pass and in what it keeps."""
    batch = rows_apart(rows, 4, 16, mesh)

    def largest(chunk):
        run = lambda p: target_logprobs(small, COMPUTE, p, batch, chunk).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(run) if backward else run)(params).jaxpr
        shapes = {shape for shape in shapes_in(jaxpr) if small.vocab_size in shape}
        assert (4, min(chunk, 16), small.vocab_size) in shapes  # the walk does see logits
        return max(math.prod(shape) // small.vocab_size for shape in shapes)

    assert largest(2) == small.embed  # the head itself; the logits are 4 rows x 2
    assert largest(16) == 4 * 16  # a chunk of all M targets is seen: so the walk would see [B,T,V]


def test_the_compiled_program_holds_one_chunk(rows, small, mesh, params, rows_apart):
    """The same in what XLA made of it: nothing fuses the chunks together again."""
    batch = rows_apart(rows, 4, 16, mesh)
    text = step.logprob_pass.lower(small, COMPUTE, 2, params, batch).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    logits = {shape for shape in shapes if small.vocab_size in shape and small.embed not in shape}
    assert logits
    assert max(math.prod(shape) for shape in logits) == 4 * 2 * small.vocab_size
