"""Prefill and decode, jitted: prompts in, completions out, every shape fixed by the arguments' shapes."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from selfreward_jax.model import llama
from selfreward_jax.model.attention import NOWHERE, Keys, spec_of
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.sampling.tokens import Sampling, choose, request_keys
from selfreward_jax.sharding.rules import LAYOUTS


class Sampled(NamedTuple):
    """R completions of at most M tokens.

    Attributes:
        tokens: `[R,M]` int32; what follows a stop token is 0.
        logps: `[R,M]` float32, log-probs at temperature 1, nats.
        lengths: `[R]` int32, tokens of each completion, its stop token included.
        stopped: `[R]` bool, whether a stop token ended it (else the length limit did).
        steps: scalar int32, decode steps that ran.
        fallbacks: scalar int32, tokens that needed more than the window.
    """

    tokens: jax.Array
    logps: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    steps: jax.Array
    fallbacks: jax.Array


@partial(jax.jit, static_argnames=("config", "compute"))
def prefix_keys(config: LlamaConfig, compute: llama.Compute, params: llama.Params, tokens: jax.Array) -> Keys:
    """Keys `[L,1,S,K,H]` of a prefix `[1,S]` that all requests share; read once, never copied."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return llama.prefill(config, compute, params, tokens, positions)[1]


@partial(jax.jit, static_argnames=("config", "compute", "decode_compute", "sampling", "vocabulary"))
def sample(
    config: LlamaConfig,
    compute: llama.Compute,
    decode_compute: llama.Compute,
    sampling: Sampling,
    seed: int,
    phase: int,
    vocabulary: int,
    params: llama.Params,
    prompts: jax.Array,
    lengths: jax.Array,
    requests: jax.Array,
    prefix: tuple[Keys, ...],
    stop_ids: jax.Array,
) -> Sampled:
    """Samples n completions of each of P prompts: one prefill a prompt, shared by its n rows.

    Args:
        vocabulary: tokens from here on are padding rows of the head; they are never chosen.
        prompts: `[P,T]` int32, right padded, without the shared prefix.
        lengths: `[P]` int32; 0 marks a prompt that only fills the batch.
        requests: `[P,n]` int32, the identity of each completion, for its random key.
        prefix: () or one cache of a prefix that all prompts share.
        stop_ids: `[E]` int32.

    Returns:
        Completions of R = P x n rows, prompt by prompt.
    """
    rules = LAYOUTS[compute.layout][0]
    split = rules["rows"]
    count, time = prompts.shape
    samples = requests.shape[1]
    rows = count * samples
    start = prefix[0].positions.shape[1] if prefix else 0
    place = jnp.arange(time, dtype=jnp.int32)[None]
    positions = jnp.where(place < jnp.maximum(lengths, 1)[:, None], start + place, NOWHERE)
    hidden, prompt_keys = llama.prefill(config, compute, params, prompts, positions, prefix)
    row = jax.lax.broadcasted_iota(jnp.int32, (count,), 0, out_sharding=spec_of(lengths))
    last = hidden.at[row, jnp.maximum(lengths, 1) - 1].get(out_sharding=P(*spec_of(lengths), None))
    head = llama.head_weights(config, compute, params)

    def spread(x: jax.Array) -> jax.Array:  # [P,...] -> [R,...]
        wide = jnp.broadcast_to(
            x[:, None], (count, samples, *x.shape[1:]), out_sharding=P(split, None, *spec_of(x)[1:])
        )
        return wide.reshape(rows, *x.shape[1:], out_sharding=P(split, *spec_of(x)[1:]))

    def score(hidden: jax.Array) -> jax.Array:  # logits [.., V] gathered over `tensor`: choosing needs whole rows
        whole = jax.sharding.reshard(llama.logits(head, hidden), P(*spec_of(hidden)[:1], None))
        return (
            whole
            if vocabulary >= whole.shape[-1]
            else jnp.where(jnp.arange(whole.shape[-1]) < vocabulary, whole, -jnp.inf)
        )

    keys = request_keys(seed, phase, requests.reshape(rows, out_sharding=P(split)))
    caches = (*prefix, prompt_keys)
    own_shape = (config.layers, rows, sampling.max_new_tokens, config.kv_heads, config.head_dim)
    blank = jnp.zeros(own_shape, compute.dtype, out_sharding=P(None, split, None, rules["kv_heads"], None))
    nowhere = jnp.full((rows, sampling.max_new_tokens), NOWHERE, jnp.int32, out_sharding=P(split, None))
    ends = spread(start + lengths)
    idle = spread(lengths) == 0

    def record(state: dict[str, Any], at: jax.Array, logits: jax.Array) -> dict[str, Any]:
        """Chooses the token at place `at` for rows that are not done, and notes it."""
        live = ~state["done"]
        # Rows that are done go on as certainties: the full sort is not for their flat garbage.
        certain = jnp.arange(logits.shape[-1]) == 0
        logits = jnp.where(live[:, None] | certain, logits, -jnp.inf)
        token, logp, fell_back = choose(logits, keys, jnp.broadcast_to(at, (rows,), out_sharding=P(split)), sampling)
        token = jnp.where(live, token, 0)
        ended = live & jnp.any(token[:, None] == stop_ids[None], axis=-1)
        return state | {
            "token": token,
            "tokens": jax.lax.dynamic_update_slice(state["tokens"], token[:, None], (jnp.zeros_like(at), at)),
            "logps": jax.lax.dynamic_update_slice(
                state["logps"], jnp.where(live, logp, 0.0)[:, None], (jnp.zeros_like(at), at)
            ),
            "lengths": state["lengths"] + live,
            "stopped": state["stopped"] | ended,
            "done": state["done"] | ended,
            "fallbacks": state["fallbacks"] + jnp.sum(fell_back & live),
        }

    table = jnp.zeros((rows, sampling.max_new_tokens), out_sharding=P(split, None))
    flags = jnp.zeros((rows,), bool, out_sharding=P(split))
    state: dict[str, Any] = {
        "at": jnp.ones((), jnp.int32), "own": Keys(blank, blank, nowhere), "token": flags.astype(jnp.int32),
        "tokens": table.astype(jnp.int32), "logps": table, "lengths": flags.astype(jnp.int32),
        "stopped": flags, "done": idle, "fallbacks": jnp.zeros((), jnp.int32),
    }  # fmt: skip
    state = record(state, jnp.zeros((), jnp.int32), spread(score(last)))

    def go_on(state: dict[str, Any]) -> jax.Array:
        return (state["at"] < sampling.max_new_tokens) & ~jnp.all(state["done"])

    def step(state: dict[str, Any]) -> dict[str, Any]:
        at = state["at"]
        hidden, own = llama.decode_step(
            config, decode_compute, params, state["token"], ends + at - 1, caches, state["own"], at - 1
        )
        return record(state | {"own": own}, at, score(hidden)) | {"at": at + 1}

    with jax.named_scope("decode"):
        state = jax.lax.while_loop(go_on, step, state)
    return Sampled(
        state["tokens"], state["logps"], state["lengths"], state["stopped"], state["at"], state["fallbacks"]
    )
