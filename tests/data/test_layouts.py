"""Layouts of example rows: rows as the field writes them, what is used of each, and what is dropped or wrong."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_rows import lines_of, said, shared, write

from selfreward_jax.data import layouts, records
from selfreward_jax.data.records import Example
from selfreward_jax.errors import UserError

IFT = "--config.data.ift"


def examples_of(tmp_path, *rows, name="rows.jsonl"):
    """(prompt, response) of each example, and the counts."""
    found, drops = layouts.read_examples(write(tmp_path / name, rows), IFT)
    return [(one.prompt, one.response) for one in found], drops


# Examples: one realistic row or more of each layout, as (rows, pairs, counts).

SORT = "How do I sort a list of numbers in Python?"
SORTED = "Use `sorted(numbers)`, which returns a new list."
LAYOUTS = {
    "prompt and response": ([{"prompt": SORT, "response": SORTED, "rating": 5}], [(SORT, SORTED)], {}),
    "prompt and completion": ([{"prompt": SORT, "completion": " " + SORTED}], [(SORT, " " + SORTED)], {}),
    "conversational prompt and completion": (
        [
            {"prompt": said(SORT), "completion": [{"role": "assistant", "content": SORTED}]},
            {"prompt": said(("s", "Be brief."), SORT), "completion": SORTED},
            {"prompt": said("Hi", "Hello!", SORT), "completion": [{"role": "assistant", "content": SORTED}]},
        ],
        [(SORT, SORTED), (f"Be brief.\n\n{SORT}", SORTED), ("Hi", "Hello!")],
        {"later_turn": 2},
    ),
    "messages": (
        [
            {"prompt_id": "7c1f", "messages": said(SORT, SORTED)},
            {"prompt_id": "09aa", "messages": said(("s", "You are terse."), "Peru?", "Lima.", "Chile?", "Santiago.")},
            {"prompt_id": "1b20", "messages": said(("s", " "), "Two plus two?", "Four.", "Sure?")},
        ],
        [(SORT, SORTED), ("You are terse.\n\nPeru?", "Lima."), ("Two plus two?", "Four.")],
        {"later_turn": 3},
    ),
    "ShareGPT": (
        [
            {"id": "QWJh_0", "conversations": shared(("human", SORT), ("gpt", SORTED), ("human", "Thanks!"))},
            {"id": "QWJh_1", "conversations": shared(("system", "Rhyme."), ("user", "Cat?"), ("assistant", "Hat."))},
        ],
        [(SORT, SORTED), ("Rhyme.\n\nCat?", "Hat.")],
        {"later_turn": 1},
    ),
    "Alpaca": (
        [
            {"instruction": "Classify the animal.", "input": "Whale", "output": "Mammal.", "text": "Below is ..."},
            {"instruction": "Name three primary colours.", "input": "", "output": "Red, yellow, blue."},
            {"instruction": "Say hello.", "input": None, "output": "Hello."},
            {"instruction": "", "input": "What is 3 + 4?", "output": "7"},
        ],
        [
            ("Classify the animal.\n\nWhale", "Mammal."),
            ("Name three primary colours.", "Red, yellow, blue."),
            ("Say hello.", "Hello."),
            ("What is 3 + 4?", "7"),
        ],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_reads_from_each_form(tmp_path, layout, name):
    rows, wanted, drops = LAYOUTS[layout]
    if name == "rows.parquet" and any(isinstance(row.get("completion"), str) for row in rows):
        rows = [row for row in rows if isinstance(row["completion"], type(rows[0]["completion"]))]  # a column, a type
        wanted = [pair for pair in wanted if not pair[0].startswith("Be brief.")]
    assert examples_of(tmp_path, *rows, name=name) == (wanted, drops)


def test_alpaca_without_inputs_and_mixed_spellings_of_messages(tmp_path):
    rows = [{"instruction": "Say hello.", "output": "Hello."}]
    assert examples_of(tmp_path, *rows) == ([("Say hello.", "Hello.")], {})
    rows = [{"conversations": said("a", "b")}, {"conversations": shared(("human", "c"), ("gpt", "d"))}]
    assert examples_of(tmp_path, *rows) == ([("a", "b"), ("c", "d")], {})


def test_our_own_examples_come_back_as_they_were(tmp_path):
    own = [Example("p1", "a", "b", "oasst"), Example("p2", "c", "d", "seed")]
    path = write(tmp_path / "ift.jsonl", map(records.to_json, own))
    assert layouts.read_examples(path, IFT) == (own, {})


def test_ids_and_sources(tmp_path):
    row = {"prompt": "a", "response": "b"}
    more = [
        {},
        {"id": "x"},
        {"id": 7},
        {"id": "x", "source": "web"},
        {"id": None, "source": 3},
        {"id": "x-7"},
        {"id": "x"},
    ]
    rows = [row | one for one in more]
    path = write(tmp_path / "my.data.jsonl", rows)
    found, drops = layouts.read_examples(path, IFT)
    assert [one.id for one in found] == ["my.data-1", "x", "7", "x-4", "my.data-5", "x-7", "x-7-7"]
    assert [one.source for one in found] == ["my.data"] * 3 + ["web"] + ["my.data"] * 3
    assert drops == {}


def test_a_name_of_the_hub_is_asked_for(monkeypatch):
    rows = [{"messages": said("a", "b")}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if split == "train_sft" else [])
    found, _ = layouts.read_examples("owner/some.data:train_sft", IFT)
    assert found == [Example("some.data-1", "a", "b", "some.data")]
    (line,) = lines_of(lambda: layouts.read_examples("owner/data", IFT))
    assert line.startswith(f"{IFT}=owner/data: split 'train' of this data set is empty; to read a file instead")


TEXT, IMAGE = {"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": "data:..."}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no_turn"),
        (None, "no_turn"),
        (said("only a question"), "no_turn"),
        ([{"role": "assistant", "content": "Hello, I am here."}], "no_turn"),
        ([{"role": "system", "content": "x"}], "no_turn"),
        (said("a", "b")[::-1], "wrong_order"),
        ([*said("a"), *said("b", "c")], "wrong_order"),
        ([*said("a"), {"role": "tool", "content": "{}"}, *said("x", "y")[1:]], "wrong_order"),
        ([*said(("s", "x")), *said(("s", "y"), "a", "b")], "wrong_order"),
        (said("  ", "b"), "empty"),
        (said("a", "\n"), "empty"),
        (said("a", None, "c", "d"), "empty"),
        (said(("s", "x"), "", "b"), "empty"),
        (said([TEXT, IMAGE], "b"), "not_text"),
        (said("a", [IMAGE]), "not_text"),
        (said(("s", [IMAGE]), "a", "b"), "not_text"),
    ],
)
def test_rows_without_a_first_turn_are_counted(tmp_path, messages, reason):
    rows = [{"messages": said("q", "r")}, {"messages": messages}, {"messages": messages}]
    assert examples_of(tmp_path, *rows) == ([("q", "r")], {reason: 2})


def test_parts_of_a_content_are_joined(tmp_path):
    parts = [TEXT, {"type": "text", "text": "this?"}]
    rows = [{"messages": said(parts, ["A ", {"text": "cat."}], [IMAGE])}]
    assert examples_of(tmp_path, *rows) == ([("What is this?", "A cat.")], {"later_turn": 1})
    table = [
        {"messages": said(parts, [{"text": "A cat."}])},
        {"messages": said([{"type": "image", "text": None}], [TEXT])},
    ]
    assert examples_of(tmp_path, *table, name="a.parquet") == ([("What is this?", "A cat.")], {"not_text": 1})


def test_an_unknown_layout_is_shown_the_known_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    first, *known = lines_of(lambda: layouts.read_examples(path, IFT))
    assert first == f"{path}:1: no known layout (fields: question, answer); known are:"
    for field in ("response", "completion", "messages", "conversations", "instruction"):
        assert sum(f'"{field}": ' in line for line in known) == 1
    assert lines_of(lambda: layouts.read_examples(write(tmp_path / "c", [{}]), IFT))[0].startswith(
        f"{tmp_path / 'c'}:1: no known layout (fields: none)"
    )


ROW, CHAT, ALPACA = (
    {"prompt": "a", "response": "b"},
    {"messages": said("a", "b")},
    {"instruction": "a", "output": "b"},
)


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (ROW, {"prompt": "a"}, "missing 'response'"),
        (ROW, {"messages": []}, "missing 'prompt' and 'response'"),
        (ROW, ROW | {"prompt": 3}, "'prompt' must be a string or a list of messages, an integer found"),
        (ROW, ROW | {"response": {"a": 1}}, "'response' must be a string or a list of messages, an object found"),
        (ROW, ROW | {"id": ["x"]}, "'id' must be a string or an integer, a list with something else found"),
        (ROW, ROW | {"id": True}, "'id' must be a string or an integer, a boolean found"),
        (ROW, ROW | {"prompt": ["a"]}, "a message of 'prompt' must be an object, a string found"),
        (CHAT, {"messages": "a"}, "'messages' must be a list of messages, a string found"),
        (
            CHAT,
            {"messages": [{"role": "user"}, {"content": "x"}]},
            "'role' in 'messages' must be a string, null found",
        ),
        (CHAT, {"messages": said("a", 5)}, "'content' must be a text or a list of parts, an integer found"),
        (CHAT, {"messages": said("a", [5])}, "a part of 'content' must be a text, an integer found"),
        (CHAT, {"messages": [{"from": 1}]}, "'from' in 'messages' must be a string, an integer found"),
        (ALPACA, ALPACA | {"input": ["x"]}, "'input' must be a string, a list with something else found"),
        (ALPACA, ALPACA | {"output": 4.5}, "'output' must be a string, a number found"),
    ],
)
def test_rows_with_wrong_fields_are_lines_with_their_numbers(tmp_path, good, bad, says):
    path = write(tmp_path / "a.jsonl", [good, bad, "", good, bad])
    assert lines_of(lambda: layouts.read_examples(path, IFT)) == [f"{path}:2: {says}", f"{path}:5: {says}"]


def test_ten_wrong_rows_are_enough_and_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW, *[ROW | {"response": 1}] * 14])
    assert len(lines_of(lambda: layouts.read_examples(path, IFT))) == 11
    path = write(tmp_path / "a.jsonl", [ROW | {"response": ""}] * 2)
    assert lines_of(lambda: layouts.read_examples(path, IFT)) == [f"{path}: no usable row (left out: 2 empty)"]
    assert lines_of(lambda: layouts.read_examples(str(tmp_path / "no.jsonl"), IFT)) == [
        f"{tmp_path / 'no.jsonl'}: no such file"
    ]


# Any text.


def answer(text):
    return [{"role": "assistant", "content": text}]


texts = st.text(min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_texts_come_through_every_layout_unchanged(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("l") / "a.jsonl"
    for make in (
        lambda question, good: {"prompt": question, "response": good},
        lambda question, good: {"prompt": said(question), "completion": answer(good)},
        lambda question, good: {"messages": said(question, good)},
        lambda question, good: {"conversations": shared(("human", question), ("gpt", good))},
        lambda question, good: {"instruction": question, "input": "", "output": good},
    ):
        write(path, [make(*pair) for pair in wanted])
        found, drops = layouts.read_examples(str(path), IFT)
        assert [(one.prompt, one.response) for one in found] == wanted and not drops
        assert len({one.id for one in found}) == len(wanted)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "tool"])
message_like = st.fixed_dictionaries({"role": roles | json_values, "content": json_values})


@settings(max_examples=200)
@given(st.data())
def test_no_row_is_a_traceback(tmp_path_factory, data):
    """Whatever stands in the fields, a row is used, counted or a line."""
    value = json_values | st.lists(message_like, max_size=3)
    fields = data.draw(
        st.sampled_from([*(layout.fields for layout in layouts.EXAMPLES), ("prompt", "chosen", "rejected")])
    )
    row = {field: data.draw(value) for field in fields}
    path = write(tmp_path_factory.mktemp("any") / "a.jsonl", [row])
    read = layouts.read_preferences if "chosen" in fields else layouts.read_examples
    try:
        found, _ = read(path, IFT)
        assert len(found) == 1 and found[0].prompt.strip()
    except UserError as error:
        (line,) = error.args
        assert line.startswith((f"{path}:1: ", f"{path}: no usable row (left out: 1 ")) and "\n" not in line
