"""One update, in two jitted functions: add a microbatch's gradient, then apply the sum.

Gradients of sums are added and divided once by the summed weight, so accumulation gives the exact global mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.training import optimizer as optimizers
from selfreward_jax.training.logprobs import Batch, of_sequences, target_logprobs
from selfreward_jax.training.losses import dpo_loss, sft_loss

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (weighted sum, weight)


class PairBatch(NamedTuple):
    """A batch of P pairs: sequences 2i and 2i+1 of `rows` are the chosen and rejected response of pair i.

    Attributes:
        rows: packed rows.
        reference: `[2P]` float32, summed log-probs of the sequences under the frozen reference.
        weights: `[P]` float32, 0 for pairs that only fill the batch. Both are whole on every device.
    """

    rows: Batch
    reference: jax.Array
    weights: jax.Array


Objective = Callable[[Any, Callable[[Batch], jax.Array]], tuple[jax.Array, jax.Array, Metrics]]


def sft_objective(batch: Batch, logprobs: Callable[[Batch], jax.Array]) -> tuple[jax.Array, jax.Array, Metrics]:
    """SFT as (sum, weight, metrics); `logprobs` maps a batch to `[B,M]` log-probs."""
    total, weight = sft_loss(logprobs(batch), batch.weights)
    return total, weight, {"loss": (total, weight)}


def dpo_objective(
    batch: PairBatch, logprobs: Callable[[Batch], jax.Array], *, beta: float
) -> tuple[jax.Array, jax.Array, Metrics]:
    """DPO as (sum, weight, metrics) over the batch's pairs."""
    count = batch.reference.shape[0]
    policy = split_pairs(of_sequences(logprobs(batch.rows), batch.rows, count))
    reference = split_pairs(batch.reference)
    losses, chosen, rejected = dpo_loss(*policy, *reference, beta)
    lengths = split_pairs(of_sequences(jnp.ones_like(batch.rows.weights), batch.rows, count))
    weight = jnp.sum(batch.weights)

    def mean(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(values * batch.weights), weight

    total = jnp.sum(losses * batch.weights)
    metrics = {
        "loss": (total, weight),
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
        "margin": mean(chosen - rejected),
        # KL(reference || policy), nats a response, by its own samples: AIFT's responses are the reference's. That they are
        # the best and the worst of N biases it.
        "kl": mean(-(chosen + rejected) / (2 * beta)),
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "logp_chosen": mean(policy[0]),
        "logp_rejected": mean(policy[1]),
        "length_chosen": mean(lengths[0]),
        "length_rejected": mean(lengths[1]),
    }
    return total, weight, metrics


def split_pairs(sequences: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[2P]` interleaved to chosen and rejected `[P]`."""
    pairs = sequences.reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@partial(jax.jit, static_argnames=("config", "compute", "objective", "chunk", "dropout"), donate_argnames=("total",))
def add_gradient(
    config: LlamaConfig,
    compute: llama.Compute,
    objective: Objective,
    chunk: int,
    dropout: float,
    params: llama.Params,
    total: tuple[llama.Params, jax.Array],
    batch: Any,
    key: jax.Array,
) -> tuple[tuple[llama.Params, jax.Array], Metrics]:
    """Adds the gradient of the microbatch's summed loss.

    Args:
        total: (summed gradients like `params`, summed weight); donated.
        key: the dropout key of this microbatch.
    """

    def loss(params: llama.Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        drop = llama.Dropout(dropout, key) if dropout else None
        logprobs = partial(target_logprobs, config, compute, params, chunk=chunk, dropout=drop)
        summed, weight, metrics = objective(batch, logprobs)
        return summed, (weight, metrics)

    gradients, (weight, metrics) = jax.grad(loss, has_aux=True)(params)
    return (jax.tree.map(jnp.add, total[0], gradients), total[1] + weight), metrics


class State(NamedTuple):
    """What training goes on from, and a checkpoint holds."""

    params: llama.Params
    moments: optax.OptState
    norms: optimizers.Norms


@partial(jax.jit, static_argnames=("spec",), donate_argnames=("state", "total"))
def apply_gradient(
    spec: optimizers.Optimizer, state: State, total: tuple[llama.Params, jax.Array], key: jax.Array
) -> tuple[State, tuple[llama.Params, jax.Array], jax.Array, jax.Array]:
    """Divides the summed gradient by the summed weight and updates, unless the gradient is not finite or a spike.

    Args:
        key: of this update, for what is kept in bfloat16.

    Returns:
        the state, a zeroed `total` for the next update (in the donated buffers), the global norm of the gradient before
        clipping, and whether the update was left out: then the state is what it was.
    """
    gradients = jax.tree.map(lambda g: g / total[1], total[0])
    norm = optax.tree.norm(gradients)
    norms, bad = optimizers.watch(spec, state.norms, norm)
    after = optimizers.update(spec, state.params, state.moments, gradients, key)
    params, moments = jax.tree.map(lambda old, new: jnp.where(bad, old, new), (state.params, state.moments), after)
    return State(params, moments, norms), jax.tree.map(jnp.zeros_like, total), norm, bad


@partial(jax.jit, static_argnames=("spec",))
def first_state(spec: optimizers.Optimizer, params: llama.Params) -> tuple[optax.OptState, optimizers.Norms]:
    """What a `State` has beside the parameters before the first update."""
    return optimizers.init(spec, params), optimizers.no_norms()


@jax.jit
def no_gradient(params: llama.Params) -> tuple[llama.Params, jax.Array]:
    """A sum of gradients, float32 whatever the parameters are, and of weights, to which nothing was added yet."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params), jnp.float32(0)


@jax.jit
def largest(values: jax.Array) -> jax.Array:
    """Of values on all devices (`place.from_each`), on each of them."""
    return jnp.max(values)


@partial(jax.jit, static_argnames=("config", "compute", "chunk"))
def logprob_pass(
    config: LlamaConfig, compute: llama.Compute, chunk: int, params: llama.Params, batch: Batch
) -> jax.Array:
    """Log-probs `[B,M]` without dropout: the frozen reference."""
    return target_logprobs(config, compute, params, batch, chunk)


@partial(jax.jit, static_argnames=("config", "compute", "chunk"))
def sequence_pass(
    config: LlamaConfig, compute: llama.Compute, chunk: int, params: llama.Params, batch: PairBatch
) -> jax.Array:
    """Summed log-probs `[2P]` without dropout: a live reference, and the check before step 0."""
    logps = logprob_pass(config, compute, chunk, params, batch.rows)
    return of_sequences(logps, batch.rows, batch.reference.shape[0])
