"""Positive examples instead of pairs (paper appendix A.4): answers with the best score join the seed data for SFT."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from selfreward_jax.data.records import Example
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, judged, write_records


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/positives.jsonl`: every distinct answer that ended and whose mean score is high enough.

    Raises:
        UserError: if there is none: how the means are distributed.
    """
    config = run.config.aift
    least = Fraction(str(config.positive_score))
    examples: list[Example] = []
    drops: Counter[str] = Counter()
    means: Counter[Fraction] = Counter()
    for prompt, responses, candidates in judged(run, model):
        texts: set[str] = set()
        for candidate in candidates:
            mean = candidate.mean if candidate.scores else None
            if mean is not None:
                means[mean] += 1
            if mean is None or len(candidate.scores) < config.min_judgments:
                drops["unscored"] += 1
            elif mean < least:
                drops[f"below {config.positive_score:g}"] += 1
            elif not candidate.finished:
                drops["unfinished"] += 1
            elif candidate.text in texts:
                drops["identical_text"] += 1
            else:
                texts.add(candidate.text)
                text = responses[candidate.index].text
                examples.append(Example(f"{prompt.id}/{candidate.index}", prompt.text, text, f"positive of {model}"))
    top = {str(mean): count for mean, count in sorted(means.items(), reverse=True)[:5]}
    if not examples:
        raise UserError(
            f"[{model}/positives] no answer has a mean score of {config.positive_score:g}: {dict(drops)}, highest means"
            f" {top}; lower --config.aift.positive_score, or raise --config.aift.num_prompts"
        )
    write_records(run.root / model / "positives.jsonl", examples)
    say(f"[{model}/positives] {len(examples)} positives; left out {dict(drops)}; highest means {top}")
    return {"positives": len(examples), "drops": dict(drops), "highest_means": top}
