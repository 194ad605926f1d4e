"""What is known of each model: judge accuracy on held-out ranked replies, and its answers to validation prompts."""

from __future__ import annotations

from typing import Any

from selfreward_jax import workdir
from selfreward_jax.data.chat import decode, encode_prompt
from selfreward_jax.data.records import Judgment, RankedSet, Response
from selfreward_jax.data.seeds import prompt_texts
from selfreward_jax.evaluation import judge
from selfreward_jax.judging.agreement import PairCounts, against_chance, interval, pairwise
from selfreward_jax.judging.scores import mean_score
from selfreward_jax.loaded import engine
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, fits, judge_template, read_ours, sample_parts, sampling
from selfreward_jax.sampling.engine import Completion, Request


def make(run: Run, model: str) -> dict[str, Any]:
    """Judges held-out ranked replies and answers validation prompts with `model`; writes under `MODEL/check/`."""
    facts = _answers(run, model) | _judge_accuracy(run, model)
    # The stage's output, also where there is nothing to measure: an object store has no empty folders.
    workdir.write_json(run.root / model / "check" / "measured.json", facts)
    return facts


def _answers(run: Run, model: str) -> dict[str, Any]:
    config = run.config
    chosen = prompt_texts(config.data.validation, "validation.jsonl")[: config.check.prompts]
    encoded = [(key, tuple(encode_prompt(run.chat, text))) for key, text in chosen]
    how = sampling(run, config.responses)
    kept = [(key, ids) for key, ids in encoded if fits(run.source.config, ids, how.max_new_tokens)]
    if not kept:
        return {}

    def record(first: int, completions: list[list[Completion]]) -> list[Response]:
        return [
            Response(key, 0, decode(run.chat, c.ids), c.ids, c.logprobs, c.finish_reason)
            for (key, _), (c,) in zip(kept[first:], completions, strict=False)
        ]

    requests = [Request(ids, (index,)) for index, (_, ids) in enumerate(kept)]
    files = sample_parts(
        run, engine(run, model), how, requests, f"{model}/answers", run.root / model / "check" / "answers",
        "answers", record,
    )  # fmt: skip
    answers = [answer for file in files for answer in read_ours(file, Response)]
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    length = sum(len(answer.token_ids) for answer in answers) / len(answers)
    scores = _own_scores(run, model, dict(chosen), answers)
    say(
        f"[{model}/check] {len(answers)} answers: {ended / len(answers):.1%} ended their turn, mean {length:.1f} tokens"
    )
    return {"answers": len(answers), "ended": ended, "mean_tokens": round(length, 2), **scores}


def _own_scores(run: Run, model: str, texts: dict[str, str], answers: list[Response]) -> dict[str, Any]:
    items = [(answer.prompt_id, 0, texts[answer.prompt_id], answer.text) for answer in answers]
    votes = _judge(run, model, "own", items)
    means = [mean_score([judge.score_of(vote) for vote in some]) for some in votes]
    scored = [mean for mean in means if mean is not None]
    return {"own_score": float(sum(scored) / len(scored)) if scored else None, "own_scored": len(scored)}


def _judge(run: Run, model: str, name: str, items: list[tuple[str, int, str, str]]) -> list[list[Judgment]]:
    """Judgments of (id, index, instruction, response) items, in their order; [] for what does not fit."""
    config = run.config
    template = judge_template(run)
    how = sampling(run, config.judge)
    kept, requests = [], []
    for place, (_, _, instruction, response) in enumerate(items):
        made = judge.request(run.chat, template, instruction, response, place, config.check.k)
        if fits(run.source.config, made.ids, how.max_new_tokens):
            kept.append(place)
            requests.append(made)

    def record(first: int, completions: list[list[Completion]]) -> list[Judgment]:
        return [
            judgment
            for (key, reply, _, _), some in zip((items[place] for place in kept[first:]), completions, strict=False)
            for judgment in judge.judgments(run.chat, template, key, reply, some)
        ]

    files = sample_parts(
        run, engine(run, model), how, requests, f"{model}/judge-{name}", run.root / model / "check" / name,
        "judgments", record, judge.stops(run.chat, config.judge),
    )  # fmt: skip
    out: list[list[Judgment]] = [[] for _ in items]
    where = {items[place][:2]: place for place in kept}
    for file in files:
        for judgment in read_ours(file, Judgment):
            out[where[judgment.prompt_id, judgment.response_index]].append(judgment)
    return out


def _judge_accuracy(run: Run, model: str) -> dict[str, Any]:
    """Pairwise accuracy on held-out ranked sets with a 95 % interval (bootstrap over sets), beside the parse rate."""
    sets = read_ours(run.root / "seed" / "eft_eval_sets.jsonl", RankedSet)
    if not sets:
        return {}
    items = [(ranked.id, i, ranked.prompt, reply) for ranked in sets for i, reply in enumerate(ranked.replies)]
    votes = dict(zip([item[:2] for item in items], _judge(run, model, "held-out", items), strict=True))
    counts = [
        pairwise(
            [mean_score([judge.score_of(vote) for vote in votes[ranked.id, i]]) for i in range(len(ranked.replies))],
            ranked.ranks,
        )
        for ranked in sets
    ]
    all_votes = [vote for some in votes.values() for vote in some]
    parsed = sum(vote.score is not None for vote in all_votes)
    total = sum(counts, start=PairCounts())
    low, high = interval(counts, run.config.seed)
    half, half_low, half_high = against_chance(counts, run.config.seed)
    accuracy = total.right / total.total
    verdict = "no better or worse than chance can be claimed" if half_low <= 0.5 <= half_high else "not chance"
    say(
        f"[{model}/check] judge: {parsed / max(1, len(all_votes)):.1%} of judgments gave a score; held-out pairwise"
        f" accuracy {accuracy:.1%} [{low:.1%}, {high:.1%}] of {total.total} pairs ({total.tied} tied, {total.missing}"
        f" without a score); with half a point for those {half:.1%} [{half_low:.1%}, {half_high:.1%}]: {verdict}"
    )
    return {
        "judgments": len(all_votes), "parsed": parsed, "pairs": total.total, "right": total.right, "tied": total.tied,
        "missing": total.missing, "accuracy": round(accuracy, 4), "low": round(low, 4), "high": round(high, 4),
        "half": round(half, 4), "half_low": round(half_low, 4), "half_high": round(half_high, 4),
    }  # fmt: skip
