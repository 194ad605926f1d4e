"""Judge training data (paper section 3.1.1, EFT seed data): from a file of examples, or built by the SFT baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from selfreward_jax.data.records import Example, Judgment, RankedSet
from selfreward_jax.data.seeds import judge_rows
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation import judge
from selfreward_jax.judging import templates
from selfreward_jax.judging.agreement import Thinned, agrees, thin_most_common
from selfreward_jax.judging.scores import mean_score
from selfreward_jax.loaded import engine
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, fits, judge_template, read_ours, sample_parts, sampling, write_records
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
    the target is the judgment nearest the mean, the lowest index on ties. The targets must agree with the humans as
    the means do: what is learned is the score that a target states.

    Raises:
        UserError: with what became of the sets, if nothing was accepted.
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
        run, engine(run, "sft"), how, requests, "m1/eft", run.root / "m1" / "eft_judgments",
        "judgments", record, judge.stops(run.chat, config.judge),
    )  # fmt: skip
    by_reply: dict[tuple[str, int], list[Judgment]] = {}
    judged: Counter[str] = Counter()
    for file in files:
        for judgment in read_ours(file, Judgment):
            by_reply.setdefault((judgment.prompt_id, judgment.response_index), []).append(judgment)
            judged[judgment.score or f"none: {judgment.reason}"] += 1
    chosen: list[tuple[Example, Fraction]] = []
    for ranked in sets:
        votes = [by_reply.get((ranked.id, index), []) for index in range(len(ranked.replies))]
        if not all(votes):
            continue  # counted above
        fate, targets = _targets(votes, ranked.ranks, config.eft.ties)
        yields[fate] += 1
        for index, (vote, score) in enumerate(targets):
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
    write_records(run.root / "m1" / "eft_train.jsonl", examples)
    say(_yield_report(len(sets), yields, judged, thinned, config.eft.max_share))
    return {
        "examples": len(examples), "sets": dict(yields), "judgments": {"sampled": judged.total(), "parsed": _parsed(judged)},
        "scores_judged": dict(sorted(judged.items())),
        **{
            name: {str(score): count for score, count in some.items()}
            for name, some in (("scores_before", thinned.before), ("scores", thinned.after))
        },
    }  # fmt: skip


def _targets(
    votes: Sequence[Sequence[Judgment]], ranks: Sequence[int], ties: str
) -> tuple[str, list[tuple[Judgment, Fraction]]]:
    """What becomes of a ranked set, and, if it is accepted, for each reply the judgment to learn and its score.

    Args:
        votes: the judgments of each reply, at least one.
        ranks: the human rank of each reply.
    """
    means = [mean_score(map(judge.stated_score, some)) for some in votes]
    targets = [_nearest(some, mean) for some, mean in zip(votes, means, strict=True) if mean is not None]
    ended = [target for target in targets if target is not None]
    if len(targets) < len(votes):
        return "no score for a reply", []
    if len(ended) < len(votes):  # what was cut off would teach the judge not to end
        return "no judgment of a reply ended", []
    if not agrees(means, ranks, ties):
        return "scores disagree with the human ranking", []
    if not agrees([score for _, score in ended], ranks, ties):
        return "mean scores agree with the human ranking, those of the targets do not", []
    return "accepted", ended


def _nearest(votes: Sequence[Judgment], mean: Fraction) -> tuple[Judgment, Fraction] | None:
    """The judgment that ended and whose score is nearest the mean, with that score; None if none ended."""
    scored = [(vote, judge.stated_score(vote)) for vote in votes if vote.finish_reason == "stop"]
    present = [(vote, score) for vote, score in scored if score is not None]
    return min(present, key=lambda pair: (abs(pair[1] - mean), pair[0].sample), default=None)


def _parsed(judged: Counter[str]) -> int:
    return sum(count for name, count in judged.items() if not name.startswith("none: "))


def _yield_report(sets: int, yields: Counter[str], judged: Counter[str], thinned: Thinned, max_share: float) -> str:
    """What became of the ranked sets, of the judgments, and of the replies of accepted sets: each in its own unit."""
    lines = [f"[m1/eft] {sets} ranked sets"]
    lines += [f"  {count:>6}  {count / sets:>6.1%}  {reason}" for reason, count in yields.most_common()]
    parsed = _parsed(judged)
    lines.append(f"[m1/eft] {judged.total()} judgments, {parsed} with a score ({parsed / judged.total():.1%})")
    reasons = {name.removeprefix("none: "): count for name, count in judged.items() if name.startswith("none: ")}
    lines += [f"  {count:>6}  without: {reason}" for reason, count in sorted(reasons.items())]
    replies, kept = sum(thinned.before.values()), sum(thinned.after.values())
    lines.append(f"[m1/eft] {replies} judged replies of accepted sets, {kept} after thinning")
    lines.append("  score  accepted    kept")
    lines += [
        f"  {score!s:<5}  {count:>8}  {thinned.after.get(score, 0):>6}" for score, count in thinned.before.items()
    ]
    if thinned.share > max_share:
        lines.append(f"  the most common has {thinned.share:.1%}: it is not thinned below the next most common")
    return "\n".join(lines)


def none(run: Run) -> dict[str, Any]:
    """No judge data (paper A.3): M1 is trained on IFT only."""
    write_records(run.root / "m1" / "eft_train.jsonl", [])
    return {"examples": 0}


def make(run: Run) -> dict[str, Any]:
    """Writes `m1/eft_train.jsonl`."""
    return {"file": from_file, "build": build, "none": none}[run.config.eft.source](run)
