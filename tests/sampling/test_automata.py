"""Automata over bytes: against searching the text anew after every byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.sampling import automata

BYTES = st.binary(max_size=16) | st.lists(st.sampled_from(b"abc"), max_size=16).map(bytes)
STRINGS = st.lists(st.lists(st.sampled_from(b"abc"), min_size=1, max_size=4).map(bytes), min_size=1, max_size=4)


def ends(automaton, text):
    """How many bytes of the text are read when the automaton ends; None if it does not."""
    state = 0
    for count, byte in enumerate(text, 1):
        state = automaton[state, byte]
        if state == len(automaton) - 1:
            assert set(automaton[state]) == {state}  # for good
            return count
    return None


def first_end(text, strings):
    return min((text.find(string) + len(string) for string in strings if string in text), default=None)


@given(STRINGS, BYTES)
def test_strings_end_a_text_where_the_first_of_them_is_complete(strings, text):
    automaton = automata.of_strings(strings)
    assert ends(automaton, text) == first_end(text, strings)
    assert len(automaton) <= sum(map(len, strings)) + 1
    assert automaton.min() >= 0 and automaton.max() == len(automaton) - 1


@pytest.mark.parametrize(
    ("strings", "text", "end"),
    [
        ([b"abab"], b"abaabab", 7),  # begins again inside of what it has matched
        ([b"abcd", b"bc"], b"abcd", 3),  # one inside of the other
        ([b"ab", b"abc"], b"xabc", 3),  # one begins the other
        ([b"aab", b"ab"], b"caab", 4),
        ([b"bcb", b"ab"], b"cab", 3),  # a whole one ends in the other's beginning
        (["é".encode()], b"\xc3\xc3\xa9", 3),
        ([b"\x00"], b"a\x00", 2),
    ],
)
def test_strings_that_overlap(strings, text, end):
    assert ends(automata.of_strings(strings), text) == end


@given(STRINGS, STRINGS, BYTES)
def test_either_ends_where_the_first_of_two_does(one, two, text):
    both = automata.either(automata.of_strings(one), automata.of_strings(two))
    assert ends(both, text) == first_end(text, one + two)


@given(BYTES)
def test_never_ends_nothing(text):
    assert ends(automata.never(), text) is None
    assert ends(automata.either(automata.never(), automata.of_strings([b"ab"])), text) == first_end(text, [b"ab"])


def test_a_rule_becomes_the_smallest_automaton():
    # Ends at the third "a"; that "b" was read is remembered for nothing.
    def step(state, byte):
        count, seen = state
        if byte == ord("a"):
            return None if count == 2 else (count + 1, seen)
        return (count, seen or byte == ord("b"))

    automaton = automata.explore((0, False), step)
    assert automaton.shape == (4, 256)
    assert [ends(automaton, text) for text in (b"aaa", b"bacbada", b"aab", b"")] == [3, 7, None, None]
    assert automaton.dtype == np.int32
