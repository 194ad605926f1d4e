"""The bytes of tokens against the tokenizer's own decoding, and texts that end in the middle of a character."""

import functools
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece
from tokenizers import decoders

from selfreward_jax.data import chat as chats
from selfreward_jax.data import token_bytes

KINDS = {"byte_level": (byte_level, "chatml"), "sentencepiece": (sentencepiece, "llama2")}
MIXED = "It is fine: é, 漢字, 😀.\n**Score:** 4/5"


@functools.cache
def chat_of(kind) -> Any:
    make, template = KINDS[kind]
    return chats.load_chat(make(), template)


def written(chat, ids) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def of_bytes(chat, ids):
    return b"".join(chat.token_bytes.pieces[number] for number in ids)


@given(st.data())
def test_bytes_put_together_are_what_a_byte_level_tokenizer_writes(data):
    chat = chat_of("byte_level")
    ids = data.draw(st.lists(st.integers(0, chat.vocabulary - 1), max_size=12))
    assert of_bytes(chat, ids).decode("utf-8", "replace") == written(chat, ids)
    assert chat.token_bytes.leading == 0


@given(st.data())
def test_bytes_put_together_are_what_a_sentencepiece_tokenizer_writes(data):
    chat = chat_of("sentencepiece")
    in_bytes = {number: token for token, number in chat.tokenizer.get_vocab().items()}
    words = st.sampled_from([[number] for number, token in in_bytes.items() if not token.startswith("<0x")])
    letters = st.characters(exclude_categories=["Cs"]).map(
        lambda letter: [chat.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in letter.encode()]
    )
    ids = list(itertools.chain(*data.draw(st.lists(words | letters, max_size=10))))
    assert of_bytes(chat, ids).decode().removeprefix(" ") == written(chat, ids)
    assert chats.decode(chat, ids) == written(chat, ids).removeprefix(chat.lead)


def test_special_tokens_show_nowhere_and_other_added_ones_do():
    chat = chat_of("byte_level")
    pieces = {token: chat.token_bytes.pieces[number] for token, number in chat.tokenizer.get_vocab().items()}
    assert [pieces[token] for token in ("<|im_end|>", "<think>", "été 漢", "Ġ", "é")] == [
        b"", b"<think>", "été 漢".encode(), b" ", b"\xe9",
    ]  # fmt: skip
    chat = chat_of("sentencepiece")
    pieces = {token: chat.token_bytes.pieces[number] for token, number in chat.tokenizer.get_vocab().items()}
    assert [pieces[token] for token in ("<unk>", "</s>", "▁Score", "<0x0A>", "<0xE9>", "é")] == [
        b"", b"", b" Score", b"\n", b"\xe9", "é".encode(),
    ]  # fmt: skip
    assert len(chat.token_bytes.pieces) == chat.vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_after_any_token_is_a_part_of_it(kind):
    chat = chat_of(kind)
    ids = chats.encode_text(chat, MIXED)
    parts = [chats.decode(chat, ids[:length]) for length in range(len(ids) + 1)]
    assert (parts[0], parts[-1]) == ("", MIXED)
    for part, after in itertools.pairwise(parts):
        assert after.startswith(part)
    raw = [written(chat, ids[:length]) for length in range(len(ids) + 1)]
    assert any("\ufffd" in text for text in raw)  # what the tokenizer alone would leave


@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_inside_of_a_text_are_replacement_characters(kind):
    chat = chat_of(kind)
    first, second = map(chat.token_bytes.pieces.index, (b"\xe6", b"\xbc"))
    four = chat.token_bytes.pieces.index(b"4")
    assert chats.decode(chat, [four, first, second, four, second]) == "4\ufffd4\ufffd"
    assert chats.decode(chat, [four, first, second]) == "4"  # that may have become a character
    assert chats.decode(chat, [four, second, first, second]) == "4\ufffd"


@given(st.text(max_size=8), st.integers(0, 40))
def test_a_cut_drops_the_character_that_it_cuts(text, size):
    whole = max((text[:n] for n in range(len(text) + 1) if len(text[:n].encode()) <= size), key=len)
    assert token_bytes.text_of(text.encode()[:size]) == whole


@given(st.binary(max_size=12))
def test_no_bytes_but_the_last_are_dropped(data):
    assert token_bytes.text_of(data + b".") == (data + b".").decode("utf-8", "replace")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text, strings):
    wanted = text
    for end in range(1, len(text) + 1):
        here = [string for string in strings if text[:end].endswith(string)]
        if here:
            wanted = text[: end - max(map(len, here))]
            break
    assert token_bytes.before_stop(text.encode(), strings) == wanted.encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strings", "left"),
    [
        (["**Sc"], "It is fine: é, 漢字, 😀.\n"),  # across tokens
        (["ore:", "Score"], "It is fine: é, 漢字, 😀.\n**"),  # the one that is complete first
        (["**Score:", "core"], "It is fine: é, 漢字, 😀.\n**S"),
        (["字", "漢字"], "It is fine: é, "),  # both are: the longest
        (["\n"], "It is fine: é, 漢字, 😀."),
        (["It"], ""),
        (["it", "5 "], MIXED),
    ],
)
def test_an_answer_is_cut_at_its_stop_string(kind, strings, left):
    chat = chat_of(kind)
    assert chats.decode(chat, chats.encode_text(chat, MIXED), strings) == left


@pytest.mark.parametrize("strings", [[""], ["a", ""], ["\ud800"], ["a" * 251], ["é" * 63, "è" * 63], ["a\udcff", ""]])
def test_stop_strings_that_make_no_sense_have_a_line_each(strings):
    lines = token_bytes.stop_problems(strings)
    assert len(lines) == (2 if strings == ["a\udcff", ""] else 1)
    assert all(line.startswith("stop string") and "\n" not in line for line in lines)
    assert all(line.isascii() for line in lines)  # a lone surrogate could not be printed


def test_stop_strings_that_make_sense():
    assert token_bytes.stop_problems([]) == token_bytes.stop_problems(["\n", "é" * 62, "x" * 100]) == []


UNKNOWN = [
    None,
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]},
    {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"Regex": "_"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]},
    {"type": "Sequence", "decoders": [
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 1},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("decoder", UNKNOWN)
def test_what_is_not_known_to_be_bytes_is_not_taken_for_bytes(decoder):
    assert token_bytes.read(decoder, ["a"]) is None


def test_a_decoder_without_spaces_or_strip_is_known():
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    assert token_bytes.read(decoder, ["▁a", "<0x41>", None]) == token_bytes.TokenBytes(("▁a".encode(), b"A", b""), 0)


def test_a_tokenizer_whose_bytes_are_not_known_decodes_as_it_does():
    tokenizer = chat_of("byte_level").tokenizer
    chat = chats.load_chat(tokenizer, "chatml")
    chat.tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    chat = chats.load_chat(chat.tokenizer, "chatml")
    ids = chats.encode_text(chat, "fine Score")
    assert chat.token_bytes is None
    assert chats.decode(chat, ids) == written(chat, ids) != ""
    blank = [chat.tokenizer.get_vocab()["  \n"]]
    assert chats.decode(chat, blank) == written(chat, blank) == "  \n"
    assert chats.decode(chat, ids, ["Sco"]) == written(chat, ids).split("Sco")[0] != written(chat, ids)
