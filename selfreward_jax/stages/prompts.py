"""New prompts (paper section 2.2, step 1): 8-shot Self-Instruct by a model fixed in advance, or a file of prompts.

The run owns one pool; it grows in rounds, each filtered against all seeds and the pool, and each iteration takes its
own disjoint slice. With `prompts.model=current` (paper A.5) the model in training writes them, and each iteration has
a pool of its own. All requests of a round draw their demonstrations from the pool as of the round before, and
answers are accepted in the order of the requests: so a resume, or more processes, give the same prompts.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import of_model
from selfreward_jax.data.chat import Chat, decode, encode_opening, encode_prompt
from selfreward_jax.data.records import Example, Prompt, read_records
from selfreward_jax.data.seeds import evaluation_texts, packaged, prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import prompt_writer
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.run import Run, fits, read_ours, sampling, write_records
from selfreward_jax.sampling import engine as engines
from selfreward_jax.self_instruct import filters
from selfreward_jax.self_instruct.prompt import (
    build_request,
    pick_demonstrations,
    split_completion,
    split_completion_faithful,
)

# Reasons that count requests and whole completions, beside the written instructions.
NO_ITEMS = ("request_over_context", "completion_cut_off")
SOURCE = "self-instruct"  # of a prompt that a model wrote; others come from a file or top up from the seeds


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/prompts.jsonl`: the iteration's slice of the pool.

    Raises:
        UserError: if no prompt is left.
    """
    config = run.config.prompts
    wanted = of_model(run.config.aift.num_prompts, model)
    earlier = [
        prompt
        for t in range(2, int(model[1:]))
        for prompt in read_records(run.root / f"m{t}" / "prompts.jsonl", Prompt)
    ]
    used = {prompt.id for prompt in earlier}
    held_out = _held_out(run)
    drops: Counter[str] = Counter()
    facts: dict[str, Any] = {}
    if config.source != "self_instruct":
        given = [Prompt(key, text, "file") for key, text in prompt_texts(config.source, "") if key not in used]
        pool = _usable(run, given, held_out, drops)
    elif config.model == "current":
        pool, facts = _grow_pool(run, model, before, run.root / model / "pool", held_out, earlier, used, wanted)
    else:
        pool, facts = _grow_pool(run, model, before, run.root / "prompts", held_out, [], used, wanted)
    slice_ = [prompt for prompt in pool if prompt.id not in used][:wanted]
    if len(slice_) < wanted and config.top_up == "seed":
        rest = [
            Prompt(f"top-up-{e.id}", e.prompt, "top-up") for e in read_ours(run.root / "seed" / "rest.jsonl", Example)
        ]
        fresh = _usable(run, [prompt for prompt in rest if prompt.id not in used], held_out, drops)
        slice_ += fresh[: wanted - len(slice_)]
    if not slice_:
        raise UserError(
            f"[{model}/prompts] no prompt is left (dropped {dict(drops)}, {facts}); raise --config.prompts.max_rounds,"
            " give a file by --config.prompts.source, or set --config.prompts.top_up=seed"
        )
    write_records(run.root / model / "prompts.jsonl", slice_)
    sources = Counter(prompt.source for prompt in slice_)
    line = f"[{model}/prompts] {len(slice_)} of {wanted} prompts: {dict(sources)}; dropped {dict(drops) or 'none'}"
    if facts:
        line += f"; the pool: {facts['pool']} of {facts['written']} written, dropped {facts['filtered'] or 'none'}"
    say(line)
    return {"prompts": len(slice_), "sources": dict(sources), "drops": dict(drops), **facts}


def _usable(run: Run, prompts: Sequence[Prompt], held_out: filters.RougeIndex, drops: Counter[str]) -> list[Prompt]:
    """Prompts that fit and are near no evaluation prompt; the others are counted under a reason."""
    out = []
    for prompt in prompts:
        reason = "near_evaluation" if held_out.is_similar(prompt.text) else _too_long(run, prompt.text)
        if reason:
            drops[reason] += 1
        else:
            out.append(prompt)
    return out


def _too_long(run: Run, prompt: str) -> str:
    """Why a prompt has no room, or ""."""
    ids = encode_prompt(run.chat, prompt)
    if len(ids) > run.config.data.max_prompt_tokens:
        return f"over {run.config.data.max_prompt_tokens} tokens"
    return "" if fits(run.source.config, ids, run.config.responses.max_new_tokens) else "longer than the context"


def _held_out(run: Run) -> filters.RougeIndex:
    """Evaluation prompts, ours and those that `prompts.avoid` names: a new prompt must not be near one."""
    files = [str(packaged(f"{name}.jsonl")) for name in ("validation", "test")]
    files += [file for file in (run.config.data.validation, *run.config.prompts.avoid) if file]
    texts = [text for file in files for text in evaluation_texts(file)]
    return filters.RougeIndex(threshold=run.config.prompts.similarity, texts=texts)


def _grow_pool(
    run: Run,
    model: str,
    before: str,
    folder: epath.Path,
    held_out: filters.RougeIndex,
    earlier: Sequence[Prompt],
    used: set[str],
    wanted: int,
) -> tuple[list[Prompt], dict[str, Any]]:
    """Runs rounds until the pool has `wanted` prompts that are free or `max_rounds` are over; finished ones are read back.

    Args:
        folder: of the pool's rounds; what is in it can be used, and is near no evaluation prompt.
        earlier: prompts of other pools, to which new ones must not be similar.
        used: ids of prompts that earlier iterations took.
    """
    config = run.config.prompts
    seeds = [example.prompt for example in read_records(run.root / "seed" / "ift.jsonl", Example)]
    rest = [example.prompt for example in read_ours(run.root / "seed" / "rest.jsonl", Example)]
    known = [*seeds, *rest, *(prompt.text for prompt in earlier)]
    index = filters.RougeIndex(threshold=config.similarity, texts=known)
    normalise = filters.chat if config.normalise == "chat" else filters.faithful
    label = f"pool-{model}" if config.model == "current" else "pool"
    pool: list[Prompt] = []
    drops: Counter[str] = Counter()
    raw = 0

    def take(path: epath.Path, accepted: list[Prompt]) -> None:
        nonlocal raw
        counts = workdir.read_json(path.with_suffix(".json"))
        raw += counts["raw"]
        drops.update(counts["drops"])
        pool.extend(accepted)

    def free() -> int:
        return sum(prompt.id not in used for prompt in pool)

    paths = [folder / f"round-{number:05d}.jsonl" for number in range(config.max_rounds)]
    while free() < wanted and paths and workdir.exist(paths[:1])[0]:  # rounds of an earlier iteration or process
        path = paths.pop(0)
        take(path, _read_back(run, path, index, held_out, used, drops))
    writer: tuple[engines.Engine, Chat] | None = None
    with progress(f"{model}/prompts", wanted, "prompts", min(free(), wanted)) as advance:
        for number, path in enumerate(paths, start=config.max_rounds - len(paths)):
            there = free()
            if there >= wanted:
                break
            writer = writer or prompt_writer(run, before)
            texts, unread = _ask(run, *writer, label, number, seeds, [prompt.text for prompt in pool])
            # Before the filters, not after: what they accept is what the index holds, and what a resume reads back.
            reasons = [_too_long(run, normalise(text)) for text in texts]
            fitting = [text for text, reason in zip(texts, reasons, strict=True) if not reason]
            kept, dropped = filters.filter_batch(fitting, index, normalise, held_out)
            dropped.update(filter(None, reasons))
            accepted = [Prompt(f"{label}-{number:05d}-{i:03d}", text, SOURCE) for i, text in enumerate(kept)]
            written = len(texts) + sum(count for reason, count in unread.items() if reason not in NO_ITEMS)
            counts = {"raw": written, "drops": dict(dropped + unread)}
            workdir.write_text(path.with_suffix(".json"), json.dumps(counts))
            write_records(path, accepted)
            take(path, accepted)
            advance(min(free(), wanted) - there, f"round {number + 1}: {raw} written, dropped {dict(drops)}")
    return pool, {"pool": len(pool), "written": raw, "filtered": dict(drops)}


def _read_back(
    run: Run,
    path: epath.Path,
    index: filters.RougeIndex,
    held_out: filters.RougeIndex,
    used: set[str],
    drops: Counter[str],
) -> list[Prompt]:
    """A finished round's prompts, without those that today's filters refuse, which are counted.

    Evaluation prompts, seeds and limits may have changed since; if not, all pass. They join the index, and so does a
    refused one that an iteration has `used`: a new prompt must not be near it.
    """
    kept = []
    for prompt in read_ours(path, Prompt):
        reason = _too_long(run, prompt.text)
        reason = reason or ("near_evaluation" if held_out.is_similar(prompt.text) else "")
        reason = reason or ("similar" if index.is_similar(prompt.text) else "")
        if reason:
            drops[f"read_back_{reason}"] += 1
        else:
            kept.append(prompt)
        if not reason or prompt.id in used:
            index.add(prompt.text)
    return kept


def _ask(
    run: Run, model: engines.Engine, chat: Chat, label: str, number: int, seeds: Sequence[str], pool: Sequence[str]
) -> tuple[list[str], Counter[str]]:
    """One round of requests: raw instructions, as the model wrote them, and what gave none by reason."""
    config = run.config.prompts
    how = sampling(run, config)
    requests = []
    drops: Counter[str] = Counter()
    for i in range(config.requests):
        key = number * config.requests + i
        rng = random.Random(f"{run.config.seed}/{label}/{key}")
        shots = pick_demonstrations(seeds, pool, rng, config.seed_demonstrations, config.generated_demonstrations)
        ids = encode_opening(chat, build_request(shots))
        if fits(model.config, ids, how.max_new_tokens):
            requests.append(engines.Request(tuple(ids), (key,)))
        else:
            drops["request_over_context"] += 1
    texts: list[str] = []
    first = config.seed_demonstrations + config.generated_demonstrations + 1
    for _, completions, _ in engines.run(model, how, requests, run.config.seed, f"prompts/{label}"):
        for (completion,) in completions:
            written = decode(chat, completion.ids)
            if config.normalise == "faithful":
                # The original leaves 7 new tasks room: "16." ends a request that has 8 demonstrations.
                some, unread = split_completion_faithful(written, completion.finish_reason, first + 7)
            else:
                some, unread = split_completion(written, completion.finish_reason, first)
            texts += some
            drops += unread
    return texts, drops
