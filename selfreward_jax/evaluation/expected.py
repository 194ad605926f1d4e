"""Expected scores: the digits that could stand where a judgment states its score, weighted by their probability.

Not in the paper, which averages K sampled scores (3.1.3). One sampled judgment tells which score was drawn; the
probabilities at that place tell all of them, given the same justification. It costs one more pass over each judgment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from selfreward_jax.data.batches import NOWHERE
from selfreward_jax.data.chat import Chat, decode
from selfreward_jax.data.records import Judgment
from selfreward_jax.judging.scores import read_score
from selfreward_jax.judging.templates import Template
from selfreward_jax.sampling.engine import Engine
from selfreward_jax.sharding.place import fetch, place
from selfreward_jax.training.logprobs import Batch
from selfreward_jax.training.step import logprob_pass


def score_place(chat: Chat, template: Template, judgment: Judgment) -> tuple[int, tuple[int, ...]] | None:
    """Where a judgment's score stands, and what could have stood there.

    It stands where another digit would be read as another score: no second rule of what a statement is.

    Returns:
        The index in `judgment.token_ids` of the token that holds the score's digit, and the ids of that token with
        each of the template's scores in the digit's place, lowest first. None if the judgment states no single digit
        (no score, 3.5, one score twice) or the tokenizer has no such tokens.
    """
    ids, finished = judgment.token_ids, judgment.finish_reason != "length"
    if judgment.score is None or not judgment.score.isdigit() or template.high > 9:
        return None
    other = template.low if int(judgment.score) != template.low else template.low + 1
    tokenizer: Any = chat.tokenizer
    for at in reversed(range(len(ids))):
        piece = str(tokenizer.convert_ids_to_tokens(ids[at]))
        if piece.count(judgment.score) != 1:
            continue
        pieces = [piece.replace(judgment.score, str(score)) for score in range(template.low, template.high + 1)]
        variants = tuple(tokenizer.convert_tokens_to_ids(pieces))
        if None in variants or tokenizer.convert_ids_to_tokens(variants) != pieces:
            continue  # a digit without such a token
        changed = decode(chat, (*ids[:at], variants[other - template.low], *ids[at + 1 :]))
        if read_score(changed, template.low, template.high, finished).score == other:
            return at, variants
    return None


def with_expected(
    model: Engine, chat: Chat, template: Template, judged: Sequence[tuple[tuple[int, ...], Judgment]], rows: int
) -> list[Judgment]:
    """Judgments with their `expected` score, where there is one.

    Args:
        model, chat: the judge that wrote the judgments, and its tokenizer.
        judged: (ids of the judge's prompt, the judgment).
        rows: rows of a batch, a multiple of the mesh's row shards; missing ones are padding.

    Returns:
        The judgments in their order. `expected` has six decimals: sum over scores s of s p(s), with p normalised over
        the template's scores.
    """
    if len(judged) > rows:
        parts = [judged[start : start + rows] for start in range(0, len(judged), rows)]
        made = [with_expected(model, chat, template, part, rows) for part in parts]
        return [judgment for part in made for judgment in part]
    placed = [score_place(chat, template, judgment) for _, judgment in judged]
    if not any(placed):
        return [judgment for _, judgment in judged]
    longest = max(len(ids) + found[0] for (ids, _), found in zip(judged, placed, strict=True) if found)
    count = template.high - template.low + 1
    tokens = np.zeros((rows, -(-longest // model.pad) * model.pad), np.int32)
    positions = np.full(tokens.shape, NOWHERE, np.int32)
    ends = np.broadcast_to(np.arange(1, tokens.shape[1] + 1, dtype=np.int32), tokens.shape).copy()
    at = np.zeros((rows, count), np.int32)
    targets = np.zeros((rows, count), np.int32)
    for index, ((ids, judgment), found) in enumerate(zip(judged, placed, strict=True)):
        if found:
            seen = (*ids, *judgment.token_ids[: found[0]])
            tokens[index, : len(seen)] = seen
            positions[index, : len(seen)] = np.arange(len(seen))
            ends[index, : len(seen)] = len(seen)
            at[index] = len(seen) - 1
            targets[index] = found[1]
    arrays = (tokens, positions, ends, at, targets, np.ones(at.shape, np.float32), np.zeros_like(at))
    with jax.set_mesh(model.mesh):
        batch = Batch(*(place(array, model.mesh, model.rules) for array in arrays))
        logps = fetch(logprob_pass(model.config, model.compute, count, model.params, batch), model.mesh)
    logps = logps.astype(np.float64)
    scores = np.arange(template.low, template.high + 1)
    out = []
    for (_, judgment), found, row in zip(judged, placed, logps, strict=False):
        weights = np.exp(row - row.max())
        expected = f"{float(scores @ weights / weights.sum()):.6f}" if found else None
        out.append(dataclasses.replace(judgment, expected=expected))
    return out
