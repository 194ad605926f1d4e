"""The losses against their formulas in float64, and against TRL's numbers for a tiny Llama made from seeds.

No weights are read and nothing is downloaded: this file takes seconds.
"""

import json
import math
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.model.config import from_hf
from selfreward_jax.sharding.rules import shardings
from selfreward_jax.training import step, trainer
from selfreward_jax.training.losses import dpo_loss, sft_loss
from selfreward_jax.training.optimizer import Optimizer

PAIRS = 6
jitted = jax.jit(dpo_loss, static_argnums=4)
gradient = jax.jit(jax.grad(lambda *args: dpo_loss(*args)[0].sum(), argnums=(0, 1, 2, 3)), static_argnums=4)


def formula(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Rafailov et al. 2023, equation 7: -log sigma(beta log(pi_w/ref_w) - beta log(pi_l/ref_l))."""
    z = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return np.maximum(-z, 0) + np.log1p(np.exp(-np.abs(z)))


def logps(low, high):
    return arrays(np.float32, (4, PAIRS), elements=st.floats(low, high, width=32))


ranges = st.one_of(logps(-4, 0), logps(-1000, 0), logps(-1000, 1000))
betas = st.sampled_from([0.1, 0.5, 1.0])


@settings(max_examples=200)
@given(ranges, betas)
def test_loss_and_rewards_are_the_formula(values, beta):
    loss, chosen, rejected = (np.asarray(x) for x in jitted(*values, beta))
    wide = values.astype(np.float64)
    size = max(1.0, beta * np.abs(wide).max())
    assert loss.dtype == np.float32
    assert loss.shape == (PAIRS,)
    np.testing.assert_allclose(loss, formula(*wide, beta), rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(chosen, beta * (wide[0] - wide[2]), rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(rejected, beta * (wide[1] - wide[3]), rtol=1e-6, atol=1e-6 * size)
    assert np.isfinite(loss).all()
    assert (loss >= 0).all()


@settings(max_examples=100)
@given(ranges, betas)
def test_gradient_is_the_finite_difference(values, beta):
    got = [np.asarray(g) for g in gradient(*values, beta)]
    wide = values.astype(np.float64)
    step = 1e-4
    for number in range(4):
        up, down = wide.copy(), wide.copy()
        up[number] += step
        down[number] -= step
        want = (formula(*up, beta) - formula(*down, beta)) / (2 * step)
        assert np.isfinite(got[number]).all()
        np.testing.assert_allclose(got[number], want, rtol=1e-5, atol=1e-4 * beta)


@pytest.mark.parametrize("margin", [1e3, -1e3, 1e4, -1e4])
def test_extreme_margins_are_finite(margin):
    zero = np.zeros(1, np.float32)
    args = (zero + margin, zero, zero, zero, 1.0)
    loss = float(jitted(*args)[0][0])
    assert loss == pytest.approx(max(0.0, -margin), rel=1e-6, abs=1e-30)
    slope = [float(g[0]) for g in gradient(*args)]
    assert slope == pytest.approx([-1.0, 1.0, 1.0, -1.0] if margin < 0 else [0.0] * 4)


def test_at_the_reference_the_loss_is_ln_2():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.uniform(-300, 0, (2, PAIRS)).astype(np.float32)
    loss, reward_chosen, reward_rejected = jitted(chosen, rejected, chosen, rejected, 0.1)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-7)
    assert not reward_chosen.any()
    assert not reward_rejected.any()
    slopes = gradient(chosen, rejected, chosen, rejected, 0.1)
    for slope, want in zip(slopes, (-0.05, 0.05, 0.05, -0.05), strict=True):
        np.testing.assert_allclose(slope, want, rtol=1e-6)


def test_each_pair_is_its_own():
    """Sums over the batch, or a chosen paired with another's rejected, would show here."""
    rng = np.random.default_rng(1)
    values = rng.normal(-50, 20, (4, PAIRS)).astype(np.float32)
    loss = np.asarray(jitted(*values, 0.1)[0])
    for pair in range(PAIRS):
        alone = jitted(*values[:, pair : pair + 1], 0.1)[0]
        np.testing.assert_allclose(alone, loss[pair : pair + 1], rtol=1e-6)


def test_sft_loss_is_a_sum_and_a_weight():
    logps = np.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], np.float32)
    weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    total, weight = sft_loss(logps, weights)
    assert (float(total), float(weight)) == (11.0, 3.0)


# --- TRL's DPOTrainer, run once: tests/golden/make_dpo_golden.py ----------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_params(config, seed):
    """The model of a seed, from Hugging Face's names and shapes to ours."""
    d, n, k, h, f = config.embed, config.q_heads, config.kv_heads, config.head_dim, config.ffn
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }  # fmt: skip
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    names |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    theirs = {
        "q": (n * h, d), "k": (k * h, d), "v": (k * h, d), "o": (d, n * h), "gate": (f, d), "up": (f, d),
        "down": (d, f), "attention_norm": (d,), "mlp_norm": (d,),
    }  # fmt: skip
    for layer in range(config.layers):
        shapes |= {f"model.layers.{layer}.{names[name]}.weight": shape for name, shape in theirs.items()}
    drawn = runpy.run_path(str(GOLDEN / "make_dpo_golden.py"))["weights"](seed, shapes)

    def stacked(name, *shape):
        return np.stack(
            [drawn[f"model.layers.{i}.{names[name]}.weight"].T.reshape(shape) for i in range(config.layers)]
        )

    return {
        "embed": drawn["model.embed_tokens.weight"],
        "head": drawn["lm_head.weight"].T,
        "final_norm": {"scale": drawn["model.norm.weight"]},
        "layers": {
            "attention": {
                "q": stacked("q", d, n, h), "k": stacked("k", d, k, h), "v": stacked("v", d, k, h),
                "o": stacked("o", n, h, d),
            },
            "mlp": {"gate": stacked("gate", d, f), "up": stacked("up", d, f), "down": stacked("down", f, d)},
            "attention_norm": {"scale": stacked("attention_norm", d)},
            "mlp_norm": {"scale": stacked("mlp_norm", d)},
        },
    }  # fmt: skip


def test_trl_gives_the_same_numbers(mesh, rows_apart):
    golden = json.loads((GOLDEN / "dpo.json").read_text())
    config, compute = from_hf(golden["config"]), llama.Compute()
    place = shardings(llama.logical_axes(config), mesh)
    policy, reference = (
        jax.device_put(golden_params(config, golden["seeds"][name]), place) for name in ("policy", "reference")
    )
    sides = ("chosen", "rejected")
    rows = [
        Row((*pair["prompt_ids"], *pair[f"{side}_ids"]), len(pair["prompt_ids"]))
        for pair in golden["pairs"]
        for side in sides
    ]
    placed = rows_apart(rows, 4, 128, mesh)
    for name, params in (("policy", policy), ("reference", reference)):
        sums = np.asarray(step.logprob_pass(config, compute, 32, params, placed).sum(-1))
        want = [pair["logps"][name][side] for pair in golden["pairs"] for side in sides]
        np.testing.assert_allclose(sums, want, rtol=2e-6, err_msg=name)
    pairs = [
        trainer.PairRow(rows[2 * i], rows[2 * i + 1], float(sums[2 * i]), float(sums[2 * i + 1]))
        for i in range(len(golden["pairs"]))
    ]
    plan = trainer.Plan(Optimizer(1e-6, 1e-6, 1), 1, 2, packing.Shape(160, 2, 1, True), 0, 0.0, 32, 0, 1)
    (part,) = packing.microbatches([pair.rows for pair in pairs], plan.shape)
    total, metrics = step.add_gradient(
        config, compute, partial(step.dpo_objective, beta=golden["beta"]), 32, 0.0, policy,
        (jax.tree.map(jnp.zeros_like, policy), jnp.float32(0)), trainer.collate_pairs(pairs, part, plan, mesh),
        jax.random.key(0),
    )  # fmt: skip
    mean = {name: float(value / weight) for name, (value, weight) in metrics.items()}
    assert mean["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    for side in sides:
        assert mean[f"reward_{side}"] == pytest.approx(golden["mean_rewards"][side], abs=2e-5)
        assert mean[f"logp_{side}"] == pytest.approx(golden["mean_logps"][side], rel=1e-6)
        lengths = [len(pair[f"{side}_ids"]) for pair in golden["pairs"]]
        assert mean[f"length_{side}"] == sum(lengths) / len(lengths)
    assert mean["accuracy"] == golden["accuracy"]
    squares = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(total[0]))
    assert math.sqrt(squares) / float(total[1]) == pytest.approx(golden["grad_norm"], rel=1e-5)
