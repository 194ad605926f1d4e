"""Operations by formula against a count of what the program multiplies, and peaks by the names of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from selfreward_jax.model import llama
from selfreward_jax.training import flops


@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_counts_the_matrices(tied, small, mesh, random_params):
    """XLA's own count of a forward pass over a long row, where norms and rotations are little, is a third of a step."""
    config = dataclasses.replace(small, embed=96, ffn=256, head_dim=24, vocab_size=512, layers=1, tied=tied)
    params, time = random_params(config, mesh), 128
    tokens = jnp.ones((1, time), jnp.int32)

    def forward(params):
        compute = llama.Compute(remat="none")
        hidden = llama.hidden_states(config, compute, params, tokens, jnp.arange(time)[None])
        return llama.logits(config, llama.head_weights(config, compute, params), hidden)

    counted = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    # The plain form multiplies all keys, also those that are masked.
    assert flops.step_operations(config, time, time * time, time) / 3 == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize(
    ("kind", "want"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_peaks_by_kind(kind, want):
    assert flops.peak(kind) == want
