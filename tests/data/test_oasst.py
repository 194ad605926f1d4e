"""OASST: both layouts give the same seed data, every drop has a reason, and splits never share a prompt."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import oasst
from selfreward_jax.errors import UserError


def message(id, text: str | None = "some text", role="assistant", **more):
    return {"message_id": id, "text": text, "role": role, "lang": "en"} | more


def tree(id, *replies, **more):
    return message(id, more.pop("text", f"prompt {id}"), "prompter", replies=list(replies), **more)


def reply(id, rank, **more):
    return message(id, more.pop("text", f"reply {id}"), rank=rank, replies=more.pop("replies", []), **more)


def good_tree(id, size=3):
    return tree(id, *[reply(f"{id}.{rank}", rank) for rank in range(size)])


def flat(node, parent=None):
    row = {key: value for key, value in node.items() if key != "replies"}
    return [row | {"parent_id": parent}] + [
        r for child in node["replies"] for r in flat(child, node["message_id"])
    ]


def load(path, trees, layout="trees", **options):
    rows = (
        [{"prompt": node} for node in trees]
        if layout == "trees"
        else [r for node in trees for r in flat(node)]
    )
    if layout == "shuffled":
        random.Random(3).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return oasst.load(path, **options)


FOREST = [
    good_tree("p1"),
    tree("p2", reply("p2.0", 0), text="only one"),
    tree("p3", reply("p3.0", None), text="unranked"),
    tree("p4", text="unanswered"),
    tree("p5", reply("p5.0", 0, deleted=True), reply("p5.1", 1), reply("p5.2", 2)),
    tree("p6", reply("p6.0", 0, text=" \n"), reply("p6.1", 1, lang="de"), reply("p6.2", 2)),
    tree("p7", reply("p7.0", 0), reply("p7.1", 1), reply("p7.2", None)),
    tree("p8", reply("p8.0", 0), lang="ru"),
    tree("p9", reply("p9.0", 0), text="  "),
    tree("q1", reply("q1.0", 0), deleted=True),
    tree("q2", reply("q2.0", 0), labels={"spam": {"value": 0.5, "count": 4}}),
    tree("q3", reply("q3.0", 0), reply("q3.1", 1, labels={"name": ["lang", "spam"], "value": [0.0, 1.0]})),
    tree("q4", reply("q4.0", 0), text="Prompt  P1"),
    tree("q5", reply("q5.0", 0, replies=[message("q5.x", role="prompter", replies=[reply("q5.y", 0)])])),
    tree("q6", reply("q6.0", 1), reply("q6.1", 1)),
    tree("q7", reply("q7.0", 0, role="prompter"), reply("q7.1", 1)),
    tree("q8", reply("q8.0", 0, labels={"spam": {"value": 0.4}}), synthetic=True),
]
DROPS = {
    "no_rank": 1,
    "no_reply": 1,
    "other_language": 1,
    "empty": 1,
    "deleted": 1,
    "spam": 1,
    "duplicate_prompt": 1,
    "reply_deleted": 1,
    "reply_empty": 1,
    "reply_other_language": 1,
    "reply_no_rank": 1,
    "reply_spam": 1,
    "reply_wrong_role": 1,
    "no_rank_0": 4,
    "one_ranked": 6,
    "tied_ranks": 1,
    "later_turn": 2,
}


@pytest.mark.parametrize("layout", ["trees", "flat", "shuffled"])
def test_what_is_used_and_what_is_dropped(tmp_path, layout):
    seed = load(tmp_path / "a.jsonl", FOREST, layout)
    assert [example.id for example in seed.examples] == ["p1", "p2", "p7", "q3", "q5", "q8"]
    assert seed.examples[0] == oasst.Example("p1", "prompt p1", "reply p1.0", "oasst")
    assert [item.id for item in seed.sets] == ["p1", "p5", "p7"]
    assert seed.drops == dict(sorted(DROPS.items()))


def test_ranks_stay_with_their_replies_and_start_at_0(tmp_path):
    by_id = {item.id: item for item in load(tmp_path / "a.jsonl", FOREST).sets}
    assert dict(zip(by_id["p5"].replies, by_id["p5"].ranks, strict=True)) == {
        "reply p5.1": 0,
        "reply p5.2": 1,
    }
    assert dict(zip(by_id["p1"].replies, by_id["p1"].ranks, strict=True)) == {
        f"reply p1.{r}": r for r in range(3)
    }


def test_layouts_and_orders_give_the_same_data(tmp_path):
    forest = [good_tree(f"t{n}", 2 + n % 3) for n in range(20)]
    seeds = [load(tmp_path / layout, forest, layout) for layout in ("trees", "flat", "shuffled")]
    seeds.append(load(tmp_path / "backwards", forest[::-1]))
    assert all(seed == seeds[0] for seed in seeds)


def test_replies_are_shuffled_by_the_seed(tmp_path):
    forest = [good_tree(f"t{n}") for n in range(120)]
    first = load(tmp_path / "a", forest)
    at_front = sum(item.ranks[0] == 0 for item in first.sets)
    assert 20 <= at_front <= 60  # a third of 120, not all of them
    assert load(tmp_path / "a", forest) == first
    assert load(tmp_path / "a", forest, seed=1).sets != first.sets


def test_synthetic_messages_go_out_on_request(tmp_path):
    forest = [
        good_tree("a"),
        tree("b", reply("b.0", 0), synthetic=True),
        tree("c", reply("c.0", 0, synthetic=True)),
    ]
    assert len(load(tmp_path / "x", forest).examples) == 3
    seed = load(tmp_path / "x", forest, drop_synthetic=True)
    assert [example.id for example in seed.examples] == ["a"]
    assert seed.drops == {"no_reply": 1, "reply_synthetic": 1, "synthetic": 1}


def test_another_language(tmp_path):
    forest = [tree("r", reply("r.0", 0, lang="ru"), lang="ru"), good_tree("e")]
    assert [example.id for example in load(tmp_path / "x", forest, lang="ru").examples] == ["r"]


def test_orphans_and_repeated_ids_are_counted(tmp_path):
    rows = [
        *flat(good_tree("a")),
        message("x", parent_id="gone"),
        message("a", "zz", "prompter", parent_id=None),
    ]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    seed = oasst.load(path)
    assert seed.drops == {"duplicate_id": 1, "orphan": 1} and seed.examples[0].prompt == "prompt a"
    assert load(tmp_path / "b", [good_tree("a"), good_tree("a")]).drops == {"duplicate_id": 1}


def test_tables_write_ranks_as_floats(tmp_path):
    rows = [(1, message("p", "hello there", "prompter", parent_id=None, rank=float("nan")))]
    rows += [(2 + n, message(f"r{n}", f"answer {n}", parent_id="p", rank=float(n))) for n in range(2)]
    assert sorted(oasst.from_rows(rows, "hub").sets[0].ranks) == [0, 1]


def test_a_file_without_ranks_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no ranks: rank is null in every reply"):
        load(tmp_path / "x", [tree("a", reply("a.0", None)), tree("b", reply("b.0", None))])


def test_a_file_without_anything_usable_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match=r"no usable first turn in language 'fr' \(left out: 1 other_language\)"
    ):
        load(tmp_path / "x", [good_tree("a")], lang="fr")


def test_wrong_rows_are_named_by_line(tmp_path):
    path = tmp_path / "x"
    path.write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    message("a", role="prompter", parent_id=None),
                    {"message_id": 3, "text": "t", "role": "prompter"},
                    message("b", rank="0", parent_id="a"),
                    message("c", None, parent_id="a"),
                    message("d", rank=True),
                ],
            )
        )
    )
    with pytest.raises(UserError) as caught:
        oasst.load(path)
    assert caught.value.args == (
        f"{path}:2: 'message_id' must be a string",
        f"{path}:3: 'rank' must be an integer of at least 0, or null",
        f"{path}:4: 'text' must be a string",
        f"{path}:5: 'rank' must be an integer of at least 0, or null",
    )
    path.write_text('{"prompt": "a text", "response": "b"}')
    with pytest.raises(UserError, match="x:1: a message must be an object"):
        oasst.load(path)
    path.write_text('{"instruction": "a"}')
    with pytest.raises(UserError, match="not an OASST file"):
        oasst.load(path)


def test_deep_trees_load(tmp_path):
    node = reply("end", 0)
    for depth in range(150):
        node = message(f"m{depth}", replies=[node])
    path = tmp_path / "x"
    assert load(path, [tree("a", reply("a.0", 0, replies=[node]))]).drops == {
        "later_turn": 151,
        "one_ranked": 1,
    }


def seed_of(sets, examples):
    return oasst.Seed(
        tuple(oasst.Example(f"p{n}", f"prompt {n}", "r", "oasst") for n in range(examples)),
        tuple(oasst.RankedSet(f"p{n}", f"prompt {n}", ("a", "b"), (0, 1)) for n in range(sets)),
        {},
    )


@settings(deadline=None, max_examples=60, database=None)
@given(st.data(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
def test_parts_are_disjoint_and_lose_nothing(data, sets, more, seed):
    seed_data = seed_of(sets, sets + more)
    n_eval = data.draw(st.integers(-1, sets))
    left = 0 if n_eval == -1 else sets - n_eval
    n_train = data.draw(st.integers(-1, left))
    taken = sets if -1 in (n_eval, n_train) else n_eval + n_train
    n_ift = data.draw(st.integers(-1, sets + more - taken))
    parts = oasst.split(seed_data, n_ift, n_eval, n_train, seed)
    ids = [item.id for part in (parts.ift, parts.eft_train, parts.eft_eval, parts.rest) for item in part]
    assert sorted(ids) == sorted(example.id for example in seed_data.examples)
    assert len(parts.ift) == (sets + more - taken if n_ift == -1 else n_ift)
    assert len(parts.eft_eval) == (sets if n_eval == -1 else n_eval)
    backwards = oasst.Seed(seed_data.examples[::-1], seed_data.sets[::-1], {})
    assert oasst.split(backwards, n_ift, n_eval, n_train, seed) == parts


def test_a_split_is_the_same_on_every_machine():
    parts = oasst.split(seed_of(9, 20), 5, 3, 2, 0)
    assert [item.id for item in parts.eft_eval] == ["p1", "p3", "p6"]
    assert oasst.split(seed_of(9, 20), 9, 3, 2, 0).eft_eval == parts.eft_eval  # the size of IFT moves no set
    assert oasst.split(seed_of(9, 20), 5, 3, 2, 1) != parts


def test_asking_for_too_much_names_the_options():
    with pytest.raises(UserError) as caught:
        oasst.split(seed_of(4, 10), 20, 3, 2, 0)
    assert caught.value.args == (
        (
            "eft.train_sets=2: there are 1 ranked sets after the 3 for evaluation; "
            "lower eft.train_sets or set it to -1 (all)"
        ),
        (
            "data.ift_examples=20: there are 6 examples after the 4 sets for EFT; "
            "lower data.ift_examples or set it to -1 (all)"
        ),
    )
    with pytest.raises(UserError, match=r"eft\.eval_sets=5: there are 4 ranked sets"):
        oasst.split(seed_of(4, 10), 1, 5, 0, 0)
    with pytest.raises(UserError, match=r"data\.ift_examples=-2: must be -1"):
        oasst.split(seed_of(4, 10), -2, 1, 1, 0)
