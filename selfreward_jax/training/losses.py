"""The two losses, as pure functions of log-probs."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sft_loss(logps: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the target tokens (paper section 3.1.3: "only ... on target tokens").

    Args:
        logps: `[B,M]` float32 log-probs of the targets, nats.
        weights: `[B,M]` float32, 1 at targets (or their example's mixing weight) and 0 at padding.

    Returns:
        The weighted sum over targets and their weight; the mean is their quotient, taken once over a whole batch.
    """
    return -jnp.sum(logps * weights), jnp.sum(weights)


def dpo_loss(
    policy_chosen: jax.Array, policy_rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: `[B]` float32, log-probs of whole responses (summed
            over their tokens, end of turn included), nats.
        beta: strength of the pull to the reference (paper: 0.1).

    Returns:
        losses `[B]`, rewards of the chosen `[B]`, rewards of the rejected `[B]`; a reward is
        `beta * (policy - reference)`.
    """
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    return -jax.nn.log_sigmoid(chosen - rejected), chosen, rejected
