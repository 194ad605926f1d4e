"""Judge examples and prompts from files: what is read, and every line that is wrong."""

import json
import sys
from types import ModuleType

import pytest

from selfreward_jax.data.records import RankedSet
from selfreward_jax.data.seeds import held_out_sets, hub_rows, judge_rows, packaged, prompt_texts
from selfreward_jax.errors import UserError

GOOD = {"instruction": "Name a colour.", "response": "Blue.", "justification": "It names one.", "score": 5}


def file_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in line for line in caught.value.args)
    return list(caught.value.args)


# Judge examples.


def test_judge_examples_get_an_id_a_set_and_the_training_split(tmp_path):
    path = file_of(tmp_path, GOOD, GOOD | {"id": "mine", "set": "a", "split": "heldout"})
    assert judge_rows(str(path), 0, 5) == [
        GOOD | {"id": "line-1", "set": "line-1", "split": "train"},
        GOOD | {"id": "mine", "set": "a", "split": "heldout"},
    ]


def test_the_packaged_judge_examples():
    rows = judge_rows("seed", 0, 5)
    assert len(rows) == len(packaged("judge.jsonl").read_text().splitlines())
    assert {row["split"] for row in rows} == {"train", "heldout"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (GOOD | {"score": 6}, "score 6 is outside 0..5"),
        (GOOD | {"score": -1}, "score -1 is outside 0..5"),
        (GOOD | {"score": "5"}, "score must be int"),
        (GOOD | {"score": 4.5}, "score must be int"),
        (GOOD | {"score": True}, "score must be int"),
        ({k: v for k, v in GOOD.items() if k != "response"}, "response must be str"),
        (GOOD | {"justification": None, "score": None}, "justification must be str, score must be int"),
        (GOOD | {"set": 3}, "set must be str"),
        (GOOD | {"id": 3}, "id must be str"),
        (GOOD | {"split": "test"}, "split 'test' is not train or heldout"),
        (GOOD | {"id": "line-1"}, "id 'line-1' was there before"),
    ],
)
def test_a_bad_judge_example_is_a_line_with_its_number(tmp_path, row, says):
    path = file_of(tmp_path, GOOD, row, GOOD)
    assert lines_of(lambda: judge_rows(str(path), 0, 5)) == [f"{path}:2: {says}"]


def test_the_range_of_scores_is_the_templates(tmp_path):
    path = file_of(tmp_path, GOOD | {"score": 10})
    assert judge_rows(str(path), 1, 10)[0]["score"] == 10
    assert len(lines_of(lambda: judge_rows(str(path), 0, 5))) == 1


def test_bad_judge_examples_are_all_listed_up_to_ten(tmp_path):
    path = file_of(tmp_path, *[GOOD | {"score": 9}] * 3)
    assert [line.split(": ")[0] for line in lines_of(lambda: judge_rows(str(path), 0, 5))] == [
        f"{path}:{number}" for number in (1, 2, 3)
    ]
    path = file_of(tmp_path, *[GOOD | {"score": 9}] * 30)
    assert len(lines_of(lambda: judge_rows(str(path), 0, 5))) == 10


@pytest.mark.parametrize("read", [lambda path: judge_rows(path, 0, 5), lambda path: prompt_texts(path, "")])
def test_files_that_do_not_read(tmp_path, read):
    missing = tmp_path / "none.jsonl"
    assert lines_of(lambda: read(str(missing))) == [f"{missing}: no such file"]
    path = file_of(tmp_path)
    assert lines_of(lambda: read(str(path))) == [f"{path}: the file is empty"]
    path = file_of(tmp_path, GOOD | {"prompt": "Say so."}, "{not json", "[1]")
    broken, listed = lines_of(lambda: read(str(path)))
    assert broken.startswith(f"{path}:2: not JSON (")
    assert listed == f"{path}:3: an object a line is needed, a list with something else found"


# Held-out examples as ranked sets.


def judged(name, response, score, split="heldout"):
    return {
        "set": name,
        "instruction": f"instruction of {name}",
        "response": response,
        "score": score,
        "split": split,
    }


def test_held_out_examples_are_ranked_by_their_scores():
    rows = [
        judged("b", "poor", 1),
        judged("a", "fair", 3),
        judged("b", "best", 5),
        judged("a", "equal", 3),
        judged("a", "worse", 0),
        judged("b", "other", 9, split="train"),
    ]
    assert held_out_sets(rows) == [
        RankedSet("a", "instruction of a", ("fair", "equal", "worse"), (0, 0, 1)),
        RankedSet("b", "instruction of b", ("poor", "best"), (1, 0)),
    ]


def test_a_set_that_orders_nothing_is_left_out():
    assert held_out_sets([judged("a", "x", 3), judged("b", "y", 2), judged("b", "z", 2)]) == []
    assert held_out_sets([judged("a", "x", 3, split="train"), judged("a", "y", 1, split="train")]) == []


# Prompts.


def test_prompts_are_read_under_three_names(tmp_path):
    path = file_of(
        tmp_path,
        {"id": 7, "prompt": "One?"},
        {"text": " Two? "},
        {"instruction": "Three?", "prompt": None, "more": []},
    )
    assert prompt_texts(str(path), "test.jsonl") == [("7", "One?"), ("line-2", " Two? "), ("line-3", "Three?")]


def test_without_a_file_the_packaged_prompts_are_read():
    assert len(prompt_texts("", "validation.jsonl")) == 64
    assert prompt_texts("", "validation.jsonl") != prompt_texts("", "test.jsonl")


def test_bad_prompts_are_lines_with_their_numbers(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "One?"},
        {"question": "Two?"},
        {"prompt": " \n"},
        {"prompt": 4},
        {"id": "line-1", "text": "x"},
    )
    no_text = "no text under 'prompt', 'text' or 'instruction'"
    assert lines_of(lambda: prompt_texts(str(path), "")) == [
        *(f"{path}:{number}: {no_text}" for number in (2, 3, 4)),
        f"{path}:5: id 'line-1' was there before",
    ]
    path = file_of(tmp_path, *[{"a": 1}] * 30)
    assert len(lines_of(lambda: prompt_texts(str(path), ""))) == 10


# The hub.


@pytest.fixture
def hub(monkeypatch):
    """`hub(function)`: a `datasets` package whose `load_dataset` is this function."""

    class DatasetsError(Exception):
        pass

    def make(load_dataset):
        exceptions = ModuleType("datasets.exceptions")
        exceptions.DatasetsError = DatasetsError
        package = ModuleType("datasets")
        package.load_dataset, package.exceptions = load_dataset, exceptions
        monkeypatch.setitem(sys.modules, "datasets", package)
        monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
        return DatasetsError

    return make


def test_rows_of_the_hub_are_numbered(hub):
    asked = []
    hub(lambda name, split: asked.append((name, split)) or [{"message_id": "a"}, {"message_id": "b"}])
    assert hub_rows("org/name") == [(1, {"message_id": "a"}), (2, {"message_id": "b"})]
    assert asked == [("org/name", "train")]


@pytest.mark.parametrize(
    ("error", "message", "reason"),
    [(OSError, "no network\nsecond line", "no network"), (ValueError, "", "ValueError"), (None, "gone", "gone")],
)
def test_a_hub_that_fails_is_one_line(hub, error, message, reason):
    def load_dataset(name, split):
        raise (error or own)(message)

    own = hub(load_dataset)
    assert lines_of(lambda: hub_rows("org/name")) == [
        f"--config.data.oasst=org/name: the hub gave no such data set ({reason}); name a file"
    ]
