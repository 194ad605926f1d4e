"""The preference pair of a prompt (paper 2.3): the highest and the lowest scoring of its candidates.

Or the reason why there is none, one of `DROP_REASONS`:

    unscored          fewer than two candidates have a score
    equal_scores      all scores are the same ("discarding the pair if their scores are the same")
    no_finished_best  no candidate that ended by itself scores above the lowest
    identical_text    chosen and rejected are the same text

Two options, off by default, are not in the paper: the less disputed of equal scores, and Meta-Rewarding's length
control (Wu et al. 2024, section 2.1), which the paper's growing answers (1,092, 1,552, 2,552) ask for.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

DROP_REASONS = ("unscored", "equal_scores", "no_finished_best", "identical_text")
TIE_BREAKS = ("index", "variance")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A response and what its judges said; not `finished`: it hit the length limit.

    Attributes:
        scores: of the judgments that gave one; their mean is the candidate's value.
    """

    index: int
    scores: tuple[Fraction, ...]
    finished: bool
    token_ids: tuple[int, ...]
    text: str

    @property
    def mean(self) -> Fraction:
        """Exact, since the mean of three integers has no exact float and equal means must compare equal."""
        return sum(self.scores, Fraction(0)) / len(self.scores)

    @property
    def variance(self) -> Fraction:
        """Population variance of the scores: how far the judge's samples disagree."""
        return sum(((score - self.mean) ** 2 for score in self.scores), Fraction(0)) / len(self.scores)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What makes a pair.

    Attributes:
        min_judgments: a candidate with fewer judgments that gave a score takes no part; at least 1.
        tie_break: which of equal means is taken, "index" (the lowest) or "variance" (the least disputed).
        length_control: rho in [0, 1/2). Above 0 the chosen one is the shortest of those with a mean of at least
            (1 - rho) best + rho worst, and the rejected one the longest of those with at most (1 - rho) worst + rho
            best. Below 1/2 the two groups cannot meet.
    """

    min_judgments: int = 1
    tie_break: str = "index"
    length_control: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True)
class PairChoice:
    """The indices of the candidates to prefer and to reject."""

    chosen: int
    rejected: int


def choose_pair(candidates: Sequence[Candidate], rule: Rule = Rule()) -> PairChoice | str:
    """The pair, or one of `DROP_REASONS`.

    A candidate without a score takes no part. A response that was cut off is never chosen, since preferring
    it would teach the model not to end: the best one that ended stands in, if it scores above the lowest. A
    cut-off response can be rejected. Where the rule leaves several, the lowest index is taken, on both sides. Raises
    ValueError for two candidates of one index and for a rule out of its range.
    """
    if len({candidate.index for candidate in candidates}) != len(candidates):
        raise ValueError(f"candidate indices repeat: {[candidate.index for candidate in candidates]}")
    if rule.min_judgments < 1 or rule.tie_break not in TIE_BREAKS or not 0 <= rule.length_control < Fraction(1, 2):
        raise ValueError(f"{rule}: min_judgments at least 1, tie_break of {TIE_BREAKS}, length_control in [0, 1/2)")
    scored = [candidate for candidate in candidates if len(candidate.scores) >= rule.min_judgments]
    if len(scored) < 2:
        return "unscored"
    worst = min(candidate.mean for candidate in scored)
    if worst == max(candidate.mean for candidate in scored):
        return "equal_scores"
    able = [candidate for candidate in scored if candidate.finished and candidate.mean > worst]
    if not able:
        return "no_finished_best"
    best = max(candidate.mean for candidate in able)
    rho = rule.length_control
    high = [candidate for candidate in able if candidate.mean >= (1 - rho) * best + rho * worst]
    low = [candidate for candidate in scored if candidate.mean <= (1 - rho) * worst + rho * best]

    def preference(candidate: Candidate, sign: int) -> tuple[Fraction | int, ...]:
        length = sign * len(candidate.token_ids) if rho else 0
        disputed = candidate.variance if rule.tie_break == "variance" else 0
        return length, -sign * candidate.mean, disputed, candidate.index

    chosen = min(high, key=lambda candidate: preference(candidate, 1))
    rejected = min(low, key=lambda candidate: preference(candidate, -1))
    if chosen.token_ids == rejected.token_ids or chosen.text == rejected.text:
        return "identical_text"
    return PairChoice(chosen.index, rejected.index)
