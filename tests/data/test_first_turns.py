"""First turns of OpenAssistant rows: which messages stand in one, why others do not, and every row that is wrong."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data.messages import first_turns
from selfreward_jax.data.rows import read_rows
from selfreward_jax.errors import UserError


def message(id, text="some text", role="assistant", **more):
    return {"message_id": id, "text": text, "role": role, "lang": "en"} | more


def reply(id, rank, **more):
    return message(id, f"reply {id}", rank=rank, **({"replies": []} | more))


def tree(id, *replies):
    return message(id, f"prompt {id}", "prompter", replies=list(replies))


def good_tree(id="r"):
    return tree(id, *[reply(f"{id}.{rank}", rank) for rank in range(3)])


def flat(node):
    """A root and its replies as flat rows."""
    below = [child | {"parent_id": node["message_id"]} for child in node["replies"]]
    return [node | {"parent_id": None}, *below]


def ids_and_drops(rows):
    """{prompt: ids of its replies}, and the counts."""
    turns, drops = first_turns(list(enumerate(rows, 1)), "made")
    return {turn.prompt.id: [one.id for one in turn.replies] for turn in turns}, drops


def lines_of(rows):
    with pytest.raises(UserError) as caught:
        first_turns(list(enumerate(rows, 1)), "made")
    return list(caught.value.args)


# What is wrong.

RANK = "'rank' must be an integer of at least 0, or null"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"message_id": 3, "text": "t", "role": "prompter"}, "'message_id' must be a string"),
        (message("b", rank="0"), RANK),
        (message("b", rank=True), RANK),
        (message("b", rank=0.5), RANK),
        (message("b", rank=float("inf")), RANK),
        (message("b", rank=-1), RANK),
        (message("b", None), "'text' must be a string"),
        (message("b", {"en": "text"}), "'text' must be a string"),
        (message("b", 7, deleted=True), "'text' must be a string"),
        (message("b", parent_id=["a"]), "'parent_id' must be a string or null"),
        (message("b", parent_id=1), "'parent_id' must be a string or null"),
        (message("b", role=None), "'role' must be a string"),
        (message("b", lang=["en"]), "'lang' must be a string or null"),
        (message("b", deleted="no"), "'deleted' must be a boolean"),
        (message("b", 7, synthetic=2), "'text' must be a string; 'synthetic' must be a boolean"),
        ({}, "'message_id' must be a string; 'text' must be a string; 'role' must be a string"),
    ],
)
def test_a_wrong_row_is_a_line_with_its_number(row, says):
    assert lines_of([message("a", parent_id=None), row, message("c"), row]) == [f"made:2: {says}", f"made:4: {says}"]


@pytest.mark.parametrize(
    "labels", [None, "spam", [], {"spam": 1}, {"name": None, "value": 3}, {"name": ["spam"], "value": []}]
)
def test_labels_of_another_form_label_nothing(labels):
    ((turn,), _) = first_turns([(1, message("a", parent_id=None, labels=labels))], "made")
    assert turn.prompt.spam == 0


def test_a_deleted_message_needs_no_text():
    assert ids_and_drops([message("a", None, parent_id=None, deleted=True)]) == ({"a": []}, {})


def test_wrong_nodes_of_trees_are_named_wherever_they_are():
    deep = reply("a.0", 0, replies=[message("a.x", None, replies=None), "a reply"])
    trees = [good_tree("ok"), tree("a", deep, reply("a.1", 1, replies="none")), "a tree", None]
    assert lines_of([{"prompt": node} for node in trees]) == [
        "made:2: 'replies' must be a list",
        "made:2: 'text' must be a string",
        "made:2: a message must be an object",
        "made:3: a message must be an object",
        "made:4: a message must be an object",
    ]


def test_rows_of_neither_layout_are_one_line():
    assert lines_of([{"instruction": "a"}] * 3) == [
        "made: not an OASST file: rows need 'prompt' (trees) or 'message_id' and 'parent_id'"
    ]
    assert lines_of([message("a"), {"prompt": good_tree()}]) == [
        "made:2: 'message_id' must be a string; 'text' must be a string; 'role' must be a string"
    ]


# Where messages stand.


def test_a_place_in_a_tree_counts_and_not_the_parent_that_it_names():
    node = good_tree()
    node["replies"][0] |= {"parent_id": "elsewhere", "replies": [message("x", parent_id=None)]}
    assert ids_and_drops([{"prompt": node}]) == ({"r": ["r.0", "r.1", "r.2"]}, {"later_turn": 1})


def test_circles_and_orphans_are_counted_at_any_depth():
    links = {
        "self": "self", "a": "b", "b": "a", "below": "b", "far": "below",  # circles, and what hangs from them
        "lost": "gone", "child": "lost", "grandchild": "child", "empty": "",
        "later": "r.0", "last": "later",
    }  # fmt: skip
    rows = [message(id, parent_id=parent) for id, parent in links.items()] + flat(good_tree())
    rng = random.Random(0)
    for _ in range(10):
        rng.shuffle(rows)
        assert ids_and_drops(rows) == ({"r": ["r.0", "r.1", "r.2"]}, {"cyclic": 5, "later_turn": 2, "orphan": 4})


@settings(max_examples=100)
@given(st.dictionaries(st.integers(0, 12), st.none() | st.integers(0, 14), max_size=12))
def test_where_chains_of_parents_end(links):
    """Against a walk of more steps than there are messages."""

    def reason(id):
        steps = 0
        while id is not None and steps < 30:
            if id not in links:
                return "orphan"
            id, steps = links[id], steps + 1
        return "cyclic" if id is not None else "later_turn" if steps > 2 else None

    rows = [message(f"n{id}", parent_id=None if parent is None else f"n{parent}") for id, parent in links.items()]
    turns, drops = ids_and_drops([*flat(good_tree()), *rows])
    assert drops == Counter(filter(None, map(reason, links)))
    used = [id for prompt, replies in turns.items() for id in (prompt, *replies)]
    assert sorted(used) == sorted(["r", "r.0", "r.1", "r.2", *(f"n{id}" for id in links if reason(id) is None)])


def chain(depth):
    """A tree with one branch: `depth` messages below its reply."""
    node = message("end")
    for place in range(depth - 1):
        node = message(f"m{place}", replies=[node])
    return tree("a", reply("a.0", 0, replies=[node]))


def test_no_depth_exhausts_the_stack(tmp_path):
    wanted = {"a": ["a.0"]}, {"later_turn": 10_000}
    assert ids_and_drops([{"prompt": chain(10_000)}]) == wanted
    rows = [message(f"m{place}", parent_id=f"m{place - 1}" if place else "a.0") for place in range(10_000)]
    assert ids_and_drops([*flat(tree("a", reply("a.0", 0))), *rows]) == wanted
    rows = [message(f"m{place}", parent_id=f"m{(place + 1) % 10_000}") for place in range(10_000)]
    assert ids_and_drops(rows) == ({}, {"cyclic": 10_000})
    path = tmp_path / "deep.jsonl"
    path.write_text(json.dumps({"prompt": chain(200)}))
    assert first_turns(read_rows(path), "made")[1] == {"later_turn": 200}
    # A text so deep is refused by JSON's own reader, and that is a line as well.
    path.write_text('{"a":1}\n{"prompt":' + '{"replies":[' * 10_000 + "]}" * 10_000 + "}")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert caught.value.args == (f"{path}:2: not JSON that can be read (nested too deep)",)


# One id, one message.


def test_a_root_is_kept_before_a_reply_of_its_id():
    rows = [*flat(good_tree()), message("r", "aaa", parent_id="r"), message("r", "aaa", parent_id="gone")]
    for order in (rows, rows[::-1]):
        assert ids_and_drops(order) == ({"r": ["r.0", "r.1", "r.2"]}, {"duplicate_id": 2})


@given(st.permutations([message("a", text, parent_id=None, rank=rank) for text in "xyz" for rank in (1, 0)]))
def test_which_of_a_repeated_id_is_kept_depends_on_no_order(rows):
    turns, drops = first_turns(list(enumerate(rows, 1)), "made")
    assert [(turn.prompt.text, turn.prompt.rank) for turn in turns] == [("x", 0)]
    assert drops == {"duplicate_id": 5}
