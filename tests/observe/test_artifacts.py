"""What is found and read in a run's folder, whole or damaged, and in which state its stages are."""

import dataclasses
import json
import unicodedata

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax import config as configs
from selfreward_jax import workdir
from selfreward_jax.errors import UserError
from selfreward_jax.observe import artifacts

SETTINGS = {"target": "m2", "model.source": "demo", "seed": 0, "dpo.reference": "cached"}
# What lies in the run's folder: file -> the ids of its rows.
FILES = {
    "seed/ift": "i", "seed/eft_train_sets": "", "seed/eft_eval_sets": "r", "prompts/round-00000": "abc",
    "m2/prompts": "abc", "m2/responses/part-00000-of-00002": "aabb", "m2/responses/part-00001-of-00002": "cc",
    "m2/judgments/part-00000-of-00002": "aaaabbbb", "m2/judgments/part-00001-of-00002": "cccc", "m2/pairs": "ac",
    "m2/metrics/segment-00000": "01",
}  # fmt: skip


def write(path, keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": key}) + "\n" for key in keys))


@pytest.fixture
def root(tmp_path):
    """A run to M2 that has made its pairs and begun to train, made up."""
    root = epath.Path(tmp_path / "run")
    workdir.write_json(root / "config.json", SETTINGS)
    for name, keys in FILES.items():
        write(root / f"{name}.jsonl", keys)
    return root


def read(root, name):
    """The ids of an artifact's rows, and the problems."""
    look = artifacts.open_look(root)
    return "".join(row["id"] for row in artifacts.rows(look, look.artifacts[name])), look.problems


@pytest.mark.parametrize("content", [None, '{"vocab_size": 5}', "[1]"])
def test_what_is_no_workdir_is_one_line(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        artifacts.open_look(epath.Path(tmp_path))
    assert caught.value.args == (
        f"{tmp_path}: not the workdir of a run: it has no config.json of one, and no stages",
    )
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"no such folder; the workdir of a run is needed$") as caught:
            artifacts.open_look(epath.Path(path))
        assert len(caught.value.args) == 1


def test_artifacts_are_found_in_the_order_of_the_loop(root):
    for name in ("m1/eft_train", "m10/pairs", "m2/check/own", "sft/model/tokenizer", "m2/params/x", "m2/.hidden"):
        write(root / f"{name}.jsonl", "")
    (root / "m2" / "responses" / ".part-00000-of-00002.jsonl.77.tmp").write_text("half")
    found = artifacts.open_look(root).artifacts
    assert list(found) == [
        "seed/eft_eval_sets", "seed/eft_train_sets", "seed/ift", "prompts", "m1/eft_train", "m2/prompts",
        "m2/responses", "m2/judgments", "m2/pairs", "m2/check/own", "m2/metrics", "m10/pairs",
    ]  # fmt: skip
    assert [file.name for file in found["m2/responses"].files] == [
        "part-00000-of-00002.jsonl",
        "part-00001-of-00002.jsonl",
    ]
    assert (found["m2/responses"].parts, found["prompts"].parts, found["m2/pairs"].parts) == (2, 0, 0)


def test_an_artifact_by_name_or_path(root, monkeypatch):
    look = artifacts.open_look(root)
    judgments, pairs = look.artifacts["m2/judgments"], look.artifacts["m2/pairs"]
    monkeypatch.chdir(root / "m2")
    for name in ("m2/judgments", "m2/judgments/", str(root / "m2" / "judgments"), "judgments"):
        assert artifacts.choose(look, name) == judgments
    for name in ("m2/pairs", "m2/pairs.jsonl", str(root / "m2" / "pairs.jsonl"), "pairs.jsonl", "../m2/pairs.jsonl"):
        assert artifacts.choose(look, name) == pairs
    for name in ("m2/judgments/part-00001-of-00002.jsonl", "judgments/part-00001-of-00002.jsonl"):
        one = artifacts.choose(look, name)
        assert one == dataclasses.replace(judgments, files=judgments.files[1:])
        assert [row["id"] for row in artifacts.rows(look, one)] == list("cccc")


@pytest.mark.parametrize(
    "name", ["m2", "m3/pairs", "m2/pair", "config.json", "../other.jsonl", "m2/metrics.jsonl/x", "."]
)
def test_an_unknown_artifact_is_one_line_with_those_that_are_there(root, name):
    write(root.parent / "other.jsonl", "")
    with pytest.raises(UserError) as caught:
        artifacts.choose(artifacts.open_look(root), name)
    assert caught.value.args == (
        f"{name}: no such artifact; there are: seed/eft_eval_sets, seed/eft_train_sets, seed/ift, prompts, m2/prompts,"
        " m2/responses, m2/judgments, m2/pairs, m2/metrics",
    )


DAMAGE = {
    "cut": (b'{"id":"x","text":"half', ":4: not JSON"),
    "no object": (b"7\n", ":4: an object a line is needed"),
    "no text": (b'{"id":"\xff"}\n', ":4: not UTF-8"),
    "several": (
        b"{\n{\n{\n",
        ":4: not JSON (Expecting property name enclosed in double quotes, column 2) (3 bad lines)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_one_problem_and_its_rest_is_read(root, kind):
    content, says = DAMAGE[kind]
    path = root / "m2" / "prompts.jsonl"
    path.write_bytes(path.read_bytes() + content)
    keys, problems = read(root, "m2/prompts")
    assert keys == "abc"
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}{says}")


def test_a_part_that_is_gone_or_no_file_is_one_problem(root):
    look = artifacts.open_look(root)
    path = root / "m2" / "responses" / "part-00000-of-00002.jsonl"
    path.unlink()
    assert [row["id"] for row in artifacts.rows(look, look.artifacts["m2/responses"])] == ["c", "c"]
    assert len(look.problems) == 1
    assert str(path) in look.problems[0]
    path.mkdir()
    assert read(root, "m2/responses") == ("cc", [f"{path}: is a folder, a file is needed"])
    (root / "m2" / "pairs.jsonl").write_bytes(b"\x1f\x8bnot gzip")
    assert len(read(root, "m2/pairs")[1]) == 1
    assert read(root, "seed/eft_train_sets") == ("", [])  # a file of no rows is none


def test_of_long_values_the_length_is_kept(root):
    row = {"id": "x" * 60, "text": "x" * 61, "ids": [5, 6], "new": {"a": 1}, "none": None, "score": 1.5}
    (root / "m2" / "pairs.jsonl").write_text(json.dumps(row))
    look = artifacts.open_look(root)
    slim, drawn = artifacts.gather(look, look.artifacts["m2/pairs"], 1, 0)
    sizes = {"text": (61, "characters"), "ids": (2, "items"), "new": (1, "items")}
    assert slim == [row | {name: artifacts.Size(*size) for name, size in sizes.items()}]
    assert drawn == [row]


def test_examples_depend_on_the_seed_alone_and_each_row_is_as_likely(root):
    write(root / "m2" / "prompts.jsonl", "0123456789")
    look = artifacts.open_look(root)

    def drawn(count, seed):
        return [row["id"] for row in artifacts.gather(look, look.artifacts["m2/prompts"], count, seed)[1]]

    assert drawn(3, 5) == drawn(3, 5)
    assert drawn(99, 0) == list("0123456789")
    assert drawn(0, 0) == []
    times = [0] * 10
    for seed in range(400):
        some = drawn(3, seed)
        assert some == sorted(set(some))
        assert len(some) == 3
        for key in some:
            times[int(key)] += 1
    # Binomial with n 400 and p 0.3: mean 120, standard deviation 9.2.
    assert min(times) > 120 - 4 * 9.2 and max(times) < 120 + 4 * 9.2


def test_long_reading_says_how_far_it_is(root, monkeypatch, capsys):
    read(root, "m2/judgments")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(artifacts, "QUIET", -1.0)
    read(root, "m2/judgments")
    assert capsys.readouterr() == ("", "reading m2/judgments: 0 of 2 files\nreading m2/judgments: 1 of 2 files\n")


def test_the_plan_is_the_recipes():
    from selfreward_jax import recipe  # imports jax

    for target in ("sft", "m1", "m2", "m3", "m10"):
        for changes in ({}, {"dpo.reference": "live"}, {"aift.method": "positives"}, {"eft.source": "none"}):
            settings = configs.Config(target=target)
            for name, value in changes.items():
                group, field = name.split(".")
                part = dataclasses.replace(getattr(settings, group), **{field: value})
                settings = dataclasses.replace(settings, **{group: part})
            stages = [stage.name for stage in recipe.stages(settings)]
            assert artifacts.planned(configs.flat(settings)) == stages, (target, changes)
    old = {name: value for name, value in configs.flat(configs.Config(target="m2")).items() if "aift" not in name}
    assert "m2/pairs" in artifacts.planned(old)
    assert artifacts.planned({"target": "all"}) == artifacts.planned({}) == []


def states(root):
    """The state of each stage that has begun, and the problems."""
    look = artifacts.open_look(root)
    found = {stage: state for stage, (state, _) in artifacts.stages(look).items() if state != "not begun"}
    return found, look.problems


def test_a_stage_has_begun_or_is_done(root):
    assert states(root) == ({}, [])  # rows alone make no stage
    workdir.finish(root, "m2/pairs", [], [], 61.27, {"pairs": 2})
    workdir.begin(root, "m2/train", {}, [], [])
    assert states(root) == ({"m2/pairs": "done", "m2/train": "in progress"}, [])
    found = artifacts.stages(artifacts.open_look(root))
    assert list(found) == artifacts.planned(SETTINGS)
    assert artifacts.facts(found["m2/pairs"][1]) == {"pairs": 2}
    assert artifacts.facts(found["m2/train"][1]) == artifacts.facts({"facts": [2]}) == {}


def test_a_stage_whose_output_is_gone_or_whose_record_is_damaged(root):
    write(root / "m2" / "eft_train.jsonl", "")
    workdir.finish(root, "m1/eft", [], [root / "m2" / "eft_train.jsonl"], 1.0, {"examples": 0})
    (root / "m2" / "eft_train.jsonl").unlink()
    for stage, content in {"m1/train": '{"stage": "m1/tr', "sft/train": "[]"}.items():
        workdir.finish(root, stage, [], [], 1.0, {})
        workdir.record_path(root, stage).write_text(content)
    found, problems = states(root)
    assert found == {"m1/eft": "outdated", "m1/train": "damaged", "sft/train": "damaged"}
    assert [line.split(": ", 1)[1] for line in problems] == [
        "an object is needed",
        "m2/eft_train.jsonl is gone, so the run would do this stage again",
        "not JSON on line 1; delete it to have its stage done again",
    ]


def test_stages_without_a_config_and_training_outside_the_loop(tmp_path):
    root = epath.Path(tmp_path)
    workdir.finish(root, "trained/data", [], [], 2.0, {"examples": 5})
    workdir.begin(root, "trained/train", {}, [], [])
    begun = {"trained/data": "done", "trained/train": "in progress"}
    for config in ({}, SETTINGS):
        workdir.write_json(root / "config.json", config)
        found = artifacts.stages(artifacts.open_look(root))
        assert {stage: state for stage, (state, _) in found.items()} == begun


@given(st.text(st.characters(), max_size=80))
def test_shown_text_holds_nothing_that_a_terminal_acts_on(text):
    shown = artifacts.visible(text)
    assert shown.count("\n") == text.count("\n")
    for char in shown:
        assert char == "\n" or unicodedata.category(char)[0] not in "C"
        assert char not in "\u2028\u2029"
    assert artifacts.visible(shown) == shown
    assert "\n" not in artifacts.short(text)
    assert len(artifacts.short(text, 20)) <= 20


@given(st.text(st.characters(categories=("L", "M", "N", "P", "S", "Zs"), include_characters="\n")))
def test_text_that_can_be_seen_is_shown_as_it_is(text):
    assert artifacts.visible(text) == text
