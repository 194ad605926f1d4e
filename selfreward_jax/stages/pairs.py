"""Preference pairs (paper section 2.3): the best and the worst of N by mean score; equal scores are discarded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from fractions import Fraction
from typing import Any

from selfreward_jax.config import of_model
from selfreward_jax.data.records import Pair
from selfreward_jax.errors import UserError
from selfreward_jax.judging.pairs import Rule, choose_pair
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, judged, pair_rows, write_records


@dataclasses.dataclass(frozen=True)
class _Preference:
    """A pair as other trainers read it: these fields and no more."""

    prompt: str
    chosen: str
    rejected: str


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/pairs.jsonl` with the sampled ids, and `MODEL/preferences.jsonl`: prompt, chosen, rejected.

    Raises:
        UserError: if no pair is left: why, with counts.
    """
    config = run.config.aift
    rule = Rule(config.min_judgments, config.tie_break, Fraction(str(of_model(config.length_control, model))))
    most = of_model(config.max_pairs, model)
    pairs: list[Pair] = []
    drops: Counter[str] = Counter()
    means: list[Fraction] = []
    prompts = scores = answers = 0
    for prompt, responses, candidates in judged(run, model):
        prompts += 1
        answers += len(candidates)
        scores += sum(len(candidate.scores) for candidate in candidates)
        means += [candidate.mean for candidate in candidates if candidate.scores]
        choice = choose_pair(candidates, rule)
        if isinstance(choice, str):
            drops[choice] += 1
            continue
        best, worst = responses[choice.chosen], responses[choice.rejected]
        mean = {candidate.index: str(candidate.mean) for candidate in candidates if candidate.scores}
        pair = Pair(
            prompt.id, prompt.text, best.index, worst.index, best.text, worst.text, best.token_ids, worst.token_ids,
            mean[best.index], mean[worst.index],
        )  # fmt: skip
        if max(len(row.tokens) for row in pair_rows(run, pair)) > run.config.data.max_length:
            drops[f"over {run.config.data.max_length} tokens"] += 1
        elif most and len(pairs) == most:
            drops[f"beyond the {most} of aift.max_pairs"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(
            f"[{model}/pairs] no pair is left of {prompts} prompts: {dict(drops)}; {answers} candidates have {scores}"
            " judgments with a score; a judge that cannot score needs more EFT (--config.sft.epochs), one that scores all alike more candidates"
        )
    write_records(run.root / model / "pairs.jsonl", pairs)
    rows = [_Preference(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    write_records(run.root / model / "preferences.jsonl", rows)
    mean_score = float(sum(means) / len(means))
    say(
        f"[{model}/pairs] {len(pairs)} pairs of {prompts} prompts; dropped {dict(drops) or 'none'};"
        f" mean score {mean_score:.3f}"
    )
    return {
        "pairs": len(pairs), "prompts": prompts, "drops": dict(drops), "mean_score": mean_score,
        "chosen_tokens": round(sum(len(pair.chosen_ids) for pair in pairs) / len(pairs), 2),
        "rejected_tokens": round(sum(len(pair.rejected_ids) for pair in pairs) / len(pairs), 2),
    }  # fmt: skip
