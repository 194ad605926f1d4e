"""Answers to prompts by any model, outside a run: what `generate` calls."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from selfreward_jax.config import MeshConfig
from selfreward_jax.data.chat import decode, encode_prompt, load_chat
from selfreward_jax.launch import use_compilation_cache
from selfreward_jax.loaded import attention_form, generation_mesh, make_engine, products
from selfreward_jax.model import llama
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling import stopping
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.sharding.rules import GENERATION
from selfreward_jax.weights.source import load_params, open_source


def answer(arguments: argparse.Namespace, prompts: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Samples answers to (id, text) prompts; a prompt that leaves no room in the context is skipped and counted.

    Yields:
        {id, prompt, index, text, token_ids, logprobs, finish_reason}, `samples` a prompt.
    """
    use_compilation_cache("")
    source = open_source(arguments.model)
    chat = load_chat(source.tokenizer, arguments.chat_template, source.eos_ids)
    stops = stopping.build(chat, arguments.stop)
    how = Sampling(
        arguments.temperature, arguments.top_p, arguments.max_new_tokens, top_k=arguments.top_k, min_p=arguments.min_p
    )
    kept, requests = [], []
    for number, (key, text) in enumerate(prompts):
        ids = tuple(encode_prompt(chat, text))
        if len(ids) + how.max_new_tokens <= source.config.context:
            kept.append((key, text))
            first = number * arguments.samples
            requests.append(engines.Request(ids, tuple(range(first, first + arguments.samples))))
    if len(kept) < len(prompts):
        say(
            f"skipped {len(prompts) - len(kept)} of {len(prompts)} prompts: longer than the context of {source.config.context}"
        )
    if not requests:
        return
    mesh = generation_mesh(MeshConfig(), source, arguments.dtype, make_mesh(-1, 1, 1))
    params = load_params(source, mesh, arguments.dtype, GENERATION)
    compute = llama.Compute(
        arguments.dtype,
        remat="none",
        attention=attention_form("auto", source.config, arguments.dtype),
        layout="generation",
        products=products(),
    )
    rows = max(arguments.samples, min(arguments.rows, len(requests) * arguments.samples))
    unroll = source.config.layers if jax.default_backend() == "cpu" else 1
    engine = make_engine(source, chat, params, mesh, compute, unroll, rows, 4 * rows, pad=64)
    with progress("generate", len(requests) * arguments.samples, "answers") as advance:
        width = engines.per_part(engine, requests)
        for part, completions, _ in engines.run(
            engine,
            how,
            requests,
            arguments.seed,
            "generate",
            (),
            lambda count, cost: advance(count, str(cost)),
            stops,
        ):
            for place, some in enumerate(completions):
                key, text = kept[part * width + place]
                for index, one in enumerate(some):
                    yield {
                        "id": key, "prompt": text, "index": index, "text": decode(chat, one.ids, arguments.stop),
                        "token_ids": one.ids, "logprobs": one.logprobs, "finish_reason": one.finish_reason,
                    }  # fmt: skip
