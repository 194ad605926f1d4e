"""People's own data in the field's common layouts: rows for IFT (paper 2.1) and preferences for DPO (paper 2.3).

`EXAMPLES` and `PREFERENCES` list the layouts. The first row of a file or data set decides which one it is. Every row
becomes messages, and of these the first turn is used, as the paper takes "first conversational turns" (3.1.1): a
user's message and the assistant's answer. A system message before them opens the prompt, with a blank line below it.
Content in parts is the parts' text, joined. Alpaca's input stands below its instruction, a blank line between them.

What is left out is counted, a row once:

    no_turn            no message of the user, or none of the assistant (an empty list is such a one)
    wrong_order        the first messages after the system's are not the user's and the assistant's; a role that is
                       none of these three is out of order too
    not_text           one of these messages has an image or another part that is no text
    empty              the question or the answer has no text
    later_turn         a preference about more than the first answer
    different_prompts  chosen and rejected (or a prompt beside them) do not ask the same
    identical          chosen and rejected are one text, but for white space around it

`later_turn` of examples counts messages, not rows: those behind the first turn of the rows that are used.

Ids are the rows' own ("id", "prompt_id"), else the file's name and the row's number. Public data repeats ids for
different rows, so a repeated one gets the number of its row.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from selfreward_jax.data.records import Example, Preference
from selfreward_jax.data.rows import Problems, Rows, describe, raise_problems
from selfreward_jax.data.seeds import rows_of
from selfreward_jax.errors import UserError

Row = Mapping[str, Any]
T = TypeVar("T", bound="Turn | tuple[Turn, Turn]")

# OpenAI's names of roles and ShareGPT's.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Message:
    """`role` is "system", "user", "assistant" or what the row says; `text` is None where a part is no text."""

    role: str
    text: str | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of example rows: the fields that tell it, what an error says of it, and how a row becomes messages."""

    fields: tuple[str, ...]
    about: str
    messages: Callable[[Row], list[Message]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A first turn, and how many messages come after it."""

    prompt: str
    response: str
    later: int


def read_examples(name: str, option: str) -> tuple[list[Example], Counter[str]]:
    """IFT examples of a file or a hub data set, in its order, and what was left out by reason.

    Args:
        name: a file (jsonl, JSON list, parquet; plain or gzip), "owner/name" or "owner/name:split".
        option: the option that named it, as errors spell it.

    Raises:
        UserError: for what cannot be read, an unknown layout (the known ones are listed), one line for each row with
            wrong fields or types (the first ten, then a count), and a file of which nothing is left.
    """
    rows = rows_of(name, option)
    layout = next((layout for layout in EXAMPLES if rows[0][1].keys() >= set(layout.fields)), None)
    if layout is None:
        raise _unknown(name, rows, [layout.about for layout in EXAMPLES])
    kept, drops = _kept(name, rows, layout.fields, lambda row: first_turn(layout.messages(row)))
    drops["later_turn"] += sum(turn.later for _, _, turn in kept)
    examples = []
    for id, row, turn in kept:
        source = row.get("source")
        examples.append(Example(id, turn.prompt, turn.response, source if isinstance(source, str) else _stem(name)))
    return examples, +drops  # without the zeros


def read_preferences(name: str, option: str) -> tuple[list[Preference], Counter[str]]:
    """Preferences of a file or a hub data set; arguments, order, counts and errors as of `read_examples`.

    A preference is about the first answer alone: a row whose conversation goes on is left out as "later_turn".
    """
    rows = rows_of(name, option)
    fields = ("chosen", "rejected")
    if not rows[0][1].keys() >= set(fields):
        raise _unknown(name, rows, PREFERENCES)
    kept, drops = _kept(name, rows, fields, _choice)
    return [Preference(id, good.prompt, good.response, poor.response) for id, _, (good, poor) in kept], drops


def first_turn(messages: Sequence[Message]) -> Turn | str:
    """The first turn of a conversation, or why there is none (a reason of the module's docstring)."""
    system = messages[:1] if messages and messages[0].role == "system" else []
    turns = messages[len(system) :]
    roles = [message.role for message in turns]
    if not {"user", "assistant"} <= set(roles):
        return "no_turn"
    if roles[:2] != ["user", "assistant"]:
        return "wrong_order"
    opening = system[0].text if system else ""
    prompt, response = turns[0].text, turns[1].text
    if opening is None or prompt is None or response is None:
        return "not_text"
    if not prompt.strip() or not response.strip():
        return "empty"
    return Turn(_below(opening, prompt), response, len(turns) - 2)


def _below(first: str, second: str) -> str:
    """Both texts with a blank line between them, or the one that there is."""
    return "\n\n".join(text for text in (first, second) if text.strip())


def _kept(
    name: str, rows: Rows, fields: Sequence[str], convert: Callable[[Row], T | str]
) -> tuple[list[tuple[str, Row, T]], Counter[str]]:
    """The rows that `convert` makes something of, as (id, row, that), and the count of its reasons for the others."""
    out: list[tuple[str, Row, T]] = []
    drops: Counter[str] = Counter()
    problems: Problems = []
    taken: set[str] = set()
    for number, row in rows:
        try:
            if missing := [field for field in fields if field not in row]:
                raise UserError(f"missing {' and '.join(map(repr, missing))}")
            id, made = _id(row) or f"{_stem(name)}-{number}", convert(row)
        except UserError as error:
            problems.append((number, f"{name}:{number}: {error}"))
            continue
        if isinstance(made, str):
            drops[made] += 1
            continue
        while id in taken:
            id = f"{id}-{number}"
        taken.add(id)
        out.append((id, row, made))
    raise_problems(name, problems)
    if not out:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        raise UserError(f"{name}: no usable row (left out: {counts})")
    return out, drops


def _stem(name: str) -> str:
    """What a file or a data set is called, without endings and split."""
    return re.sub(r"(\.jsonl|\.json|\.parquet|\.gz)+$", "", PurePath(name).name.split(":")[0])


def _id(row: Row) -> str | None:
    id = next((row[field] for field in ("id", "prompt_id") if row.get(field) is not None), None)
    if id is not None and not isinstance(id, str) and type(id) is not int:
        raise UserError(f"'id' must be a string or an integer, {describe(id)} found")
    return None if id is None else str(id)


def _unknown(name: str, rows: Rows, known: Sequence[str]) -> UserError:
    fields = ", ".join(map(str, rows[0][1])) or "none"
    return UserError(
        f"{name}:{rows[0][0]}: no known layout (fields: {fields}); known are:", *(f"  {one}" for one in known)
    )


def _messages(value: object, field: str) -> list[Message]:
    """Messages of OpenAI's or ShareGPT's spelling; no list at all (null) is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"'{field}' must be a list of messages, {describe(value)} found")
    out = []
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f"a message of '{field}' must be an object, {describe(message)} found")
        role_field, text_field = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(role_field)
        if not isinstance(role, str):
            raise UserError(f"'{role_field}' in '{field}' must be a string, {describe(role)} found")
        out.append(Message(ROLES.get(role, role), _text(message.get(text_field), text_field)))
    return out


def _text(content: object, field: str) -> str | None:
    """The text of a content, which may be a list of parts; None where a part is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"'{field}' must be a text or a list of parts, {describe(content)} found")
    texts: list[str] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") not in (None, "text"):
            return None
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UserError(f"a part of '{field}' must be a text, {describe(text)} found")
        texts.append(text)
    return "".join(texts)


def _side(row: Row, field: str, role: str) -> list[Message]:
    """A field that holds one side of a turn, as a text or as messages."""
    value = row.get(field)
    if isinstance(value, list):
        return _messages(value, field)
    if value is not None and not isinstance(value, str):
        raise UserError(f"'{field}' must be a string or a list of messages, {describe(value)} found")
    return [Message(role, value or "")]


def _alpaca(row: Row) -> list[Message]:
    texts = {field: "" if row.get(field) is None else row[field] for field in ("instruction", "input", "output")}
    for field, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"'{field}' must be a string, {describe(text)} found")
    question = _below(texts["instruction"], texts["input"])
    return [Message("user", question), Message("assistant", texts["output"])]


def _choice(row: Row) -> tuple[Turn, Turn] | str:
    """The turns of a preference row, with one prompt and two answers."""
    chosen, rejected = _answered(row, "chosen"), _answered(row, "rejected")
    if isinstance(chosen, str):
        return chosen
    if isinstance(rejected, str):
        return rejected
    if chosen.later or rejected.later:
        return "later_turn"
    if chosen.prompt != rejected.prompt:
        return "different_prompts"
    return "identical" if chosen.response.strip() == rejected.response.strip() else (chosen, rejected)


def _answered(row: Row, field: str) -> Turn | str:
    """The turn that "chosen" or "rejected" makes with the prompt, which is a field of its own or opens both lists."""
    answer = _side(row, field, "assistant")
    if row.get("prompt") is None:
        if isinstance(row[field], str):
            raise UserError(f"missing 'prompt' (it may be left out where '{field}' is a list of messages)")
        return first_turn(answer)
    prompt = _side(row, "prompt", "user")
    if not answer or answer[0].role == "assistant":
        return first_turn([*prompt, *answer])
    # Some data sets repeat the question in a field of its own, beside the whole conversations.
    asked, repeated = (
        next((message.text for message in messages if message.role == "user"), None) for messages in (answer, prompt)
    )
    return first_turn(answer) if (asked or "").strip() == (repeated or "").strip() else "different_prompts"


EXAMPLES = (
    Layout(
        ("prompt", "response"),
        '{"prompt": "...", "response": "..."}, and perhaps "id" and "source"',
        lambda row: [*_side(row, "prompt", "user"), *_side(row, "response", "assistant")],
    ),
    Layout(
        ("prompt", "completion"),
        '{"prompt": "...", "completion": "..."}, or both as lists of messages',
        lambda row: [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")],
    ),
    Layout(
        ("messages",),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        lambda row: _messages(row["messages"], "messages"),
    ),
    Layout(
        ("conversations",),
        'ShareGPT: {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        lambda row: _messages(row["conversations"], "conversations"),
    ),
    Layout(
        ("instruction", "output"),
        'Alpaca: {"instruction": "...", "output": "..."}, and perhaps "input"',
        _alpaca,
    ),
)
PREFERENCES = (
    '{"prompt": "...", "chosen": "...", "rejected": "..."}, and perhaps "id"',
    '{"prompt": [message], "chosen": [message], "rejected": [message]}, message: {"role": "...", "content": "..."}',
    '{"chosen": [messages], "rejected": [messages]}, where both lists begin with the same question',
)
