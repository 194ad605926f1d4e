"""Judge examples and prompts from files: what is read, and every line that is wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from selfreward_jax.config import EftConfig
from selfreward_jax.data.records import RankedSet
from selfreward_jax.data.seeds import (
    evaluation_texts,
    held_out_sets,
    hub_rows,
    judge_rows,
    measuring_sets,
    packaged,
    prompt_texts,
    rows_of,
)
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


@pytest.mark.parametrize("source", ["file", "none", "build"])
def test_held_out_judge_examples_of_a_named_file_measure_every_judge(source):
    assert len(measuring_sets(EftConfig(source=source, file="seed"), 0, 5)) == 8
    assert measuring_sets(EftConfig(source=source, file=""), 0, 5) == []


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


def test_turns_are_prompts_too_the_first_to_answer_and_all_to_avoid(tmp_path):
    path = file_of(tmp_path, {"question_id": 81, "turns": ["Write a post.", "Rewrite it."]}, {"prompt": "One?"})
    assert prompt_texts(str(path), "") == [("line-1", "Write a post."), ("line-2", "One?")]
    assert evaluation_texts(str(path)) == ["Write a post.", "Rewrite it.", "One?"]
    bad = file_of(tmp_path, {"turns": []}, {"turns": "Write."}, {"prompt": "One?"})
    lines = lines_of(lambda: evaluation_texts(str(bad)))
    assert [line.split(": ")[0] for line in lines] == [f"{bad}:1", f"{bad}:2"]


def test_packaged_scores_outside_a_templates_range_are_no_error_of_the_user():
    assert {row["score"] for row in judge_rows("seed", 1, 5)} == set(range(6))


def test_bad_prompts_are_lines_with_their_numbers(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "One?"},
        {"question": "Two?"},
        {"prompt": " \n"},
        {"prompt": 4},
        {"id": "line-1", "text": "x"},
    )
    no_text = "no text under 'prompt', 'text', 'instruction' or 'turns'"
    assert lines_of(lambda: prompt_texts(str(path), "")) == [
        *(f"{path}:{number}: {no_text}" for number in (2, 3, 4)),
        f"{path}:5: id 'line-1' was there before",
    ]
    path = file_of(tmp_path, *[{"a": 1}] * 30)
    assert len(lines_of(lambda: prompt_texts(str(path), ""))) == 10


def test_prompts_from_a_table_whose_ids_have_gaps(tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"id": [7, None], "prompt": ["One?", "Two?"]}), path)
    assert prompt_texts(str(path), "") == [("7", "One?"), ("line-2", "Two?")]


# The hub.

INSTEAD = "to read a file instead, give --config.data.ift=FILE (jsonl, json, gz or parquet)"


@pytest.fixture
def hub(monkeypatch):
    """`hub(function)`: `datasets.load_dataset` is this function."""
    return lambda load_dataset: monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_rows_of_the_hub_are_numbered_and_plain(hub):
    asked = []
    table = [{"message_id": "a", "rank": float("nan")}, {"message_id": "b", "rank": 0, "labels": {"value": [0.5]}}]
    hub(lambda name, split: asked.append((name, split)) or table)
    wanted = [(1, {"message_id": "a", "rank": None}), (2, table[1])]
    assert hub_rows("org/name", "--config.data.ift") == wanted
    assert hub_rows("org/name", "--config.data.ift", "validation") == wanted
    assert asked == [("org/name", "train"), ("org/name", "validation")]


class HTTPError(Exception):
    """As the hub's client raises it: an HTTP library's error, no OSError, which carries the answer."""

    def __init__(self, status):
        super().__init__(f"Client error '{status}' for url 'https://hub/datasets/org/name'\nFor more information see")
        self.response = SimpleNamespace(status_code=status)


def of(error, cause):
    error.__cause__ = cause
    return error


ANSWER = "Client error '{}' for url 'https://hub/datasets/org/name'"
LOGIN = "log in by `hf auth login`"
HIDDEN = "the hub has no such data set, or shows it to a login only"


# What the real one raises: without a network, without a login, behind a proxy, for names that are not there.
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ConnectionError("Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError)"),
            "no connection to the hub (Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError))",
        ),
        (type("ProxyError", (Exception,), {})("407"), "no connection to the hub (407)"),
        (
            HTTPError(401),
            f"the hub shows it to a login only ({ANSWER.format(401)}); {LOGIN} with an account that may read it",
        ),
        (
            of(FileNotFoundError("not in the cache either"), HTTPError(403)),
            f"the hub shows it to a login only ({ANSWER.format(403)}); {LOGIN} with an account that may read it",
        ),
        (
            DatasetNotFoundError(
                "Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated to access it."
            ),
            "the hub shows it to a login only (Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated"
            f" to access it.); {LOGIN} with an account that may read it",
        ),
        (
            DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
            f"{HIDDEN} (Dataset 'org/name' doesn't exist on the Hub or cannot be accessed.); check the name, or {LOGIN}",
        ),
        (of(OSError("no"), HTTPError(503)), f"the hub failed ({ANSWER.format(503)}); try again later"),
        (
            json.JSONDecodeError("Expecting value", "<html>", 0),
            "what answered is not the hub (Expecting value: line 1 column 1 (char 0)); a proxy's page? See to the proxy"
            " and to HF_ENDPOINT",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test'].\nmore"),
            "it has no split 'train' (Unknown split \"train\". Should be one of ['test'].)",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found name.py"),
            "the hub's data set cannot be read (Dataset scripts are no longer supported, but found name.py)",
        ),
        (DatasetGenerationError(), "the hub's data set cannot be read (DatasetGenerationError)"),
        (
            PermissionError(13, "Permission denied"),
            "the hub's data set cannot be read ([Errno 13] Permission denied)",
        ),
    ],
)
def test_a_hub_that_fails_is_one_line_that_says_why_and_offers_a_file(hub, error, says):
    def load_dataset(name, split):
        raise error

    hub(load_dataset)
    assert lines_of(lambda: hub_rows("org/name", "--config.data.ift")) == [
        f"--config.data.ift=org/name: {says}; {INSTEAD}"
    ]


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """`answering(status, body)`: the hub that the real loader asks is a server here, which gives all this answer."""
    servers = []

    def start(status, body):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()

            def do_GET(self):
                self.do_HEAD()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{servers[-1].server_port}")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": "Invalid username or password."}', ("the hub shows it to a login only (", LOGIN)),
        (200, b"<html>Log in to the proxy</html>", ("what answered is not the hub (", "See to the proxy")),
    ],
)
def test_the_real_loader_without_a_login_and_behind_a_proxy(answering, status, body, says):
    answering(status, body)
    (line,) = lines_of(lambda: hub_rows("org/name", "--config.data.ift"))
    assert line.startswith(f"--config.data.ift=org/name: {says[0]}") and says[1] in line and line.endswith(INSTEAD)


def test_an_empty_answer_of_the_hub_is_one_line(hub):
    hub(lambda name, split: datasets.Dataset.from_dict({"message_id": []}))
    assert lines_of(lambda: hub_rows("org/name", "--config.data.ift")) == [
        f"--config.data.ift=org/name: split 'train' of this data set is empty; {INSTEAD}"
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The real `load_dataset`, which keeps what it makes in here and asks no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_the_real_loader_reads_a_folder_of_parquet(tmp_path, cache):
    folder = tmp_path / "made"
    folder.mkdir()
    rows = [{"message_id": "a", "rank": None, "labels": None},
            {"message_id": "b", "rank": 1, "labels": {"name": ["spam"], "value": [0.25]}}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    assert hub_rows(str(folder), "--config.data.oasst") == list(enumerate(rows, start=1))
    (line,) = lines_of(lambda: hub_rows(str(folder), "--config.data.oasst", "test"))
    assert line.startswith(f"--config.data.oasst={folder}: it has no split 'test' (")


def test_the_real_loader_without_a_network(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = lines_of(lambda: hub_rows("org/name", "--config.data.ift"))
    assert line.startswith("--config.data.ift=org/name: no connection to the hub (Couldn't reach ")
    assert line.endswith(INSTEAD)


# Files and hub names under one option.


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/name", ("org/name", "train")),
        ("org/na.me-2_x:validation", ("org/na.me-2_x", "validation")),
        ("org/name:train[:10%]", ("org/name", "train[:10%]")),
    ],
)
def test_hub_names_are_asked_for(hub, name, asked):
    hub(lambda name, split: [{"asked": [name, split]}])
    assert rows_of(name, "--config.data.ift") == [(1, {"asked": list(asked)})]


@pytest.mark.parametrize(
    "name", ["folder/rows.jsonl", "folder/rows.json.gz", "folder/x.parquet", "rows", "a/b/c", "/a/b", "./rows"]
)
def test_other_names_are_files(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hub(lambda name, split: pytest.fail("the hub was asked"))
    assert lines_of(lambda: rows_of(name, "--config.data.ift")) == [f"{name}: no such file"]


def test_a_file_that_exists_wins_over_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub(lambda name, split: pytest.fail("the hub was asked"))
    (tmp_path / "org").mkdir()
    for name in ("org/name", "org/name:split"):
        (tmp_path / name).write_text('{"a": 1}')
        assert rows_of(name, "--config.data.ift") == [(1, {"a": 1})]
