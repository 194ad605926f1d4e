"""LLM-as-a-Judge: requests from (instruction, response) pairs, scores from what the model generated."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from selfreward_jax.config import JudgeConfig
from selfreward_jax.data.chat import Chat, decode, encode_prompt
from selfreward_jax.data.records import Judgment
from selfreward_jax.judging.scores import read_score
from selfreward_jax.judging.templates import Template, render
from selfreward_jax.sampling import stopping
from selfreward_jax.sampling.engine import Completion, Request


def request(chat: Chat, template: Template, instruction: str, response: str, index: int, k: int) -> Request:
    """The request for K judgments of a response; `index` is its place in the whole stage, for the random keys."""
    ids = encode_prompt(chat, render(template, instruction, response))
    return Request(tuple(ids), tuple(range(index * k, (index + 1) * k)))


def stops(chat: Chat, config: JudgeConfig) -> stopping.Stops:
    """What ends a judgment that this judge writes."""
    # A tokenizer whose bytes are not known goes on to the end of the turn, which gives the same readings.
    early = config.stop == "score" and chat.token_bytes is not None
    return stopping.build(chat, rules=(stopping.score_rule(),) if early else ())


def judgments(
    chat: Chat, template: Template, prompt_id: str, response_index: int, completions: Sequence[Completion]
) -> list[Judgment]:
    """Records of a response's sampled judgments."""
    return [
        judgment(
            template, prompt_id, response_index, sample, _text(chat, completion), completion.ids,
            completion.finish_reason,
        )
        for sample, completion in enumerate(completions)
    ]  # fmt: skip


def _text(chat: Chat, completion: Completion) -> str:
    text = decode(chat, completion.ids)
    if completion.finish_reason == "stop" and completion.ids[-1] not in chat.stop_ids:
        text = text.rstrip()  # of the line feed that ended it: a judge that learns from it is not to write one
    return text


def judgment(
    template: Template,
    prompt_id: str,
    response_index: int,
    sample: int,
    text: str,
    token_ids: tuple[int, ...],
    finish_reason: str,
) -> Judgment:
    """One record; the score is read from generated text only, and no score is None with a reason."""
    read = read_score(text, template.low, template.high, finish_reason != "length")
    score = None if read.score is None else str(read.score)
    return Judgment(prompt_id, response_index, sample, text, token_ids, finish_reason, score, read.reason)


def stated_score(judgment: Judgment) -> Fraction | None:
    """The score that the judgment's text states, exact."""
    return None if judgment.score is None else Fraction(judgment.score)


def score_of(judgment: Judgment) -> Fraction | None:
    """The judgment's score, exact: the expected one where that was asked for, else the one it states."""
    return stated_score(judgment) if judgment.expected is None else Fraction(judgment.expected)
