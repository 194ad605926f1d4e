"""Answers to prompts by any model, outside a run: what `generate` calls."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from selfreward_jax.data.chat import decode, encode_prompt, load_chat
from selfreward_jax.launch import use_compilation_cache
from selfreward_jax.loaded import open_engine
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling import stopping
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.weights.source import open_source


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
    rows = max(arguments.samples, min(arguments.rows, len(requests) * arguments.samples))
    engine = open_engine(source, chat, arguments.dtype, rows, 4 * rows, pad=64)
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
