"""OpenAssistant conversations as seed data (paper 3.1.1): examples for IFT, ranked sets for EFT.

Two layouts load: nested trees (rows with a "prompt" that holds "replies") and flat messages (rows with
"message_id" and "parent_id", in any order). Only first turns are used: a root prompt and its direct replies.
Whatever is left out is counted in `Seed.drops`:

    of prompts   wrong_role, other_language, deleted, empty, spam, synthetic; no_reply (none usable),
                 no_rank (none of them ranked), duplicate_prompt (the words of another usable prompt)
    of examples  no_rank_0 (the best reply itself was left out)
    of sets      one_ranked (a single ranked reply, nothing to compare), tied_ranks (all of one rank)
    of replies   the reasons of prompts with "reply_" before them, for replies to usable prompts
    of messages  later_turn, orphan (its parent is not in the file), duplicate_id

What comes out does not depend on the order of the file.
"""

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from selfreward_jax.data.records import Example, PathLike, RankedSet, raise_problems, read_rows
from selfreward_jax.errors import UserError

SOURCE = "oasst"
SPAM = 0.5  # a message is out when this share of its reviewers called it spam
ALL = -1  # in `split`: as many as there are

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a file gives: an Example for each prompt with a rank-0 reply, a RankedSet for each with a ranking.

    An Example and a RankedSet of one prompt have one id. `drops` counts what was left out, by reason.
    """

    examples: tuple[Example, ...]
    sets: tuple[RankedSet, ...]
    drops: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """A Seed divided so that no prompt is in two parts; `rest` is what nobody took."""

    ift: tuple[Example, ...]
    eft_train: tuple[RankedSet, ...]
    eft_eval: tuple[RankedSet, ...]
    rest: tuple[Example, ...]


@dataclasses.dataclass(frozen=True)
class _Message:
    id: str
    text: str
    role: str
    lang: str
    rank: int | None
    deleted: bool
    synthetic: bool
    spam: float


@dataclasses.dataclass(frozen=True)
class _Turn:
    prompt: _Message
    replies: tuple[_Message, ...]


def load(path: PathLike, lang: str = "en", drop_synthetic: bool = False, seed: int = 0) -> Seed:
    """The first turns of an OASST file (jsonl, plain or gzip), in the order of their ids.

    `lang` keeps messages of one language; `drop_synthetic` leaves out messages that a model wrote; `seed`
    shuffles the replies of each set, which files store best first. Raises UserError for a file that does not
    read, rows with wrong fields (the first ten), a file without any rank, and a file without any usable first
    turn.
    """
    return from_rows(read_rows(path), str(path), lang, drop_synthetic, seed)


def from_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    name: str,
    lang: str = "en",
    drop_synthetic: bool = False,
    seed: int = 0,
) -> Seed:
    """As `load`, from (line number, row) pairs in memory; `name` is what errors call their source."""
    drops: Counter[str] = Counter()
    rows = list(rows)
    turns = _read_turns(rows, name, drops)

    def reason_against(message: _Message, role: str) -> str | None:
        checks = {
            "wrong_role": message.role != role,
            "deleted": message.deleted,
            "empty": not message.text.strip(),
            "other_language": message.lang != lang,
            "spam": message.spam >= SPAM,
            "synthetic": drop_synthetic and message.synthetic,
        }
        return next((reason for reason, applies in checks.items() if applies), None)

    examples: list[Example] = []
    sets: list[RankedSet] = []
    seen: set[str] = set()
    unranked = 0
    last_id = None
    for turn in sorted(turns, key=lambda turn: (turn.prompt.id, turn.prompt.text)):
        if turn.prompt.id == last_id:
            drops["duplicate_id"] += 1
            continue
        last_id = turn.prompt.id
        if reason := reason_against(turn.prompt, "prompter"):
            drops[reason] += 1
            continue
        usable = []
        for reply in turn.replies:
            if reason := reason_against(reply, "assistant"):
                drops[f"reply_{reason}"] += 1
            else:
                usable.append(reply)
        ranked = [reply for reply in usable if reply.rank is not None]
        words = " ".join(turn.prompt.text.split()).casefold()
        if not ranked:
            drops["no_rank" if usable else "no_reply"] += 1
            unranked += bool(usable)
        elif words in seen:
            drops["duplicate_prompt"] += 1
        else:
            seen.add(words)
            drops["reply_no_rank"] += len(usable) - len(ranked)
            _add_example(turn.prompt, ranked, examples, drops)
            _add_set(turn.prompt, ranked, seed, sets, drops)
    drops = +drops  # without the zeros
    if not examples and not sets:
        if unranked and not any(reply.rank is not None for turn in turns for reply in turn.replies):
            raise UserError(f"{name}: no ranks: rank is null in every reply, so the best reply is not known")
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        raise UserError(f"{name}: no usable first turn in language '{lang}' (left out: {counts or 'nothing'})")
    return Seed(tuple(examples), tuple(sets), dict(sorted(drops.items())))


def _add_example(prompt: _Message, ranked: Sequence[_Message], examples: list[Example], drops: Counter[str]) -> None:
    best = sorted((reply for reply in ranked if reply.rank == 0), key=lambda reply: reply.id)
    if best:
        examples.append(Example(id=prompt.id, prompt=prompt.text, response=best[0].text, source=SOURCE))
    else:
        drops["no_rank_0"] += 1


def _add_set(
    prompt: _Message, ranked: Sequence[_Message], seed: int, sets: list[RankedSet], drops: Counter[str]
) -> None:
    # Ranks are counted anew over the replies that are left, so that the best of them is 0 again.
    ranks = {rank: place for place, rank in enumerate(sorted({reply.rank or 0 for reply in ranked}))}
    if len(ranked) < 2:
        drops["one_ranked"] += 1
    elif len(ranks) < 2:
        drops["tied_ranks"] += 1
    else:
        replies = _shuffled(ranked, lambda reply: reply.id, f"replies {seed} {prompt.id}")
        texts, places = zip(*((reply.text, ranks[reply.rank or 0]) for reply in replies), strict=True)
        sets.append(RankedSet(prompt.id, prompt.text, texts, places))


def split(seed_data: Seed, n_ift: int, n_eval: int, n_eft_train: int, seed: int) -> Split:
    """Divides the prompts: ranked sets for EFT evaluation, then for EFT training, then examples for IFT.

    Sizes count prompts; -1 takes all that is left at that point. Each part is the head of one seeded order
    over ids, the same on every machine, so changing `n_ift` moves no set. Raises UserError, naming the
    options to lower, when more is asked for than there is.
    """
    problems: list[str] = []

    def size(option: str, asked: int, available: int, what: str) -> int:
        if asked == ALL:
            return available
        if asked < 0:
            problems.append(f"{option}={asked}: must be -1 (all) or at least 0")
        elif asked > available:
            problems.append(f"{option}={asked}: there are {available} {what}; lower {option} or set it to -1 (all)")
        return min(max(asked, 0), available)

    sets = _shuffled(seed_data.sets, lambda item: item.id, f"sets {seed}")
    eval_end = size("eft.eval_sets", n_eval, len(sets), "ranked sets")
    after_eval = len(sets) - eval_end
    train_end = eval_end + size(
        "eft.train_sets", n_eft_train, after_eval, f"ranked sets after the {eval_end} for evaluation"
    )
    taken = {item.id for item in sets[:train_end]}
    free = [example for example in seed_data.examples if example.id not in taken]
    examples = _shuffled(free, lambda item: item.id, f"examples {seed}")
    ift_end = size("data.ift_examples", n_ift, len(examples), f"examples after the {train_end} sets for EFT")
    if problems:
        raise UserError(*problems)
    return Split(
        ift=tuple(examples[:ift_end]),
        eft_train=tuple(sets[eval_end:train_end]),
        eft_eval=tuple(sets[:eval_end]),
        rest=tuple(examples[ift_end:]),
    )


def _shuffled(items: Iterable[T], id_of: Callable[[T], str], salt: str) -> list[T]:
    """The items in the order of a hash of their ids: no Python version or file order changes this shuffle."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}\n{id_of(item)}".encode()).digest())


def _read_turns(rows: Sequence[tuple[int, Mapping[str, Any]]], name: str, drops: Counter[str]) -> list[_Turn]:
    problems: list[tuple[int, str]] = []

    def read(number: int, row: object) -> _Message | None:
        message, wrong = _message(row)
        if wrong:
            problems.append((number, f"{name}:{number}: {'; '.join(wrong)}"))
        return message

    def trees() -> Iterator[_Turn]:
        for number, row in rows:
            tree = row.get("prompt")
            prompt = read(number, tree)
            replies = [] if not isinstance(tree, Mapping) else _replies(tree)
            messages = tuple(filter(None, (read(number, reply) for reply in replies)))
            drops["later_turn"] += sum(_count_below(reply) for reply in replies)
            if prompt:
                yield _Turn(prompt, messages)

    def flat() -> Iterator[_Turn]:
        messages: dict[str, _Message] = {}
        parents: dict[str, object] = {}
        for number, row in sorted(rows, key=lambda item: str(item[1].get("text"))):
            message = read(number, row)
            if message and message.id in messages:
                drops["duplicate_id"] += 1
            elif message:
                messages[message.id] = message
                parents[message.id] = row.get("parent_id")
        children: dict[str, list[_Message]] = {id: [] for id, parent in parents.items() if parent is None}
        for id, parent in parents.items():
            if parent in children:
                children[str(parent)].append(messages[id])
            elif parent is not None:
                drops["later_turn" if parent in parents else "orphan"] += 1
        for id, replies in children.items():
            yield _Turn(messages[id], tuple(replies))

    nested = bool(rows) and "prompt" in rows[0][1]
    if rows and not nested and "message_id" not in rows[0][1]:
        raise UserError(f"{name}: not an OASST file: rows need 'prompt' (trees) or 'message_id' and 'parent_id'")
    turns = list(trees() if nested else flat())
    raise_problems(name, problems)
    return turns


def _replies(node: Mapping[str, Any]) -> list[Any]:
    replies = node.get("replies")
    return list(replies) if isinstance(replies, Sequence) and not isinstance(replies, str) else []


def _count_below(node: object) -> int:
    """How many messages hang below a reply, at any depth."""
    below = 0
    stack = [node]
    while stack:
        top = stack.pop()
        replies = _replies(top) if isinstance(top, Mapping) else []
        below += len(replies)
        stack += replies
    return below


def _message(row: object) -> tuple[_Message | None, list[str]]:
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
        "'text' must be a string": isinstance(text, str) or (text is None and bool(deleted)),
        "'role' must be a string": isinstance(row.get("role"), str),
        "'rank' must be an integer of at least 0, or null": rank is None or (type(rank) is int and rank >= 0),
        "'deleted' must be a boolean": isinstance(deleted, bool),
        "'synthetic' must be a boolean": isinstance(synthetic, bool),
    }
    wrong = [what for what, holds in checks.items() if not holds]
    if wrong:
        return None, wrong
    message = _Message(
        id=row["message_id"],
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
    if isinstance(labels.get("spam"), Mapping):
        value = labels["spam"].get("value")
    elif labels.get("name") is not None and labels.get("value") is not None:
        value = next(itertools.compress(labels["value"], (name == "spam" for name in labels["name"])), None)
    return float(value) if isinstance(value, (int, float)) else 0.0
