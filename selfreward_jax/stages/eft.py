"""Judge training data (paper section 3.1.1, EFT seed data): from a file of examples, or built by the SFT baseline."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from selfreward_jax.data.records import Example, Judgment, RankedSet
from selfreward_jax.data.seeds import judge_rows
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation import judge
from selfreward_jax.judging import templates
from selfreward_jax.judging.agreement import Thinned, agrees, thin_most_common
from selfreward_jax.judging.scores import mean_score
from selfreward_jax.observe.progress import say
from selfreward_jax.run import (
    Run,
    engine,
    fits,
    judge_template,
    params_of,
    read_ours,
    sample_parts,
    sampling,
    write_records,
)
from selfreward_jax.sampling.engine import Completion


def from_file(run: Run) -> dict[str, Any]:
    """EFT from judge examples: the target is the justification, then the score line."""
    template = judge_template(run)
    rows = judge_rows(run.config.eft.file, template.low, template.high)
    train = [row for row in rows if row["split"] == "train"]
    rows = [row for row in train if template.low <= row["score"] <= template.high]
    outside = f"score outside {template.low} to {template.high}"  # a packaged 0 where the template begins at 1
    drops = {outside: len(train) - len(rows)} if len(train) > len(rows) else {}
    examples = [
        Example(
            str(row["id"]), templates.render(template, row["instruction"], row["response"]),
            f"{row['justification']}\nScore: {row['score']}", "judge examples",
        )
        for row in rows
    ]  # fmt: skip
    if not examples:
        raise UserError(f"--config.eft.file={run.config.eft.file}: no example with split 'train'")
    write_records(run.root / "m1" / "eft_train.jsonl", examples)
    scores = Counter(str(row["score"]) for row in rows)
    histogram = dict(sorted(scores.items()))
    say(f"[m1/eft] {len(examples)} judge examples; scores {histogram}; dropped {drops or 'none'}")
    return {"examples": len(examples), "scores": histogram, "drops": drops}


def build(run: Run) -> dict[str, Any]:
    """EFT from ranked replies: the SFT baseline judges each; a set whose scores agree with the humans is accepted.

    The paper does not say how many judgments a reply gets: `eft.k`, 1 by default. With more, scores are averaged and
    the target is the judgment nearest the mean, the lowest index on ties.

    Raises:
        UserError: with the yield table, if nothing was accepted.
    """
    config = run.config
    template = judge_template(run)
    sets = read_ours(run.root / "seed" / "eft_train_sets.jsonl", RankedSet)
    how = sampling(run, config.judge)
    items, requests, yields = [], [], Counter[str]()
    for ranked in sets:
        made = [
            judge.request(run.chat, template, ranked.prompt, reply, len(requests) + i, config.eft.k)
            for i, reply in enumerate(ranked.replies)
        ]
        if all(fits(run.source.config, request.ids, how.max_new_tokens) for request in made):
            items += [(ranked, index) for index in range(len(made))]
            requests += made
        else:
            yields["longer than the context"] += 1

    def record(first: int, completions: list[list[Completion]]) -> list[Judgment]:
        return [
            judgment
            for (ranked, reply), some in zip(items[first:], completions, strict=False)
            for judgment in judge.judgments(run.chat, template, ranked.id, reply, some)
        ]

    files = sample_parts(
        run, engine(run, params_of(run, "sft")), how, requests, "m1/eft", run.root / "m1" / "eft_judgments",
        "judgments", record,
    )  # fmt: skip
    by_reply: dict[tuple[str, int], list[Judgment]] = {}
    for file in files:
        for judgment in read_ours(file, Judgment):
            by_reply.setdefault((judgment.prompt_id, judgment.response_index), []).append(judgment)
    chosen: list[tuple[Example, Fraction]] = []
    before_filter: Counter[str] = Counter()
    for votes in by_reply.values():
        before_filter.update(vote.score or f"none: {vote.reason}" for vote in votes)
    for ranked in sets:
        votes = [by_reply.get((ranked.id, index), []) for index in range(len(ranked.replies))]
        if not all(votes):
            continue
        means = [mean_score([judge.score_of(vote) for vote in some]) for some in votes]
        ended = all(any(vote.score is not None and vote.finish_reason == "stop" for vote in some) for some in votes)
        if any(mean is None for mean in means):
            yields["no score for a reply"] += 1
        elif not ended:  # what was cut off would teach the judge not to end
            yields["no judgment of a reply ended"] += 1
        elif not agrees(means, ranked.ranks, config.eft.ties):
            yields["scores disagree with the human ranking"] += 1
        else:
            yields["accepted"] += 1
            for index, (some, mean) in enumerate(zip(votes, means, strict=True)):
                vote, score = _nearest(some, mean or Fraction(0))
                prompt = templates.render(template, ranked.prompt, ranked.replies[index])
                chosen.append((Example(f"{ranked.id}/{index}", prompt, vote.text, "built"), score))
    if not chosen:
        table = ", ".join(f"{reason}: {count}" for reason, count in sorted(yields.items()))
        raise UserError(
            f"m1/eft: none of {len(sets)} ranked sets gave judge examples ({table});"
            " use --config.eft.source=file, or more --config.eft.train_sets"
        )
    thinned = thin_most_common([score for _, score in chosen], config.eft.max_share, config.seed)
    examples = [chosen[index][0] for index in thinned.kept]
    if not examples:
        raise UserError(
            f"m1/eft: all {len(chosen)} accepted judgments have the same score ({thinned.before}), so thinning to"
            f" --config.eft.max_share={config.eft.max_share} leaves none; use --config.eft.source=file"
        )
    write_records(run.root / "m1" / "eft_train.jsonl", examples)
    say(_yield_report(len(sets), yields, before_filter, thinned))
    return {
        "examples": len(examples), "sets": dict(yields), "scores_judged": dict(sorted(before_filter.items())),
        **{
            name: {str(score): count for score, count in some.items()}
            for name, some in (("scores_before", thinned.before), ("scores", thinned.after))
        },
    }  # fmt: skip


def _yield_report(sets: int, yields: Counter[str], judged: Counter[str], thinned: Thinned) -> str:
    """What became of the ranked sets and of the scores: all judgments, those of accepted sets, those kept."""
    lines = [f"[m1/eft] of {sets} ranked sets"]
    lines += [f"  {count:>6}  {count / sets:>6.1%}  {reason}" for reason, count in yields.most_common()]
    lines.append("  score  judged  accepted  kept")
    names = sorted({*judged, *map(str, thinned.before)})
    for name in names:
        after = [{str(score): count for score, count in some.items()} for some in (thinned.before, thinned.after)]
        lines.append(f"  {name:<5}  {judged[name]:>6}  {after[0].get(name, 0):>8}  {after[1].get(name, 0):>4}")
    return "\n".join(lines)


def _nearest(votes: list[Judgment], mean: Fraction) -> tuple[Judgment, Fraction]:
    scored = [(vote, judge.score_of(vote)) for vote in votes]
    present = [(vote, score) for vote, score in scored if score is not None and vote.finish_reason == "stop"]
    return min(present, key=lambda pair: (abs(pair[1] - mean), pair[0].sample))


def none(run: Run) -> dict[str, Any]:
    """No judge data (paper A.3): M1 is trained on IFT only."""
    write_records(run.root / "m1" / "eft_train.jsonl", [])
    return {"examples": 0}


def make(run: Run) -> dict[str, Any]:
    """Writes `m1/eft_train.jsonl`."""
    return {"file": from_file, "build": build, "none": none}[run.config.eft.source](run)
