"""New prompts (paper section 2.2, step 1): 8-shot Self-Instruct by a model fixed in advance, or a file of prompts.

The run owns one pool; it grows in rounds, each filtered against all seeds and the pool, and each iteration takes its
own disjoint slice.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from selfreward_jax import workdir
from selfreward_jax.data.chat import Chat, decode, encode_prompt, encode_text
from selfreward_jax.data.records import Example, Prompt, read_records
from selfreward_jax.data.seeds import prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.run import Run, fits, prompt_writer, read_ours, sampling, write_records
from selfreward_jax.sampling import engine as engines
from selfreward_jax.self_instruct import filters
from selfreward_jax.self_instruct.prompt import (
    build_request,
    cut_answers,
    pick_demonstrations,
    split_completion,
    split_completion_faithful,
)


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/prompts.jsonl`: the iteration's slice of the pool.

    Raises:
        UserError: if no prompt is left.
    """
    config = run.config.prompts
    earlier = int(model[1:]) - 2
    used = {
        prompt.id
        for t in range(2, 2 + earlier)
        for prompt in read_records(run.root / f"m{t}" / "prompts.jsonl", Prompt)
    }
    drops: Counter[str] = Counter()
    facts: dict[str, Any] = {}
    if config.source == "self_instruct":
        pool, facts = _grow_pool(run, f"{model}/prompts", len(used) + config.per_iteration)
    else:
        pool = [Prompt(key, text, "file") for key, text in prompt_texts(config.source, "")]
    slice_ = _usable(run, [prompt for prompt in pool if prompt.id not in used], drops)[: config.per_iteration]
    if len(slice_) < config.per_iteration and config.top_up == "seed":
        rest = [
            Prompt(f"top-up-{e.id}", e.prompt, "top-up") for e in read_ours(run.root / "seed" / "rest.jsonl", Example)
        ]
        fresh = _usable(run, [prompt for prompt in rest if prompt.id not in used], drops)
        slice_ += fresh[: config.per_iteration - len(slice_)]
    if not slice_:
        raise UserError(
            f"[{model}/prompts] no prompt is left (dropped {dict(drops)}, {facts}); raise --config.prompts.max_rounds,"
            " give a file by --config.prompts.source, or set --config.prompts.top_up=seed"
        )
    write_records(run.root / model / "prompts.jsonl", slice_)
    sources = Counter(prompt.source for prompt in slice_)
    say(
        f"[{model}/prompts] {len(slice_)} of {config.per_iteration} prompts: {dict(sources)}; dropped {dict(drops) or 'none'}"
    )
    return {"prompts": len(slice_), "sources": dict(sources), "drops": dict(drops), **facts}


def _usable(run: Run, prompts: Sequence[Prompt], drops: Counter[str]) -> list[Prompt]:
    """Prompts that fit: longer than the limit or the context are skipped and counted."""
    out = []
    for prompt in prompts:
        ids = encode_prompt(run.chat, prompt.text)
        if len(ids) > run.config.data.max_prompt_tokens:
            drops[f"over {run.config.data.max_prompt_tokens} tokens"] += 1
        elif not fits(run, ids, run.config.responses.max_new_tokens):
            drops["longer than the context"] += 1
        else:
            out.append(prompt)
    return out


def _grow_pool(run: Run, stage: str, wanted: int) -> tuple[list[Prompt], dict[str, Any]]:
    """Runs rounds until the pool has `wanted` prompts or `max_rounds` are over; finished rounds are read back."""
    config = run.config.prompts
    folder = run.root / "prompts"
    seeds = [example.prompt for example in read_records(run.root / "seed" / "ift.jsonl", Example)]
    held_out = [text for name in ("validation", "test") for _, text in prompt_texts("", f"{name}.jsonl")]
    rest = [example.prompt for example in read_ours(run.root / "seed" / "rest.jsonl", Example)]
    index = filters.RougeIndex(threshold=config.similarity)
    for text in [*seeds, *held_out, *rest]:  # held-out prompts too: a new prompt must not leak a test
        index.add(text)
    normalise = filters.chat if config.normalise == "chat" else filters.faithful
    pool: list[Prompt] = []
    drops: Counter[str] = Counter()
    writer: tuple[engines.Engine, Chat] | None = None
    raw = 0
    with progress(stage, wanted, "prompts") as advance:
        for number in range(config.max_rounds):
            if len(pool) >= wanted:
                break
            path = folder / f"round-{number:05d}.jsonl"
            if path.exists():
                accepted = read_ours(path, Prompt)
                for prompt in accepted:
                    index.add(prompt.text)
            else:
                writer = writer or prompt_writer(run)
                texts = _ask(run, *writer, number, seeds, [prompt.text for prompt in pool])
                kept, dropped = filters.filter_batch(texts, index, normalise)
                accepted = [
                    Prompt(f"pool-{number:05d}-{i:03d}", text, "self-instruct") for i, text in enumerate(kept)
                ]
                workdir.write_text(path.with_suffix(".json"), json.dumps({"raw": len(texts), "drops": dict(dropped)}))
                write_records(path, accepted)
            counts = workdir.read_json(path.with_suffix(".json"))
            raw += counts["raw"]
            drops.update(counts["drops"])
            pool += accepted
            advance(min(len(accepted), wanted), f"round {number + 1}: {raw} written, dropped {dict(drops)}")
    return pool, {"pool": len(pool), "written": raw, "filtered": dict(drops)}


def _ask(
    run: Run, model: engines.Engine, chat: Chat, number: int, seeds: Sequence[str], pool: Sequence[str]
) -> list[str]:
    """One round of requests: raw instructions, as the model wrote them."""
    config = run.config.prompts
    how = sampling(run, config)
    requests = []
    for i in range(config.requests):
        key = number * config.requests + i
        rng = random.Random(f"{run.config.seed}/{key}")
        shots = pick_demonstrations(seeds, pool, rng, config.seed_demonstrations, config.generated_demonstrations)
        ids = encode_text(chat, build_request(shots))
        if len(ids) + how.max_new_tokens <= model.config.context:
            requests.append(engines.Request(tuple(ids), (key,)))
    texts: list[str] = []
    first = config.seed_demonstrations + config.generated_demonstrations + 1
    for _, completions, _ in engines.run(model, how, requests, run.config.seed, "prompts"):
        for (completion,) in completions:
            written = decode(chat, completion.ids)
            if config.normalise == "faithful":
                texts += split_completion_faithful(cut_answers(written), completion.finish_reason)
            else:
                texts += split_completion(written, completion.finish_reason, first)
    return texts
