"""Candidate responses (paper section 2.2, step 2): N samples of each new prompt from the model before."""

from __future__ import annotations

from typing import Any

from selfreward_jax.data.chat import decode, encode_prompt
from selfreward_jax.data.records import Prompt, Response, read_records
from selfreward_jax.loaded import engine
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, read_ours, sample_parts, sampling
from selfreward_jax.sampling.engine import Completion, Request


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/responses/part-*.jsonl`, sampled from `before`."""
    config = run.config.responses
    prompts = read_records(run.root / model / "prompts.jsonl", Prompt)
    requests = [
        Request(tuple(encode_prompt(run.chat, prompt.text)), tuple(range(i * config.n, (i + 1) * config.n)))
        for i, prompt in enumerate(prompts)
    ]

    def record(first: int, completions: list[list[Completion]]) -> list[Response]:
        return [
            Response(prompts[first + i].id, n, decode(run.chat, c.ids), c.ids, c.logprobs, c.finish_reason)
            for i, some in enumerate(completions)
            for n, c in enumerate(some)
        ]

    files = sample_parts(
        run, engine(run, before), sampling(run, config), requests, f"{model}/responses",
        run.root / model / "responses", "responses", record,
    )  # fmt: skip
    responses = [response for file in files for response in read_ours(file, Response)]
    ended = sum(response.finish_reason == "stop" for response in responses)
    length = sum(len(response.token_ids) for response in responses) / len(responses)
    say(
        f"[{model}/responses] {len(responses)} responses by {before.upper()}: {ended / len(responses):.1%} ended their turn, mean {length:.1f} tokens"
    )
    return {"responses": len(responses), "ended": ended, "mean_tokens": round(length, 2)}
