"""The Self-Instruct request, to the character, and the reading of completions."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.self_instruct.prompt import (
    build_request,
    cut_answers,
    pick_demonstrations,
    split_completion,
    split_completion_faithful,
)

SEEDS = [f"seed {n}" for n in range(20)]
MADE = [f"made {n}" for n in range(9)]


def test_the_request_to_the_character():
    tasks = ["Name a tree.", " Sort\nthese  words: ", *"cdefgh"]
    assert build_request(tasks) == (
        "Come up with a series of tasks:\n1. Name a tree.\n2. Sort these words\n"
        "3. c\n4. d\n5. e\n6. f\n7. g\n8. h\n9."
    )
    with pytest.raises(ValueError, match="needs a demonstration"):
        build_request([])


@pytest.mark.parametrize(("made", "wanted"), [(0, (8, 0)), (1, (7, 1)), (2, (6, 2)), (9, (6, 2))])
def test_six_seeds_and_two_generated(made, wanted):
    picked = pick_demonstrations(SEEDS, MADE[:made], random.Random(1))
    assert len(set(picked)) == 8
    assert (sum(p in SEEDS for p in picked), sum(p in MADE for p in picked)) == wanted


def test_demonstrations_are_shuffled_together():
    rng = random.Random(0)
    drawn = [pick_demonstrations(SEEDS, MADE, rng) for _ in range(50)]
    assert {place for picked in drawn for place, text in enumerate(picked) if text in MADE} == set(range(8))
    assert pick_demonstrations(SEEDS, MADE, random.Random(3)) == pick_demonstrations(SEEDS, MADE, random.Random(3))


def test_too_few_seeds():
    assert len(pick_demonstrations(SEEDS[:6], MADE[:2], random.Random(0))) == 8
    with pytest.raises(UserError, match="needs 8 different seed prompts, there are 7"):
        pick_demonstrations(SEEDS[:7], [], random.Random(0))


@pytest.mark.parametrize(
    ("completion", "reason", "items", "drops"),
    [
        (
            " Name a tree.\n10. Sort words.\n11. Write a poem.",
            "stop",
            ["Name a tree.", "Sort words.", "Write a poem."],
            {},
        ),
        (" Name a tree.\n10. Sort words.\n11. Write a po", "length", ["Name a tree.", "Sort words."], {"cut_off": 1}),
        (" Name a tr", "length", [], {"cut_off": 1}),
        (" One.\n10 . Two.", "stop", ["One.", "Two."], {}),
        (" One.\n10.Two.", "stop", ["One.\n10.Two."], {}),  # no space: not a number of the list, as in the original
        # A list inside an item belongs to it.
        (" Explain:\n1. this\n2. that\n10. Two.", "stop", ["Explain:\n1. this\n2. that", "Two."], {}),
        (" One.\n10. Two.\n12. Four.\n13. Five.", "stop", ["One.", "Two."], {"out_of_order": 2}),  # 11 was skipped
        (" One.\n10. Two.\n12. Four.\n1. a\n13. Fi", "length", ["One.", "Two."], {"out_of_order": 2}),
        (" One.\n10. Two.\n10. Two.", "length", ["One.", "Two."], {"out_of_order": 1}),  # or repeats
        (" One.\n10. \n11. Three.", "stop", ["One.", "Three."], {"empty": 1}),
        (" One.\n10. Two.\n11.", "stop", ["One.", "Two."], {"empty": 1}),  # the model stopped after a number
        (" One.\n10. Two.\n11.", "length", ["One.", "Two."], {}),
        # Paper A.5: after a separator the model answers.
        (" One.\n10. Two.\n---\nHere is an answer to", "length", ["One.", "Two."], {}),
        (" One.\n10. Two.\n### Answers\n11. x", "stop", ["One.", "Two."], {"behind_answers": 1}),
        (" One.\n\n10. Two.\n\n11. Thr", "length", ["One."], {"behind_answers": 2}),
        (" One.\n10. Two.\n\nOnce upon a ti", "length", ["One.", "Two."], {}),
        (" One.\nOutput: yes\n10. Two.", "stop", ["One."], {"behind_answers": 1}),
        (" One.\n**Answer:** yes\n1. Two.", "stop", ["One."], {}),
        ("\n\n One.\n10. Two.", "stop", ["One.", "Two."], {}),
        ("", "stop", [], {"empty": 1}),
        ("Response: hi", "stop", [], {"empty": 1}),
    ],
)
def test_splitting(completion, reason, items, drops):
    assert split_completion(completion, reason) == (items, drops)


def test_the_first_number_can_differ():
    assert split_completion("a\n4. b\n5. c", "stop", first_number=3) == (["a", "b", "c"], {})


def test_the_original_discards_a_cut_completion():
    text = " One.\n10. Two.\n3. Any number. "
    assert split_completion_faithful(text, "stop") == ([" One.", "Two.", "Any number. "], {})
    assert split_completion_faithful(text, "length") == ([], {"completion_cut_off": 1})
    assert split_completion_faithful(text + "\n16. x", "length") == ([" One.", "Two.", "Any number. "], {})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\n \t\nb", "a"),
        ("a\n  ---\nb", "a"),
        ("a\n--- b", "a"),
        ("a\n###b", "a"),
        ("a\n=====\nb", "a"),
        ("a\nanswers: b", "a"),
        ("a\nRESPONSE : b", "a"),
        ("a\n___\n", "a"),
        ("a -- b --- c", "a -- b --- c"),
        ("Give the answer: yes or no", "Give the answer: yes or no"),
        ("a\n***very*** big", "a\n***very*** big"),
        ("a\n- b\n- c", "a\n- b\n- c"),
        ("Output: a", ""),
        ("  \n a", "a"),
    ],
)
def test_where_a_list_ends(text, kept):
    assert cut_answers(text).removesuffix("\n") == kept


@settings(deadline=None, max_examples=100, database=None)
@given(
    st.lists(st.text("abc,. ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=7),
    st.text("ab\n -#:1.", max_size=30),
)
def test_a_written_list_is_read_back(items, answers):
    completion = " " + "\n".join([items[0], *(f"{n}. {item}" for n, item in enumerate(items[1:], start=10))])
    assert split_completion(completion, "stop") == (items, {})
    assert split_completion(completion, "length") == (items[:-1], {"cut_off": 1})
    assert split_completion(f"{completion}\n---\n{answers}", "length")[0] == items


@given(st.text("ab1 90.\n-", max_size=60), st.sampled_from(["stop", "length"]))
def test_a_completion_gives_an_instruction_or_a_reason(completion, reason):
    items, drops = split_completion(completion, reason)
    assert items or drops or reason == "length"
    assert all(count > 0 for count in drops.values())
    assert len(items) + drops["empty"] + drops["cut_off"] + drops["out_of_order"] <= 1 + completion.count("\n")


@pytest.mark.parametrize("unit", ["\n", "\n ", " ", "\t", "*", "=", "\n10. ", "\n9", "\n*", "answer", "\nanswer "])
def test_long_completions_take_linear_time(unit):
    seconds = []
    for many in (12_500, 50_000):
        start = time.process_time()  # a machine that does something else does not count
        for text in (unit * many, "a" + unit * many, "a\n" + unit * many + "b"):
            split_completion(text, "stop")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 8 * seconds[0] + 0.5  # 4 times is linear, 16 times quadratic
