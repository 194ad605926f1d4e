"""LLM-as-a-Judge: requests from (instruction, response) pairs, scores from what the model generated."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from selfreward_jax.data.chat import Chat, decode, encode_prompt
from selfreward_jax.data.records import Judgment
from selfreward_jax.judging.scores import parse_score
from selfreward_jax.judging.templates import Template, render
from selfreward_jax.sampling.engine import Completion, Request


def request(chat: Chat, template: Template, instruction: str, response: str, index: int, k: int) -> Request:
    """The request for K judgments of a response; `index` is its place in the whole stage, for the random keys."""
    ids = encode_prompt(chat, render(template, instruction, response))
    return Request(tuple(ids), tuple(range(index * k, (index + 1) * k)))


def judgments(
    chat: Chat, template: Template, prompt_id: str, response_index: int, completions: Sequence[Completion]
) -> list[Judgment]:
    """Records of a response's judgments; a score is read from generated tokens only, no score is None."""
    out = []
    for sample, completion in enumerate(completions):
        text = decode(chat, completion.ids)
        score = parse_score(text, template.low, template.high)
        out.append(
            Judgment(
                prompt_id, response_index, sample, text, completion.ids, completion.finish_reason,
                None if score is None else str(score),
            )
        )  # fmt: skip
    return out


def score_of(judgment: Judgment) -> Fraction | None:
    """The judgment's score, exact."""
    return None if judgment.score is None else Fraction(judgment.score)
