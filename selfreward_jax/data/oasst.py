"""OpenAssistant conversations as seed data (paper 3.1.1): examples for IFT, ranked sets for EFT.

Only first turns are used: a root prompt and its direct replies (messages.py reads them, from trees or flat rows).
Whatever is left out is counted in `Seed.drops`. A message is counted once:

    prompts   wrong_role, deleted, empty, other_language, spam, synthetic; no_reply (none usable), no_rank (none of
              them ranked), duplicate_prompt (the words of another usable prompt)
    replies   the first six with "reply_" before them, reply_no_rank; reply_of_dropped (its prompt was left out)
    others    duplicate_id, cyclic, orphan, later_turn: see messages.py

What a usable prompt does not give is counted too:

    examples  no_rank_0 (the best reply itself was left out)
    sets      one_ranked (a single ranked reply, nothing to compare), tied_ranks (all of one rank)

What comes out does not depend on the order of the file.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from selfreward_jax.data.messages import Message, first_turns
from selfreward_jax.data.records import Example, RankedSet
from selfreward_jax.data.rows import PathLike, read_rows
from selfreward_jax.errors import UserError

SOURCE = "oasst"
SPAM = 0.5  # a message is out when this share of its reviewers called it spam
ALL = -1  # in `split`: as many as there are

T = TypeVar("T")
P = TypeVar("P", Example, RankedSet)


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a file gives: an Example for each prompt with a rank-0 reply, a RankedSet for each with a ranking.

    An Example and a RankedSet of one prompt have one id. `drops` counts what was left out, by reason. `messages` were
    read, and of them `prompts` with `replies` (the ranked ones) are used.
    """

    examples: tuple[Example, ...]
    sets: tuple[RankedSet, ...]
    drops: dict[str, int]
    messages: int = 0
    prompts: int = 0
    replies: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """A Seed divided so that no prompt is in two parts; `rest` is what nobody took."""

    ift: tuple[Example, ...]
    eft_train: tuple[RankedSet, ...]
    eft_eval: tuple[RankedSet, ...]
    rest: tuple[Example, ...]


def load(path: PathLike, lang: str = "en", drop_synthetic: bool = False, seed: int = 0) -> Seed:
    """The first turns of an OASST file (any form that rows.py reads), in the order of their ids.

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
    """As `load`, from (number, row) pairs in memory; `name` is what errors call their source."""
    turns, drops = first_turns(list(rows), name)
    messages = drops.total() + sum(1 + len(turn.replies) for turn in turns)

    def reason_against(message: Message, role: str) -> str | None:
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
    replies = 0
    for turn in turns:
        if reason := reason_against(turn.prompt, "prompter"):
            drops[reason] += 1
            drops["reply_of_dropped"] += len(turn.replies)
            continue
        against = [reason_against(reply, "assistant") for reply in turn.replies]
        drops.update(f"reply_{reason}" for reason in against if reason)
        usable = [reply for reply, reason in zip(turn.replies, against, strict=True) if not reason]
        ranked = [reply for reply in usable if reply.rank is not None]
        drops["reply_no_rank"] += len(usable) - len(ranked)
        words = words_of(turn.prompt.text)
        if not ranked:
            drops["no_rank" if usable else "no_reply"] += 1
        elif words in seen:
            drops["duplicate_prompt"] += 1
            drops["reply_of_dropped"] += len(ranked)
        else:
            seen.add(words)
            replies += len(ranked)
            _add_example(turn.prompt, ranked, examples, drops)
            _add_set(turn.prompt, ranked, seed, sets, drops)
    drops = +drops  # without the zeros
    if not examples and not sets:
        if drops["no_rank"] and all(reply.rank is None for turn in turns for reply in turn.replies):
            raise UserError(f"{name}: no ranks: rank is null in every reply, so the best reply is not known")
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        there = Counter(turn.prompt.lang or "none" for turn in turns).most_common(5)
        languages = ", ".join(f"{language} ({count})" for language, count in there)
        raise UserError(
            f"{name}: no usable first turn in language '{lang}' (left out: {counts or 'nothing'}; "
            f"languages of the prompts: {languages or 'no prompts'})"
        )
    return Seed(tuple(examples), tuple(sets), dict(sorted(drops.items())), messages, len(seen), replies)


def words_of(prompt: str) -> str:
    """What makes two prompts the same one: neither case nor white space tells them apart."""
    return " ".join(prompt.split()).casefold()


def summary(seed_data: Seed) -> list[tuple[str, int | float]]:
    """What was read and what is used, as (label, figure): counts, then means, then what was left out by reason.

    A human pair is two replies of one set with different ranks; equal ranks order nothing.
    """
    in_sets = [len(item.replies) for item in seed_data.sets]
    pairs = sum(one != other for item in seed_data.sets for one, other in itertools.combinations(item.ranks, 2))
    return [
        ("messages read", seed_data.messages),
        ("usable prompts", seed_data.prompts),
        ("usable replies", seed_data.replies),
        ("mean replies a prompt", seed_data.replies / max(1, seed_data.prompts)),
        ("prompts with a rank-0 reply", len(seed_data.examples)),
        ("ranked sets", len(seed_data.sets)),
        ("mean replies a ranked set", sum(in_sets) / max(1, len(in_sets))),
        ("most replies of a ranked set", max(in_sets, default=0)),
        ("human pairs", pairs),
        *((f"left out: {reason}", count) for reason, count in seed_data.drops.items()),
    ]


def summary_table(seed_data: Seed) -> str:
    """`summary` as lines of plain text: labels flush left, figures flush right, means with two decimals."""
    cells = [
        (label, f"{figure:.2f}" if isinstance(figure, float) else f"{figure:,}")
        for label, figure in summary(seed_data)
    ]
    left, right = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(f"{label:<{left}}  {figure:>{right}}" for label, figure in cells)


def _add_example(prompt: Message, ranked: Sequence[Message], examples: list[Example], drops: Counter[str]) -> None:
    best = sorted((reply for reply in ranked if reply.rank == 0), key=lambda reply: reply.id)
    if best:
        examples.append(Example(id=prompt.id, prompt=prompt.text, response=best[0].text, source=SOURCE))
    else:
        drops["no_rank_0"] += 1


def _add_set(
    prompt: Message, ranked: Sequence[Message], seed: int, sets: list[RankedSet], drops: Counter[str]
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
    """Divides the prompts: ranked sets for EFT evaluation, then examples for IFT, then ranked sets for EFT training.

    Sizes count prompts; -1 takes all that is left at that point. An `n_ift` of -1 takes its turn after EFT training,
    which it would leave nothing. Each part is the head of one seeded order over ids, the same on every machine, so
    no size moves a part that is claimed before it: evaluation sets never move. Raises UserError, naming the options
    to lower, when more is asked for than there is.
    """
    problems: list[str] = []

    def head(items: list[T], option: str, asked: int, what: str) -> list[T]:
        if asked > len(items):
            problems.append(f"{option}={asked}: there are {len(items)} {what}; lower {option} or set it to -1 (all)")
        return items if asked == ALL else items[:asked]

    sets = _shuffled(seed_data.sets, lambda item: item.id, f"sets {seed}")
    examples = _shuffled(seed_data.examples, lambda item: item.id, f"examples {seed}")
    evaluation = head(sets, "eft.eval_sets", n_eval, "ranked sets")
    sets, examples = without(sets, evaluation), without(examples, evaluation)
    beside = f"beside {len(evaluation)} sets for evaluation"
    ift = [] if n_ift == ALL else head(examples, "data.ift_examples", n_ift, f"examples {beside}")
    beside += f" and {len(ift)} examples for IFT"
    train = head(without(sets, ift), "eft.train_sets", n_eft_train, f"ranked sets {beside}")
    rest = without(examples, [*ift, *train])
    if n_ift == ALL:
        ift, rest = rest, []
    if problems:
        raise UserError(*problems)
    return Split(tuple(ift), tuple(train), tuple(evaluation), tuple(rest))


def without(items: Sequence[P], others: Iterable[Example | RankedSet]) -> list[P]:
    """The items that ask none of the others' questions: by their words, as ids of two files may meet by chance."""
    asked = {words_of(other.prompt) for other in others}
    return [item for item in items if words_of(item.prompt) not in asked]


def _shuffled(items: Iterable[T], id_of: Callable[[T], str], salt: str) -> list[T]:
    """The items in the order of a hash of their ids: no Python version or file order changes this shuffle."""

    def place(item: T) -> bytes:
        # JSON can spell half a surrogate pair, which has no strict UTF-8.
        return hashlib.sha256(f"{salt}\n{id_of(item)}".encode("utf-8", "surrogatepass")).digest()

    return sorted(items, key=place)
