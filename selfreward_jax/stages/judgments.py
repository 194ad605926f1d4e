"""Judgments (paper section 2.2, step 3): the model that wrote the responses scores each, K times."""

from __future__ import annotations

from collections import Counter
from typing import Any

from selfreward_jax import workdir
from selfreward_jax.data.records import Judgment, Prompt, Response, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation import judge
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, fits, judge_template, params_of, read_ours, read_parts, sample_parts, sampling
from selfreward_jax.sampling.engine import Completion


def make(run: Run, model: str, before: str) -> dict[str, Any]:
    """Writes `MODEL/judgments/part-*.jsonl`, sampled from `before`.

    Raises:
        UserError: if no response leaves room for a judgment.
    """
    config = run.config.judge
    template = judge_template(run)
    texts = {prompt.id: prompt.text for prompt in read_records(run.root / model / "prompts.jsonl", Prompt)}
    how = sampling(run, config)
    responses: list[Response] = read_parts(run.root / model / "responses", Response)
    items, requests, too_long = [], [], 0
    for response in responses:
        made = judge.request(run.chat, template, texts[response.prompt_id], response.text, len(items), config.k)
        if fits(run, made.ids, config.max_new_tokens):
            items.append(response)
            requests.append(made)
        else:
            too_long += 1
    if not requests:
        raise UserError(
            f"[{model}/judgments] no response leaves room for a judgment in the context of {run.source.config.context} tokens; lower --config.responses.max_new_tokens"
        )

    def record(index: int, completions: list[Completion]) -> list[Judgment]:
        return judge.judgments(run.chat, template, items[index].prompt_id, items[index].index, completions)

    files = sample_parts(
        run, params_of(run, before), how, requests, f"{model}/judgments", run.root / model / "judgments",
        "judgments", record,
    )  # fmt: skip
    judgments = [judgment for file in files for judgment in read_ours(file, Judgment)]
    scores = Counter(judgment.score for judgment in judgments if judgment.score is not None)
    parsed = sum(scores.values())
    histogram = dict(sorted(scores.items()))
    known = workdir.facts(run.root, f"{before}/check")
    worth = "not measured (--config.eft.eval_sets=0)"
    if "accuracy" in known:
        worth = f"{known['accuracy']:.1%} [{known['low']:.1%}, {known['high']:.1%}]"
    say(
        f"[{model}/judgments] {len(judgments)} judgments by {before.upper()}: {parsed / len(judgments):.1%} gave a score;"
        f" its held-out pairwise accuracy is {worth}; scores {histogram}"
    )
    return {
        "judgments": len(judgments), "parsed": parsed, "scores": histogram, "drops": {"longer than the context": too_long},
    }  # fmt: skip
