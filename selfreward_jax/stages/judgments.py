"""Judgments (paper section 2.2, step 3): the model that wrote the responses scores each, K times.

Or a judge fixed in advance (`judge.model`): another model, or an endpoint. That is the fixed-reward baseline of Xu et
al. (2023), whose reward model does not improve with the iterations.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from selfreward_jax import processes, workdir
from selfreward_jax.config import JudgeConfig
from selfreward_jax.data.chat import Chat
from selfreward_jax.data.records import Judgment, Prompt, Response, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation import expected, judge
from selfreward_jax.judging import endpoint as endpoints
from selfreward_jax.judging.scores import mean_score
from selfreward_jax.judging.templates import Template, render
from selfreward_jax.loaded import judge_model
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.run import Run, fits, judge_template, read_ours, read_parts, sample_parts, sampling, write_records
from selfreward_jax.sampling.engine import Completion, Engine, Request, padded

ENDPOINT_PART = 16  # responses that are judged between two writes: what a kill or a lost connection can cost


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/judgments/part-*.jsonl`, by `before` or by the fixed judge.

    Raises:
        UserError: if no response leaves room for a judgment.
    """
    config = run.config.judge
    template = judge_template(run)
    texts = {prompt.id: prompt.text for prompt in read_records(run.root / model / "prompts.jsonl", Prompt)}
    responses: list[Response] = read_parts(run.root / model / "responses", Response)
    folder = run.root / model / "judgments"
    if config.endpoint_model:
        name, files, facts = config.endpoint_model, *_asked(run, model, template, texts, responses)
    else:
        name = config.model or before.upper()
        files, facts = _sampled(
            run, *judge_model(run, before), f"{model}/judgments", folder, template, texts, responses
        )
    judgments = [judgment for file in files for judgment in read_ours(file, Judgment)]
    scores = Counter(judgment.score for judgment in judgments if judgment.score is not None)
    reasons = Counter(judgment.reason for judgment in judgments if judgment.reason is not None)
    parsed = sum(scores.values())
    histogram = dict(sorted(scores.items()))
    worth = _worth(run, before) if name == before.upper() else "fixed in advance"
    say(
        f"[{model}/judgments] {len(judgments)} judgments by {name} ({worth}): {parsed / len(judgments):.1%} gave a"
        f" score, {histogram}; no score for {dict(sorted(reasons.items())) or 'no reason'}"
    )
    if config.score == "expected":
        facts |= _agreement(judgments)
        say(f"[{model}/judgments] expected against sampled scores: {facts['expected']}")
    return {"judgments": len(judgments), "parsed": parsed, "scores": histogram, "unread": dict(reasons), **facts}


def _worth(run: Run, before: str) -> str:
    known = workdir.facts(run.root, f"{before}/check")
    if "accuracy" not in known:
        return "held-out pairwise accuracy not measured: --config.eft.eval_sets=0"
    return f"held-out pairwise accuracy of its sampled scores {known['accuracy']:.1%} [{known['low']:.1%}, {known['high']:.1%}]"


def _sampled(
    run: Run,
    model: Engine,
    chat: Chat,
    stage: str,
    folder: epath.Path,
    template: Template,
    texts: dict[str, str],
    responses: Sequence[Response],
) -> tuple[list[epath.Path], dict[str, Any]]:
    config = run.config.judge
    items: list[Response] = []
    requests: list[Request] = []
    for response in responses:
        made = judge.request(chat, template, texts[response.prompt_id], response.text, len(items), config.k)
        if fits(model.config, made.ids, config.max_new_tokens):
            items.append(response)
            requests.append(made)
    if not requests:
        raise UserError(
            f"[{stage}] no response leaves room for a judgment in the judge's context of {model.config.context}"
            " tokens; lower --config.responses.max_new_tokens"
        )

    def stated(first: int, completions: list[list[Completion]]) -> list[Judgment]:
        return [
            judgment
            for item, some in zip(items[first:], completions, strict=False)
            for judgment in judge.judgments(chat, template, item.prompt_id, item.index, some)
        ]

    rows = padded(model, max(1, model.rows // config.k))  # as many prompts as the slots hold

    def weighted(first: int, completions: list[list[Completion]]) -> list[Judgment]:
        judged = [(requests[first + i // config.k].ids, one) for i, one in enumerate(stated(first, completions))]
        return expected.with_expected(model, chat, template, judged, rows)

    to_records: Callable[..., list[Judgment]] = weighted if config.score == "expected" else stated
    files = sample_parts(
        run, model, sampling(run, config), requests, stage, folder, "judgments", to_records, judge.stops(chat, config)
    )
    return files, {"drops": {"longer than the context": len(responses) - len(items)}}


def _asked(
    run: Run, model: str, template: Template, texts: dict[str, str], responses: Sequence[Response]
) -> tuple[list[epath.Path], dict[str, Any]]:
    config = run.config.judge
    service = endpoints.open_endpoint(config.model, config.endpoint_model, per_minute=config.endpoint_per_minute)
    files = workdir.parts(run.root / model / "judgments", -(-len(responses) // ENDPOINT_PART))
    usage = endpoints.Usage()
    there = workdir.exist(files)
    done = sum(len(responses[i * ENDPOINT_PART :][:ENDPOINT_PART]) for i, exists in enumerate(there) if exists)
    with progress(f"{model}/judgments", len(responses) * config.k, "judgments", done * config.k) as advance:
        for part, file in enumerate(files):
            if there[part]:
                continue
            some = responses[part * ENDPOINT_PART :][:ENDPOINT_PART]
            prompts = [render(template, texts[response.prompt_id], response.text) for response in some]
            first = run.config.seed + part * ENDPOINT_PART * config.k
            answers, used = processes.together(partial(_ask, service, prompts, config, first))
            usage += endpoints.Usage(**used)
            write_records(file, [
                judge.judgment(template, response.prompt_id, response.index, k, text, (), finish_reason)
                for response, votes in zip(some, answers, strict=True)
                for k, (text, finish_reason) in enumerate(votes)
            ])  # fmt: skip
            advance(len(some) * config.k, f"{usage.prompt_tokens} + {usage.completion_tokens} tokens")
    cost = {"requests": usage.requests, "retries": usage.retries, "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens}  # fmt: skip
    return files, {"usage": cost}


def _ask(
    service: endpoints.Endpoint, prompts: Sequence[str], config: JudgeConfig, first_seed: int
) -> tuple[list[list[tuple[str, str]]], dict[str, int]]:
    """(text, finish reason) of each prompt's k answers, and what they cost: as JSON, for one process asks for all."""
    answers, used = endpoints.ask(
        service, prompts, config.k, config.temperature, config.top_p, config.max_new_tokens, first_seed
    )
    return [[(answer.text, answer.finish_reason) for answer in votes] for votes in answers], dataclasses.asdict(used)


def _agreement(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """How one judgment's expected score and its sampled score each predict the mean of the other samples' scores.

    Over candidates with at least two scores: Pearson's r and the mean distance. The candidate's own first sample is
    left out of the mean, so that neither is compared with itself.
    """
    votes: dict[tuple[str, int], list[Judgment]] = {}
    for judgment in judgments:
        if judgment.score is not None:
            votes.setdefault((judgment.prompt_id, judgment.response_index), []).append(judgment)
    rows = []
    for first, *others in votes.values():
        mean = mean_score([judge.stated_score(other) for other in others])
        if mean is not None and first.expected is not None:
            rows.append((float(first.expected), float(judge.stated_score(first) or 0), float(mean)))
    found: dict[str, Any] = {"candidates": len(rows)}
    if len(rows) > 2:
        one, sampled, mean = np.array(rows).T
        for name, values in (("expected", one), ("sampled", sampled)):
            if values.std() and mean.std():
                found[f"{name}_r"] = round(float(np.corrcoef(values, mean)[0, 1]), 4)
            found[f"{name}_distance"] = round(float(np.abs(values - mean).mean()), 4)
    return {"expected": found}
