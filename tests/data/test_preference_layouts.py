"""Layouts of preference rows: each gives a prompt and two answers, and what says nothing is dropped or wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_rows import lines_of, said, shared, write

from selfreward_jax.data import layouts, records
from selfreward_jax.data.records import Pair, Preference

DPO = "--config.data.preferences"
IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}


def preferences_of(tmp_path, *rows, name="rows.jsonl"):
    """(prompt, chosen, rejected) of each preference, and the counts."""
    found, drops = layouts.read_preferences(write(tmp_path / name, rows), DPO)
    return [(one.prompt, one.chosen, one.rejected) for one in found], drops


def answer(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 1.5},
        {"prompt": said("2 + 2?"), "chosen": answer("4"), "rejected": answer("5")},
        {"chosen": said("2 + 2?", "4"), "rejected": said("2 + 2?", "5"), "score_chosen": 9.0},
        {"prompt": "2 + 2?", "chosen": answer("4"), "rejected": answer("5")},
        {"prompt": "2 + 2? ", "prompt_id": "x1", "chosen": said("2 + 2?", "4"), "rejected": said("2 + 2?", "5"),
         "messages": said("2 + 2?", "4")},
        {"prompt": said("2 + 2?"), "chosen": said("2 + 2?", "4"), "rejected": said("2 + 2?", "5")},
        {"chosen": shared(("human", "2 + 2?"), ("gpt", "4")), "rejected": shared(("human", "2 + 2?"), ("gpt", "5"))},
    ],
)  # fmt: skip
def test_each_layout_of_preferences_reads(tmp_path, row, name):
    assert preferences_of(tmp_path, row, name=name) == ([("2 + 2?", "4", "5")], {})


def test_a_system_message_opens_the_prompt_of_a_preference(tmp_path):
    rows = [
        {"prompt": said(("s", "Add."), "2 + 2?"), "chosen": answer("4"), "rejected": answer("5")},
        {
            "prompt": "2 + 2?",
            "chosen": said(("s", "Add."), "2 + 2?", "4"),
            "rejected": said(("s", "Add."), "2 + 2?", "5"),
        },
    ]
    assert preferences_of(tmp_path, *rows) == ([("Add.\n\n2 + 2?", "4", "5")] * 2, {})


def test_our_own_pairs_are_preferences(tmp_path):
    pair = Pair("p1", "q", 2, 0, "good", "poor", (1, 2), (3,), "4", "7/2")
    path = write(tmp_path / "pairs.jsonl", [records.to_json(pair)])
    assert layouts.read_preferences(path, DPO) == ([Preference("p1", "q", "good", "poor")], {})


def test_two_preferences_about_one_prompt_keep_two_ids(tmp_path):
    row = {"prompt_id": "p", "prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "x", [row, row | {"rejected": "c"}])
    assert [one.id for one in layouts.read_preferences(path, DPO)[0]] == ["p", "p-2"]


CHOICE = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHOICE | {"rejected": " a\n"}, "identical"),
        (CHOICE | {"chosen": " "}, "empty"),
        (CHOICE | {"rejected": None}, "empty"),
        (CHOICE | {"prompt": ""}, "empty"),
        (CHOICE | {"prompt": []}, "no_turn"),
        (CHOICE | {"chosen": []}, "no_turn"),
        (CHOICE | {"prompt": said("q", "r")}, "later_turn"),
        (CHOICE | {"prompt": said("q", "r", "s"), "chosen": answer("a"), "rejected": answer("b")}, "later_turn"),
        ({"chosen": said("q", "r", "s", "a"), "rejected": said("q", "r", "s", "b")}, "later_turn"),
        ({"chosen": said("q", "a"), "rejected": said("q", "b", "c")}, "later_turn"),
        ({"chosen": said("q", "a"), "rejected": said("other", "b")}, "different_prompts"),
        ({"chosen": said("q", "a"), "rejected": said(("s", "x"), "q", "b")}, "different_prompts"),
        ({"prompt": "other", "chosen": said("q", "a"), "rejected": said("q", "b")}, "different_prompts"),
        ({"chosen": said("q", [IMAGE]), "rejected": said("q", "b")}, "not_text"),
        ({"chosen": answer("a"), "rejected": answer("b")}, "no_turn"),
        ({"chosen": said("q", "a")[::-1], "rejected": said("q", "b")}, "wrong_order"),
    ],
)
def test_preferences_that_say_nothing_are_counted(tmp_path, row, reason):
    assert preferences_of(tmp_path, CHOICE, row, row) == ([("q", "a", "b")], {reason: 2})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing 'rejected'"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
         "missing 'prompt' (it may be left out where 'chosen' is a list of messages)"),
        (CHOICE | {"chosen": 1}, "'chosen' must be a string or a list of messages, an integer found"),
        (CHOICE | {"prompt": {"role": "user"}}, "'prompt' must be a string or a list of messages, an object found"),
        (CHOICE | {"rejected": ["b"]}, "a message of 'rejected' must be an object, a string found"),
    ],
)  # fmt: skip
def test_preferences_with_wrong_fields_are_lines(tmp_path, bad, says):
    path = write(tmp_path / "a.jsonl", [CHOICE, bad])
    assert lines_of(lambda: layouts.read_preferences(path, DPO)) == [f"{path}:2: {says}"]


texts = st.text(min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts, texts), max_size=4))
def test_texts_come_through_every_layout_unchanged(tmp_path_factory, turns):
    path = tmp_path_factory.mktemp("l") / "a.jsonl"
    turns = [*turns, ("q", "a", "b")]
    wanted = [turn for turn in turns if turn[1].strip() != turn[2].strip()]
    for make in (
        lambda question, good, poor: {"prompt": question, "chosen": good, "rejected": poor},
        lambda question, good, poor: {"prompt": question, "chosen": answer(good), "rejected": answer(poor)},
        lambda question, good, poor: {"chosen": said(question, good), "rejected": said(question, poor)},
    ):
        write(path, [make(*turn) for turn in turns])
        found, drops = layouts.read_preferences(str(path), DPO)
        assert [(one.prompt, one.chosen, one.rejected) for one in found] == wanted
        assert drops.total() == len(turns) - len(found)


def test_other_rows_are_shown_the_known_layouts(tmp_path):
    path = write(tmp_path / "b", [{"prompt": "a", "chosen": "b"}])
    first, *known = lines_of(lambda: layouts.read_preferences(path, DPO))
    assert first == f"{path}:1: no known layout (fields: prompt, chosen); known are:"
    assert known and all('"chosen"' in line and '"rejected"' in line for line in known)
