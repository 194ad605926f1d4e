"""Preference pairs (paper section 2.3): the best and the worst of N by mean score; equal scores are discarded."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from selfreward_jax.data.records import Judgment, Pair, Prompt, Response, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation.judge import score_of
from selfreward_jax.judging.pairs import Candidate, choose_pair
from selfreward_jax.judging.scores import mean_score
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, pair_rows, read_parts, write_records


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/pairs.jsonl` with the sampled token ids.

    Raises:
        UserError: if no pair is left: why, with counts.
    """
    prompts = read_records(run.root / model / "prompts.jsonl", Prompt)
    responses: dict[str, list[Response]] = {}
    for response in read_parts(run.root / model / "responses", Response):
        responses.setdefault(response.prompt_id, []).append(response)
    votes: dict[tuple[str, int], list[Fraction | None]] = {}
    for judgment in read_parts(run.root / model / "judgments", Judgment):
        votes.setdefault((judgment.prompt_id, judgment.response_index), []).append(score_of(judgment))
    pairs: list[Pair] = []
    drops: Counter[str] = Counter()
    means: list[Fraction] = []
    for prompt in prompts:
        by_index = {response.index: response for response in responses.get(prompt.id, [])}
        candidates = [
            Candidate(i, mean_score(votes.get((prompt.id, i), [])), r.finish_reason == "stop", r.token_ids)
            for i, r in sorted(by_index.items())
        ]
        means += [candidate.score for candidate in candidates if candidate.score is not None]
        choice = choose_pair(candidates)
        if isinstance(choice, str):
            drops[choice] += 1
            continue
        best, worst = by_index[choice.chosen], by_index[choice.rejected]
        score = {candidate.index: str(candidate.score) for candidate in candidates}
        pair = Pair(
            prompt.id, prompt.text, best.index, worst.index, best.text, worst.text, best.token_ids, worst.token_ids,
            score[best.index], score[worst.index],
        )  # fmt: skip
        if max(len(row.tokens) for row in pair_rows(run, pair)) > run.config.data.max_length:
            drops[f"over {run.config.data.max_length} tokens"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(
            f"[{model}/pairs] no pair is left of {len(prompts)} prompts: {dict(drops)}; judgments with a score:"
            f" {sum(vote is not None for some in votes.values() for vote in some)} of {sum(map(len, votes.values()))};"
            " a judge that cannot score needs more EFT (--config.sft.epochs), one that scores all alike more candidates"
        )
    write_records(run.root / model / "pairs.jsonl", pairs)
    mean = float(sum(means) / len(means)) if means else None
    say(
        f"[{model}/pairs] {len(pairs)} pairs of {len(prompts)} prompts; dropped {dict(drops) or 'none'}; mean score {mean if mean is None else round(mean, 3)}"
    )
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return {
        "pairs": len(pairs), "prompts": len(prompts), "drops": dict(drops), "mean_score": mean,
        "chosen_tokens": round(sum(c for c, _ in lengths) / len(pairs), 2),
        "rejected_tokens": round(sum(r for _, r in lengths) / len(pairs), 2),
    }  # fmt: skip
