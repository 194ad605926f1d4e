"""When a completion ends: token ids, stop strings, the score line of a judgment (paper 2.2).

All of them are one automaton over the bytes of the text, read through the tokenizer's vocabulary: a table of the
state after each token. So a decode step looks up one number a row on the device, and a string that spans tokens or
begins inside of one is found like any other. The end is found with the token that brings it: nothing is sampled behind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from selfreward_jax.data.chat import Chat
from selfreward_jax.data.token_bytes import stop_problems
from selfreward_jax.errors import UserError
from selfreward_jax.judging import score_line
from selfreward_jax.model.attention import spec_of
from selfreward_jax.sampling import automata

_MOST_BYTES = 128 * 2**20  # of a table: every device holds one
_PART = 4096  # tokens that are looked up at once


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
    """What ends a completion.

    Attributes:
        ids: token ids that end it, the end of turn among them.
        strings: stop strings; the text ends before them: `chat.decode(chat, ids, stops.strings)`.
        table: `[Q,V]` uint8 or uint16, the state after a token. A completion starts in state 0. State Q - 1 is the
            end and is never left.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    table: np.ndarray


def build(chat: Chat, strings: Sequence[str] = (), rules: Sequence[np.ndarray] = ()) -> Stops:
    """The stops of a model's completions: its end of turn and EOS ids, and what else is asked for.

    Args:
        strings: a text ends before the first of them that is complete.
        rules: automata over the bytes of a text, see automata.py; e.g. `score_rule()`.

    Raises:
        UserError: for stop strings that are empty, no UTF-8 or too long, and for any (or a rule) with a tokenizer whose
            texts are not the bytes of its tokens.
    """
    if problems := stop_problems(strings):
        raise UserError(*problems)
    found = [*rules, automata.of_strings([string.encode() for string in strings])] if strings else [*rules]
    known = chat.token_bytes if found else None
    if found and known is None:
        raise UserError(
            "--config.model.tokenizer: neither byte-level nor sentencepiece, so stop strings cannot be found in its"
            " tokens; leave them out"
        )
    automaton = functools.reduce(automata.either, found) if found else automata.never()
    kind = np.uint8 if len(automaton) <= 256 else np.uint16
    size = len(automaton) * chat.vocabulary * np.dtype(kind).itemsize
    if size > _MOST_BYTES:
        raise UserError(
            f"stop strings: they need a table of {size / 2**20:.0f} MiB, at most {_MOST_BYTES >> 20}; give fewer or"
            " shorter ones"
        )
    pieces = known.pieces if known else (b"",) * chat.vocabulary
    table = _over_tokens(automaton.astype(kind), pieces)
    table[:, [number for number in chat.stop_ids if number < chat.vocabulary]] = len(automaton) - 1
    return Stops(chat.stop_ids, tuple(strings), table)


def stop_table(ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """`Stops.table` of token ids alone."""
    table = np.zeros((2, vocabulary), np.uint8)
    table[1] = 1
    table[:, [number for number in ids if number < vocabulary]] = 1
    return table


@functools.cache
def score_rule() -> np.ndarray:
    """The automaton that ends a judgment with the line of its score (judging/score_line.py)."""
    return automata.explore(score_line.START, score_line.step)


def advance(table: jax.Array, state: jax.Array, token: jax.Array) -> jax.Array:
    """The states after a token.

    Args:
        table: `Stops.table` on the device, whole on every one.
        state: `[R]` int32; 0 before the first token.
        token: `[R]` int32.

    Returns:
        `[R]` int32, laid out as `state`.
    """
    return table.at[state, token].get(out_sharding=spec_of(state)).astype(jnp.int32)


def ended(table: jax.Array, state: jax.Array) -> jax.Array:
    """`[R]` bool: which completions are over; the token that was read last is their last."""
    return state == table.shape[0] - 1


def _over_tokens(automaton: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """The table `[Q,V]` of the state after all bytes of a token."""
    lengths = np.array([len(piece) for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    flat = np.frombuffer(b"".join(pieces), np.uint8)
    table = np.empty((len(automaton), len(pieces)), automaton.dtype)
    for first in range(0, len(pieces), _PART):
        here = slice(first, first + _PART)
        states = np.repeat(np.arange(len(automaton), dtype=automaton.dtype)[None], len(lengths[here]), axis=0)
        for place in range(lengths[here].max()):
            longer = np.flatnonzero(lengths[here] > place)
            states[longer] = automaton[states[longer], flat[starts[here][longer] + place][:, None]]
        table[:, here] = states.T
    return table
