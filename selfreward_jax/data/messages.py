"""OpenAssistant rows as first turns (paper 3.1.1): a root prompt and its direct replies.

Two layouts read: nested trees (rows with a "prompt" that holds "replies") and flat messages (rows with "message_id"
and "parent_id", in any order). Trees are taken apart into messages first, so both go one way. A message that is in no
first turn is counted under the first of these that applies:

    duplicate_id  its id was there before (a root is kept before a reply, then by text)
    cyclic        its chain of parents runs into a circle
    orphan        its chain of parents ends at an id that is not in the file
    later_turn    it stands below a direct reply

The turns and the counts do not depend on the order of the file, and no depth of nesting exhausts the stack.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfreward_jax.data.rows import raise_problems
from selfreward_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Message:
    """One message; `rank` is a reply's place among its siblings (0 is best), `spam` the reviewers' label, 0 to 1."""

    id: str
    parent: str | None
    text: str
    role: str
    lang: str
    rank: int | None
    deleted: bool
    synthetic: bool
    spam: float


@dataclasses.dataclass(frozen=True)
class Turn:
    """A root and its direct replies, in the order of their ids; what is wrong with them is not looked at here."""

    prompt: Message
    replies: tuple[Message, ...]


def first_turns(rows: Sequence[tuple[int, Mapping[str, Any]]], name: str) -> tuple[list[Turn], Counter[str]]:
    """The first turns in the order of their prompts' ids, and the count of all other messages by reason.

    Args:
        rows: (number, row) as `rows.read_rows` gives them.
        name: what errors call their source.

    Raises:
        UserError: one line for each row with wrong fields (the first ten, then a count), or one line for rows of
            neither layout.
    """
    nested = bool(rows) and "prompt" in rows[0][1]
    if rows and not nested and "message_id" not in rows[0][1]:
        raise UserError(f"{name}: not an OASST file: rows need 'prompt' (trees) or 'message_id' and 'parent_id'")
    found: list[Message] = []
    problems: list[tuple[int, str]] = []
    for number, row in rows:
        for message, wrong in _nodes(row.get("prompt")) if nested else [_message(row, row.get("parent_id"))]:
            if wrong:
                problems.append((number, f"{name}:{number}: {'; '.join(wrong)}"))
            elif message:
                found.append(message)
    raise_problems(name, problems)
    return _turns(found)


def _turns(found: Sequence[Message]) -> tuple[list[Turn], Counter[str]]:
    drops: Counter[str] = Counter()
    messages: dict[str, Message] = {}
    for message in sorted(found, key=lambda message: (message.id, message.parent is not None, repr(message))):
        if message.id in messages:
            drops["duplicate_id"] += 1
        else:
            messages[message.id] = message
    parents = {message.id: message.parent for message in messages.values()}
    ends = _chain_ends(parents)
    replies: dict[str, list[Message]] = {id: [] for id, parent in parents.items() if parent is None}
    for id, parent in parents.items():
        if ends[id] != "root":
            drops[ends[id]] += 1
        elif parent in replies:
            replies[parent].append(messages[id])
        elif parent is not None:
            drops["later_turn"] += 1
    return [Turn(messages[id], tuple(below)) for id, below in replies.items()], drops


def _chain_ends(parents: Mapping[str, str | None]) -> dict[str, str]:
    """Where the chain of parents of each id ends: "root", "orphan" (an unknown id) or "cyclic" (nowhere)."""
    ends: dict[str, str] = {}
    for start in parents:
        path: dict[str, None] = {}
        at: str | None = start
        while at is not None and at in parents and at not in ends and at not in path:
            path[at] = None
            at = parents[at]
        if at is None:
            end = "root"
        elif at in path:
            end = "cyclic"
        else:
            end = ends.get(at, "orphan")
        ends.update(dict.fromkeys(path, end))
    return ends


def _nodes(tree: object) -> Iterator[tuple[Message | None, list[str]]]:
    """The messages of a nested tree; where a message stands is its parent, whatever its "parent_id" says."""
    stack: list[tuple[object, str | None]] = [(tree, None)]
    while stack:
        node, parent = stack.pop()
        message, wrong = _message(node, parent)
        replies = node.get("replies") if isinstance(node, Mapping) else None
        if isinstance(replies, list):
            stack += [(reply, message.id if message else "") for reply in reversed(replies)]
        elif replies is not None:
            wrong = [*wrong, "'replies' must be a list"]
        yield message, wrong


def _message(row: object, parent: object) -> tuple[Message | None, list[str]]:
    """The message, or None with what is wrong with the row."""
    if not isinstance(row, Mapping):
        return None, ["a message must be an object"]
    rank = row.get("rank")
    if isinstance(rank, float) and (math.isnan(rank) or rank.is_integer()):
        rank = None if math.isnan(rank) else int(rank)  # tables hold columns with gaps as floats
    # Absent and null are the same for all but the three fields that make a message.
    deleted, synthetic, text = row.get("deleted") or False, row.get("synthetic") or False, row.get("text")
    checks = {
        "'message_id' must be a string": isinstance(row.get("message_id"), str),
        "'parent_id' must be a string or null": parent is None or isinstance(parent, str),
        "'text' must be a string": isinstance(text, str) or (text is None and bool(deleted)),
        "'role' must be a string": isinstance(row.get("role"), str),
        "'lang' must be a string or null": row.get("lang") is None or isinstance(row["lang"], str),
        "'rank' must be an integer of at least 0, or null": rank is None or (type(rank) is int and rank >= 0),
        "'deleted' must be a boolean": isinstance(deleted, bool),
        "'synthetic' must be a boolean": isinstance(synthetic, bool),
    }
    wrong = [what for what, holds in checks.items() if not holds]
    if wrong:
        return None, wrong
    message = Message(
        id=row["message_id"],
        parent=None if parent is None else str(parent),
        text=text or "",
        role=row["role"],
        lang=row.get("lang") or "",
        rank=None if rank is None else int(rank),
        deleted=deleted,
        synthetic=synthetic,
        spam=_spam(row.get("labels")),
    )
    return message, []


def _spam(labels: object) -> float:
    """The spam label of {"spam": {"value": v}} or {"name": [...], "value": [...]}, 0 where absent."""
    if not isinstance(labels, Mapping):
        return 0.0
    value: object = None
    names, values = labels.get("name"), labels.get("value")
    if isinstance(labels.get("spam"), Mapping):
        value = labels["spam"].get("value")
    elif isinstance(names, Sequence) and isinstance(values, Sequence):
        value = next(itertools.compress(values, (name == "spam" for name in names)), None)
    return float(value) if isinstance(value, (int, float)) else 0.0
