"""The preference pair of a prompt (paper 2.3): the highest and the lowest scoring of its candidates.

Or the reason why there is none, one of `DROP_REASONS`:

    unscored          fewer than two candidates have a score
    equal_scores      all scores are the same ("discarding the pair if their scores are the same")
    no_finished_best  no candidate that ended by itself scores above the lowest
    identical_text    chosen and rejected are the same tokens
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

DROP_REASONS = ("unscored", "equal_scores", "no_finished_best", "identical_text")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A response and its mean score (None: no judgment gave one); not `finished`: it hit the length limit."""

    index: int
    score: Fraction | None
    finished: bool
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PairChoice:
    """The indices of the candidates to prefer and to reject."""

    chosen: int
    rejected: int


def choose_pair(candidates: Sequence[Candidate]) -> PairChoice | str:
    """The pair, or one of `DROP_REASONS`.

    A candidate without a score takes no part. A response that was cut off is never chosen, since preferring
    it would teach the model not to end: the best one that ended stands in, if it scores above the lowest. A
    cut-off response can be rejected. Among equal scores the lowest index is taken, on both sides. Raises
    ValueError for two candidates of one index.
    """
    if len({candidate.index for candidate in candidates}) != len(candidates):
        raise ValueError(f"candidate indices repeat: {[candidate.index for candidate in candidates]}")
    scored = [(candidate.score, candidate) for candidate in candidates if candidate.score is not None]
    if len(scored) < 2:
        return "unscored"
    worst, rejected = min(scored, key=lambda item: (item[0], item[1].index))
    if worst == max(score for score, _ in scored):
        return "equal_scores"
    able = [(score, candidate) for score, candidate in scored if candidate.finished and score > worst]
    if not able:
        return "no_finished_best"
    _, chosen = min(able, key=lambda item: (-item[0], item[1].index))
    if chosen.token_ids == rejected.token_ids:
        return "identical_text"
    return PairChoice(chosen.index, rejected.index)
