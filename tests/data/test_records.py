"""Records: one canonical line each, and errors that name file, line and field."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import records
from selfreward_jax.data.records import Judgment, Prompt, Response
from selfreward_jax.errors import UserError

FAST = settings(deadline=None, max_examples=60, database=None)
ALL = records.Record.__args__
RESPONSE = Response("p1", 2, "text", (5, 7), (-0.5, -1e-12), "stop")


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_class_of_the_module_is_a_record():
    classes = {made for made in vars(records).values() if isinstance(made, type) and dataclasses.is_dataclass(made)}
    assert classes == set(ALL)


def test_a_line_is_canonical():
    assert records.to_json(RESPONSE) == (
        '{"prompt_id":"p1","index":2,"text":"text","token_ids":[5,7],"logprobs":[-0.5,-1e-12],"finish_reason":"stop"}'
    )
    assert records.to_json(Prompt("a", "Grüße\u2028日本", "s")) == '{"id":"a","text":"Grüße\u2028日本","source":"s"}'


@pytest.mark.parametrize("cls", ALL)
@FAST
@given(data=st.data())
def test_what_is_written_is_read_back(cls, data):
    floats = st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple)
    record = data.draw(st.builds(cls, **({"logprobs": floats} if cls is Response else {})))
    row = json.loads(records.to_json(record))
    assert records.from_json(cls, row, "x:1") == record
    assert records.to_json(records.from_json(cls, row, "x:1")) == records.to_json(record)


@FAST
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=())), min_size=1, max_size=5))
def test_any_text_survives_a_file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "a.jsonl"
    wanted = [Prompt(str(i), text, "s") for i, text in enumerate(texts)]  # line ends and lone surrogates included
    write(path, *map(records.to_json, wanted))
    assert records.read_records(path, Prompt) == wanted


def test_what_json_has_no_form_for_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        records.to_json(Response("p", 0, "", (1,), (float("nan"),), "stop"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "text": "b"}, "missing field 'source'"),
        ({"id": "a", "text": "b", "source": "c", "x": 1}, "unknown field 'x'"),
        ({"id": "a", "text": None, "source": "c"}, "'text' must be a string, null found"),
        (
            {"id": True, "text": "b", "source": 1},
            "'id' must be a string, a boolean found; 'source' must be a string",
        ),
    ],
)
def test_wrong_fields_are_named(row, message):
    with pytest.raises(UserError) as caught:
        records.from_json(Prompt, row, "f.jsonl:7")
    assert str(caught.value).startswith("f.jsonl:7: not a Prompt: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", True),
        ("index", 1.0),
        ("token_ids", [1, "2"]),
        ("token_ids", [True]),
        ("logprobs", ["x"]),
        ("token_ids", "12"),
        ("logprobs", [None]),
    ],
)
def test_wrong_types_are_refused(field, value):
    row = json.loads(records.to_json(RESPONSE)) | {field: value}
    with pytest.raises(UserError, match=f"'{field}' must be"):
        records.from_json(Response, row, "f:1")


def test_an_integer_is_a_number():
    row = json.loads(records.to_json(RESPONSE)) | {"logprobs": [0, -1]}
    assert repr(records.from_json(Response, row, "f:1").logprobs) == "(0.0, -1.0)"


def test_no_score_is_null():
    judgment = Judgment("p", 0, 0, "t", (), "length", None)
    assert '"score":null' in records.to_json(judgment)
    assert records.from_json(Judgment, json.loads(records.to_json(judgment)), "f:1") == judgment


def test_bad_lines_come_all_at_once(tmp_path):
    good = records.to_json(Prompt("a", "b", "c"))
    path = write(tmp_path / "a.jsonl", good, "{", '{"id": 1}', good, "[1]", '{"id": NaN}', '{"id":"\\q"}')
    with path.open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    with pytest.raises(UserError) as caught:
        records.read_records(path, Prompt)
    lines = caught.value.args
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 5, 6, 7, 8)]
    assert all("\n" not in line for line in lines)
    assert "not JSON" in lines[0] and "missing field" in lines[1] and "a list" in lines[2] and "UTF-8" in lines[5]


def test_ten_bad_lines_are_enough(tmp_path):
    path = write(tmp_path / "a.jsonl", *["{}"] * 25)
    with pytest.raises(UserError) as caught:
        records.read_records(path, Prompt)
    assert len(caught.value.args) == 11 and caught.value.args[-1] == f"{path}: 15 more bad lines"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        records.read_records(tmp_path / "none.jsonl", Prompt)
