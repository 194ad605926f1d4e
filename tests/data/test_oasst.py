"""OASST: both layouts give the same seed data, every drop has a reason, and splits never share a prompt."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
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
    return [row | {"parent_id": parent}] + [r for child in node["replies"] for r in flat(child, node["message_id"])]


def load(path, trees, layout="trees", **options):
    rows = [{"prompt": node} for node in trees] if layout == "trees" else [r for node in trees for r in flat(node)]
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
    "reply_no_rank": 2,
    "reply_of_dropped": 5,
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
    assert dict(zip(by_id["p1"].replies, by_id["p1"].ranks, strict=True)) == {f"reply p1.{r}": r for r in range(3)}


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
    assert seed.drops == {"no_reply": 1, "reply_of_dropped": 1, "reply_synthetic": 1, "synthetic": 1}


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
    twice = [good_tree("a"), tree("a", reply("a.0", 0), reply("a.9", 9))]
    for layout in ("trees", "flat", "shuffled"):
        seed = load(tmp_path / "b", twice, layout)
        assert seed.drops == {"duplicate_id": 2}
        assert sorted(seed.sets[0].replies) == ["reply a.0", "reply a.1", "reply a.2", "reply a.9"]


def test_tables_write_ranks_as_floats(tmp_path):
    rows = [(1, message("p", "hello there", "prompter", parent_id=None, rank=float("nan")))]
    rows += [(2 + n, message(f"r{n}", f"answer {n}", parent_id="p", rank=float(n))) for n in range(2)]
    assert sorted(oasst.from_rows(rows, "hub").sets[0].ranks) == [0, 1]


def test_a_file_without_ranks_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no ranks: rank is null in every reply"):
        load(tmp_path / "x", [tree("a", reply("a.0", None)), tree("b", reply("b.0", None))])


def test_a_file_without_anything_usable_is_an_error(tmp_path):
    forest = [good_tree("a"), good_tree("b"), tree("c", lang="ru"), tree("d", lang=None)]
    with pytest.raises(UserError) as caught:
        load(tmp_path / "x", forest, lang="fr")
    assert caught.value.args == (
        f"{tmp_path / 'x'}: no usable first turn in language 'fr' (left out: 4 other_language, 6 reply_of_dropped; "
        "languages of the prompts: en (2), ru (1), none (1))",
    )


def test_bad_files_are_lines(tmp_path):
    path = tmp_path / "x"
    path.write_text(json.dumps(message("a", parent_id=None)) + '\n\n{"message_id": 3}\n[]\n')
    with pytest.raises(UserError, match=f"^{path}:4: an object a line is needed"):
        oasst.load(path)
    path.write_text(json.dumps(message("a", parent_id=None)) + '\n\n{"message_id": 3}\n')
    with pytest.raises(UserError, match=f"^{path}:3: 'message_id' must be a string; 'text' must"):
        oasst.load(path)


def test_a_file_of_circles_alone_is_one_line():
    rows = [message("a", "x", "prompter", parent_id="b"), message("b", parent_id="a", rank=0)]
    with pytest.raises(UserError) as caught:
        oasst.from_rows(enumerate(rows, 1), "made")
    assert caught.value.args == (
        "made: no usable first turn in language 'en' (left out: 2 cyclic; languages of the prompts: no prompts)",
    )


def test_gaps_close_and_ties_stay(tmp_path):
    ranks = {"a": 7, "b": 2, "c": 7, "d": 30, "e": 2}
    seed = load(tmp_path / "x", [tree("p", *[reply(id, rank) for id, rank in ranks.items()])])
    (found,) = seed.sets
    places = dict(zip(found.replies, found.ranks, strict=True))
    assert places == {f"reply {id}": place for id, place in {"a": 1, "b": 0, "c": 1, "d": 2, "e": 0}.items()}
    assert dict(oasst.summary(seed))["human pairs"] == 8  # of ten pairs, two are ties
    assert seed.examples == () and seed.drops == {"no_rank_0": 1}  # the best reply itself is not in the file


ROLES, LANGS = st.sampled_from(["assistant"] * 4 + ["prompter"]), st.sampled_from(["en"] * 4 + ["de", None])
SOME = st.fixed_dictionaries(
    {
        "message_id": st.sampled_from("abcdefghij"),
        "parent_id": st.sampled_from([None, None, *"abcdefgz"]),
        "text": st.sampled_from(["one", "two", " ONE", "three", "four", ""]),
        "role": ROLES,
        "lang": LANGS,
        "rank": st.none() | st.integers(0, 3),
        "deleted": st.booleans() | st.none(),
        "synthetic": st.booleans(),
        "labels": st.sampled_from([None, {"spam": {"value": 0.5}}, {"name": ["spam"], "value": [0.1]}]),
    }
)
ROOT = message("A", "a question", "prompter", parent_id=None)
REPLIES = [message(f"A{rank}", parent_id="A", rank=rank) for rank in range(2)]


@settings(max_examples=200)
@given(st.lists(SOME, max_size=20), st.booleans(), st.randoms(use_true_random=False))
def test_every_message_is_used_or_counted_once_in_any_order(some, drop_synthetic, rng):
    rows = [ROOT, *REPLIES, *({**row, "role": "prompter"} if row["parent_id"] is None else row for row in some)]
    seed = oasst.from_rows(enumerate(rows, 1), "made", drop_synthetic=drop_synthetic)
    about_results = {"no_rank_0", "one_ranked", "tied_ranks"}
    dropped = sum(count for reason, count in seed.drops.items() if reason not in about_results)
    assert seed.messages == len(rows) == seed.prompts + seed.replies + dropped
    assert seed.prompts == len(seed.examples) + seed.drops.get("no_rank_0", 0)
    assert seed.prompts == len(seed.sets) + seed.drops.get("one_ranked", 0) + seed.drops.get("tied_ranks", 0)
    assert all(count > 0 for count in seed.drops.values())
    rng.shuffle(rows)
    assert oasst.from_rows(enumerate(rows, 1), "made", drop_synthetic=drop_synthetic) == seed


def test_a_table_reads_as_lines_do(tmp_path):
    rows = [row for node in FOREST for row in flat(node)]
    columns = sorted({name for row in rows for name in row} - {"labels"})
    labels = {"q2": (["spam"], [0.5]), "q3.1": (["lang", "spam"], [0.0, 1.0]), "q8.0": (["spam"], [0.4])}
    table = {name: [row.get(name) for row in rows] for name in columns}
    table["rank"] = pa.array([float("nan") if rank is None else rank for rank in table["rank"]], pa.float64())
    given_ = [labels.get(row["message_id"]) for row in rows]
    table["labels"] = pa.array([one and {"name": one[0], "value": one[1]} for one in given_])
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert oasst.load(tmp_path / "a.parquet") == load(tmp_path / "a.jsonl", FOREST)


def test_the_summary_counts_what_is_there(tmp_path):
    seed = load(tmp_path / "a.jsonl", FOREST)
    messages = sum(len(flat(node)) for node in FOREST)
    assert oasst.summary(seed) == [
        ("messages read", messages),
        ("usable prompts", 10),
        ("usable replies", 15),
        ("mean replies a prompt", 1.5),
        ("prompts with a rank-0 reply", 6),
        ("ranked sets", 3),
        ("mean replies a ranked set", 7 / 3),
        ("most replies of a ranked set", 3),
        ("human pairs", 5),
        *((f"left out: {reason}", count) for reason, count in sorted(DROPS.items())),
    ]


def test_the_summary_is_an_aligned_table():
    seed = oasst.Seed(
        (oasst.Example("p", "q", "r", "oasst"),), (oasst.RankedSet("p", "q", tuple("abc"), (0, 1, 1)),),
        {"later_turn": 12345, "no_rank": 3}, 12352, 1, 3,
    )  # fmt: skip
    assert oasst.summary_table(seed).split("\n") == [
        "messages read                 12,352",
        "usable prompts                     1",
        "usable replies                     3",
        "mean replies a prompt           3.00",
        "prompts with a rank-0 reply        1",
        "ranked sets                        1",
        "mean replies a ranked set       3.00",
        "most replies of a ranked set       3",
        "human pairs                        2",
        "left out: later_turn          12,345",
        "left out: no_rank                  3",
    ]
    assert dict(oasst.summary(oasst.Seed((), (), {})))["mean replies a ranked set"] == 0


def test_an_id_may_be_half_a_surrogate_pair(tmp_path):
    forest = [tree("p", reply("\ud83d", 0), reply("\ude00", 1))]
    assert len(load(tmp_path / "x", forest).sets[0].replies) == 2
