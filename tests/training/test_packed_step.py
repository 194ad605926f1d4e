"""Packed rows with shared prefixes give the loss and the gradient of sequences that each have a row of their own."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.model.kernels import SEGMENTS
from selfreward_jax.training import step, trainer
from selfreward_jax.training.optimizer import Optimizer

FORMS = ("plain", "mapped", "cudnn-xla", "splash-interpreted")


@pytest.fixture(scope="module")
def pairs(small):
    """Prompts that begin alike; responses that do too, that are the same, and one that is another's beginning."""
    rng = np.random.default_rng(5)
    some = lambda n: tuple(map(int, rng.integers(0, small.vocab_size, size=n)))  # noqa: E731
    head = some(5)
    prompts = [(*head, *some(3)), (*head, *some(1)), some(4)]
    first = some(6)
    responses = [(first, (*first[:2], *some(3))), (first[:4], first), (some(7), some(1))]
    return [
        trainer.PairRow(*(Row(prompt + ids, len(prompt)) for ids in sides), -9.0, -11.0)
        for prompt, sides in zip(prompts, responses, strict=True)
    ]


def gradient(config, mesh, params, items, shape, objective, collate, form, products=""):
    """Sum, weight and metrics of an update's loss, and its gradient."""
    plan = trainer.Plan(Optimizer(1e-3, 1e-3, 1), 1, len(items), shape, 0, 0.0, 4, 0, 1)
    total = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    loss = 0.0
    parts = packing.microbatches([item.rows for item in items], shape)
    for part in parts:
        batch = collate(items, part, plan, mesh)
        total, metrics = step.add_gradient(
            config, llama.Compute(attention=form, products=products), objective, plan.chunk, 0.0, params, total, batch, jax.random.key(0)
        )
        loss += float(metrics["loss"][0])
    return loss, float(total[1]), jax.device_get(total[0]), parts


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_packed_is_plain(kind, form, window, pairs, small, mesh, random_params):
    config = dataclasses.replace(small, sliding_window=window)
    params = random_params(config, mesh)
    if kind == "dpo":
        items, objective, collate = pairs, partial(step.dpo_objective, beta=0.1), trainer.collate_pairs
    else:
        items = [dataclasses.replace(row, weight=1 + i / 4) for i, pair in enumerate(pairs) for row in pair.rows]
        objective, collate = step.sft_objective, trainer.collate_rows
    go = partial(gradient, config, mesh, params, items, objective=objective, collate=collate)
    shared = form not in SEGMENTS
    loss, weight, got, parts = go(shape=packing.Shape(64, 1, 1, shared), form=form, products="float32")
    held = sum(part.tokens for part in parts)
    whole = sum(len(row.tokens) for item in items for row in item.rows)
    assert len(parts) < len(items) and (held < whole - 15 if shared else held == whole)

    # Plain: an SFT example a row; a pair's two sequences in one row, but whole.
    want_loss, want_weight, want, alone = go(shape=packing.Shape(32, 1, 1, False), form="plain")
    assert weight == want_weight and len(alone) >= len(parts)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * scale), got, want)
    assert scale > 0.1


def test_a_row_of_one_sequence_is_what_it_was(small, mesh, random_params, rows_apart):
    """The reference of the reference: a sequence alone in its row, without `ends`, by the causal mask alone."""
    rng = np.random.default_rng(1)
    row = Row(tuple(map(int, rng.integers(0, small.vocab_size, size=13))), 6)
    params = random_params(small, mesh)
    batch = rows_apart([row], 1, 16, mesh)
    hidden = jax.jit(llama.hidden_states, static_argnums=(0, 1))
    packed = hidden(small, llama.Compute(), params, batch.tokens, batch.positions, batch.ends)
    causal = hidden(small, llama.Compute(), params, batch.tokens, batch.positions)
    np.testing.assert_allclose(packed[0, :13], causal[0, :13], rtol=1e-6, atol=1e-6)
