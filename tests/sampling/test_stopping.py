"""Stops over tokens: as over the bytes of the text, whatever the tokens are."""

import functools
import itertools
import json
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_tokenizers import byte_level, sentencepiece  # pyright: ignore[reportMissingImports]

from selfreward_jax.data import chat as chats
from selfreward_jax.errors import UserError
from selfreward_jax.judging.scores import Reading, read_score
from selfreward_jax.sampling import automata, stopping
from selfreward_jax.weights.source import open_source

CORPUS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "judging" / "score_corpus.jsonl").read_text("utf-8").split("\n")[:-1]
]
KINDS = {"byte_level": (byte_level, "chatml"), "sentencepiece": (sentencepiece, "llama2")}
STRINGS = ["**Score", "\n\n", "é", "字 😀", " 4/", "re: "]


@functools.cache
def chat_of(kind) -> Any:
    make, template = KINDS[kind]
    return chats.load_chat(make(), template)


def chat_with(pieces, stop_ids=()) -> Any:
    """What stops are built from, of a tokenizer with these tokens, or with so many whose bytes are not known."""
    if isinstance(pieces, int):
        return SimpleNamespace(stop_ids=stop_ids, vocabulary=pieces, token_bytes=None)
    known = SimpleNamespace(pieces=tuple(pieces))
    return SimpleNamespace(stop_ids=stop_ids, vocabulary=len(pieces), token_bytes=known)


@functools.cache
def judge_stops(kind):
    return stopping.build(chat_of(kind), rules=(stopping.score_rule(),))


def taken(stops, ids):
    """The ids up to the one that ends the completion; all if none does."""
    state = 0
    for count, number in enumerate(ids, 1):
        state = stops.table[state, number]
        if state == len(stops.table) - 1:
            return ids[:count]
    return ids


def over(stops, ids):
    return bool(ids) and functools.reduce(lambda s, n: stops.table[s, n], ids, 0) == len(stops.table) - 1


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(kind, data):
    chat = chat_of(kind)
    strings = data.draw(st.lists(st.sampled_from(STRINGS), min_size=1, max_size=3, unique=True))
    stops = build(kind, tuple(strings))
    text = st.text("It is fine **Score: 4/5\né漢字 😀", max_size=10).map(lambda text: chats.encode_text(chat, text))
    anything = st.lists(st.integers(0, chat.vocabulary - 1), max_size=4)
    ids = list(itertools.chain(*data.draw(st.lists(text | anything, max_size=4))))
    wanted, so_far = ids, b""
    for count, number in enumerate(ids, 1):
        so_far += chat.token_bytes.pieces[number]
        if number in chat.stop_ids or any(string.encode() in so_far for string in strings):
            wanted = ids[:count]
            break
    assert taken(stops, ids) == wanted
    left = chats.decode(chat, wanted, strings)
    assert not any(string in left for string in strings)
    assert chats.decode(chat, wanted).startswith(left)


@functools.cache
def build(kind, strings):
    return stopping.build(chat_of(kind), strings)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_ends_of_turn_end_what_nothing_else_is_asked_for(kind):
    chat = chat_of(kind)
    stops = stopping.build(chat)
    assert stops.table.shape == (2, chat.vocabulary) and stops.table.dtype == np.uint8
    assert set(np.flatnonzero(stops.table[0])) == set(stops.ids) == set(chat.stop_ids)
    assert stops.table[1].all()
    assert stops.strings == ()


def test_an_end_of_turn_that_the_tokenizer_does_not_have_ends_nothing():
    assert stopping.build(chat_with(4, (1, 9))).table.tolist() == [[0, 1, 0, 0], [1, 1, 1, 1]]


def test_a_stop_string_may_begin_and_end_inside_of_tokens():
    pieces = (b"a Sto", b"p and", b"St", b"op", b"S", b"\xf0\x9f", b"\x98", b"\x80!", b"")
    stops = stopping.build(chat_with(pieces, (8,)), ["Stop", "😀"])
    ended = [
        over(stops, ids) for ids in ([0, 1], [2, 3], [2, 2, 3], [4, 4], [5, 6, 7], [5, 5, 6, 7], [5, 6], [8], [0, 2])
    ]
    assert ended == [True, True, True, False, True, True, False, True, False]


def test_a_step_on_the_device_is_a_look_up_in_every_layout(mesh_of):
    stops = build("byte_level", ("**Score", "\n\n"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, stops.table.shape[1], (5, 16)).astype(np.int32)
    tokens[:, 3] = chat_of("byte_level").end_of_turn
    tokens[::2, 3] = 7
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, P(("data", "fsdp")))
            table = jax.device_put(stops.table, NamedSharding(mesh, P()))
            state = jax.device_put(np.zeros(16, np.int32), rows)
            for token in tokens:
                state = jax.jit(stopping.advance)(table, state, jax.device_put(token, rows))
                assert state.dtype == np.int32 and state.sharding.is_equivalent_to(rows, 1)
            found.append((np.asarray(state), np.asarray(stopping.ended(table, state))))
    wanted = [functools.reduce(lambda s, n: stops.table[s, n], column, 0) for column in tokens.T]
    for state, ended in found:
        assert state.tolist() == wanted
        assert ended.tolist() == [state == len(stops.table) - 1 for state in wanted]
        assert ended[3] and not ended.all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_read_alike_with_and_without_the_stop(kind):
    chat, stops = chat_of(kind), judge_stops(kind)
    early = 0
    for case in CORPUS:
        for end in ("", "\n", "\nThat is all.") if case["finished"] else ("",):
            ids = chats.encode_text(chat, case["text"] + end)
            short = taken(stops, ids)
            finished = case["finished"] or over(stops, short)
            cut = read_score(chats.decode(chat, short), case["low"], case["high"], finished)
            assert cut == Reading(None if case["score"] is None else Fraction(case["score"]), case["reason"]), case
            early += len(short) < len(ids)
    assert early > 50


def test_a_judgment_ends_with_the_token_that_ends_its_line():
    for kind in KINDS:
        chat, stops = chat_of(kind), judge_stops(kind)
        ids = chats.encode_text(chat, "It is fine.\n\n**Score:** 4/5\n\nIt is fine.\nScore: 3\n")
        short = taken(stops, ids)
        assert chats.decode(chat, short).rstrip("\n") == "It is fine.\n\n**Score:** 4/5"
        assert chats.decode(chat, short) != chats.decode(chat, short[:-1])


def test_rules_and_strings_together_end_where_the_first_does():
    chat = chat_of("sentencepiece")
    both = stopping.build(chat, ["5"], (stopping.score_rule(), automata.of_strings([b"!"])))
    for text, left in (
        ("fine\nScore: 4\na5!", "fine\nScore: 4\n"),
        ("a5!", "a5"),
        ("a!5", "a!"),
        ("Score: 4\n", "Score: 4\n"),
    ):
        assert chats.decode(chat, taken(both, chats.encode_text(chat, text))) == left
    assert both.strings == ("5",)


def test_what_is_wrong_with_stop_strings_is_said_at_once():
    with pytest.raises(UserError) as caught:
        stopping.build(chat_of("byte_level"), ["", "a" * 300])
    assert len(caught.value.args) == 2


def test_a_tokenizer_whose_bytes_are_not_known_has_end_of_turns_only():
    chat = chat_with(3)
    with pytest.raises(UserError, match="neither byte-level nor sentencepiece"):
        stopping.build(chat, ["a"])
    with pytest.raises(UserError, match="neither byte-level nor sentencepiece"):
        stopping.build(chat, rules=(stopping.score_rule(),))


def test_a_table_too_large_for_a_device_is_a_line(monkeypatch):
    monkeypatch.setattr(stopping, "_MOST_BYTES", 2**20)
    chat = chat_with([b"a"] * 2**17)
    assert stopping.build(chat, ["abcdefg"]).table.nbytes == 2**20
    with pytest.raises(UserError, match=r"a table of 1 MiB, at most 1; give fewer or shorter"):
        stopping.build(chat, ["abcdefgh"])


def test_more_states_than_a_byte_counts():
    chat = chat_of("byte_level")
    stops = stopping.build(chat, ["ab" * 60 + "c", "x" * 120], (automata.of_strings([b"y" * 100]),))
    assert stops.table.dtype == np.uint16 and len(stops.table) > 256
    for length, kind in ((255, np.uint8), (256, np.uint16)):
        assert stopping.build(chat, rules=(automata.of_strings([b"x" * length]),)).table.dtype == kind
    ids = chats.encode_text(chat, "fine" + "ab" * 61 + "c" + "x")
    assert chats.decode(chat, taken(stops, ids)) == "fine" + "ab" * 61 + "c"


def test_a_large_vocabulary_takes_no_time():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 13, 49_152)
    chat = chat_with([bytes(rng.integers(0, 256, length, np.uint8)) for length in lengths])
    start = time.process_time()
    stops = stopping.build(chat, rules=(stopping.score_rule.__wrapped__(),))
    assert time.process_time() - start < 2  # a fifth of it, mostly
    assert stops.table.nbytes < 8 * 2**20


@pytest.mark.demo
def test_the_corpus_is_read_alike_by_the_demo_models_tokens():
    source = open_source("demo")
    chat = chats.load_chat(source.tokenizer, "own", source.eos_ids)
    stops = stopping.build(chat, rules=(stopping.score_rule(),))
    for case in CORPUS:
        ids = chats.encode_text(chat, case["text"])
        short = taken(stops, ids)
        found = read_score(
            chats.decode(chat, short), case["low"], case["high"], case["finished"] or over(stops, short)
        )
        assert found == Reading(None if case["score"] is None else Fraction(case["score"]), case["reason"]), case
