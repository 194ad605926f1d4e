"""What benchmarks/generate.py asks of every side: prompts as token ids, how many completions, of how many tokens.

candidates     packaged prompts, 4 completions of each, all of exactly so many tokens
judging        the packaged judge prompt (paper Figure 2) over packaged prompts and answers, 3 completions of each,
               all of exactly so many tokens. Of each ranked set all replies stand as one answer, and the sets are
               taken whose judge prompts are nearest to 530 tokens: answers of the length that models write
sampling half  first turns of an OASST file, 4 answers that end when they end, 3 judgments of each answer
"""

import dataclasses
from collections.abc import Sequence

from selfreward_jax.data import oasst
from selfreward_jax.data.chat import Chat, decode, encode_prompt
from selfreward_jax.data.seeds import packaged, prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.evaluation import judge
from selfreward_jax.judging.templates import Template, load

CANDIDATES, JUDGMENTS = 4, 3  # paper 3.1.3
JUDGE_PROMPT = 530  # tokens


@dataclasses.dataclass(frozen=True)
class Work:
    """Completions to sample.

    Attributes:
        name: for people.
        prompts: token ids.
        samples: completions of each prompt.
        tokens: of a completion at most; exactly if `stop` is empty.
        stop: ids that end a completion.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    samples: int
    tokens: int
    stop: tuple[int, ...] = ()

    @property
    def completions(self) -> int:
        """How many there will be."""
        return len(self.prompts) * self.samples


def candidates(chat: Chat, count: int, tokens: int) -> Work:
    """Completions of the first packaged test prompts."""
    texts = prompt_texts("", "test.jsonl")
    if count > len(texts):
        raise UserError(f"{count} prompts are wanted; the packaged file has {len(texts)}")
    return Work(
        "candidates", tuple(tuple(encode_prompt(chat, text)) for _, text in texts[:count]), CANDIDATES, tokens
    )


def judging(chat: Chat, count: int, tokens: int) -> Work:
    """Judgments of packaged answers, in the order of the packaged file."""
    sets = oasst.load(packaged("trees.jsonl")).sets
    if count > len(sets):
        raise UserError(f"--judged={count}: the packaged file has {len(sets)} ranked sets")
    prompts = judge_prompts(chat, [(ranked.prompt, "\n\n".join(ranked.replies)) for ranked in sets])
    nearest = sorted(range(len(sets)), key=lambda place: abs(len(prompts[place]) - JUDGE_PROMPT))[:count]
    return Work("judging", tuple(prompts[place] for place in sorted(nearest)), JUDGMENTS, tokens)


def answering(chat: Chat, questions: Sequence[str], tokens: int) -> Work:
    """The sampling half's first stage: answers that end when they end."""
    prompts = tuple(tuple(encode_prompt(chat, text)) for text in questions)
    return Work("sampling half, answers", prompts, CANDIDATES, tokens, chat.stop_ids)


def judging_of(
    chat: Chat, questions: Sequence[str], answers: Sequence[Sequence[Sequence[int]]], tokens: int, context: int
) -> Work:
    """Its second stage: judgments of the answers that a side gave.

    Args:
        answers: token ids of each question's answers.
        context: longest sequence that the model takes, tokens.
    """
    pairs = [(text, decode(chat, ids)) for text, some in zip(questions, answers, strict=True) for ids in some]
    prompts = judge_prompts(chat, pairs)
    longest = max(map(len, prompts))
    if longest + tokens > context:
        raise UserError(f"a judge prompt has {longest} tokens: no room for {tokens} in the context of {context}")
    return Work("sampling half, judgments", prompts, JUDGMENTS, tokens, chat.stop_ids)


def questions(file: str, count: int, chat: Chat, room: int) -> list[str]:
    """The first prompts of an OASST file, by their ids, that are at most `room` tokens long.

    Raises:
        UserError: if the file does not read or has fewer.
    """
    found = oasst.load(file)
    texts = {item.id: item.prompt for item in (*found.examples, *found.sets)}
    fitting = [texts[key] for key in sorted(texts) if len(encode_prompt(chat, texts[key])) <= room]
    if len(fitting) < count:
        raise UserError(f"--oasst={file}: {len(fitting)} usable prompts of at most {room} tokens; lower --c_prompts")
    return fitting[:count]


def judge_prompts(chat: Chat, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, ...], ...]:
    """Judge prompts of (instruction, response) pairs."""
    template: Template = load("additive")
    return tuple(judge.request(chat, template, *pair, 0, JUDGMENTS).ids for pair in pairs)
