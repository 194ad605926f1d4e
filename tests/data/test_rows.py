"""Rows: one file in three forms reads as the same rows, and what does not read is a line that says where."""

import dataclasses
import datetime
import gzip
import io
import json
import math
import string

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import records, rows
from selfreward_jax.errors import UserError

FAST = settings(max_examples=40)


def as_jsonl(some):
    return "".join(json.dumps(row) + "\n" for row in some).encode()


def as_array(some):
    return json.dumps(some, indent=2).encode()


def as_parquet(some):
    buffer = io.BytesIO()
    pq.write_table(some if isinstance(some, pa.Table) else pa.Table.from_pylist(some), buffer)
    return buffer.getvalue()


FORMS = {"jsonl": as_jsonl, "array": as_array, "parquet": as_parquet}


def lines_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in line for line in caught.value.args)
    return list(caught.value.args)


# Forms.

MESSAGES = [
    {
        "message_id": "6ab24d72",
        "parent_id": None,
        "text": "Grüße\u2028日本 \U0001f600\r\n",
        "rank": None,
        "deleted": False,
        "labels": {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 2]},
        "emojis": None,
    },
    {
        "message_id": "c8e83833",
        "parent_id": "6ab24d72",
        "text": "",
        "rank": 0,
        "deleted": True,
        "labels": None,
        "emojis": [{"name": "+1", "count": 2}],
    },
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows"])
def test_the_content_says_what_a_file_is(tmp_path, form, pack, name):
    path = tmp_path / name
    path.write_bytes(pack(FORMS[form](MESSAGES)))
    assert rows.read_rows(str(path)) == [(1, MESSAGES[0]), (2, MESSAGES[1])]


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)  # parquet has no lone surrogates
numbers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.sampled_from(
    [text, numbers, floats, st.booleans(), st.lists(text, max_size=3), st.lists(floats, max_size=3)]
)


@st.composite
def tables(draw):
    """Rows of one schema, as parquet needs them, with nulls anywhere."""
    fields = draw(st.dictionaries(st.text(string.ascii_letters, min_size=1), values, min_size=1, max_size=4))
    row = st.fixed_dictionaries({name: st.none() | value for name, value in fields.items()})
    inner = st.fixed_dictionaries(
        {"struct": st.fixed_dictionaries({"role": text, "deep": st.lists(row, max_size=2)})}
    )
    return draw(st.lists(draw(st.sampled_from([row, inner])), min_size=1, max_size=5))


@FAST
@given(tables())
def test_any_table_reads_the_same_in_every_form(tmp_path_factory, some):
    folder = tmp_path_factory.mktemp("t")
    for form, write in FORMS.items():
        (folder / form).write_bytes(write(some))
        assert rows.read_rows(folder / form) == list(enumerate(some, start=1)), form


OF_TYPE = {
    str: text,
    int: numbers,
    str | None: st.none() | text,
    tuple[str, ...]: st.lists(text, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(numbers, max_size=3).map(tuple),
    tuple[float, ...]: st.lists(floats, max_size=3).map(tuple),
}


@pytest.mark.parametrize("cls", records.Record.__args__)
@FAST
@given(data=st.data())
def test_records_read_from_every_form(cls, data, tmp_path_factory):
    fields = {field.name: OF_TYPE[field.type] for field in dataclasses.fields(cls)}
    some = data.draw(st.lists(st.builds(cls, **fields), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("r") / "file"
    for write in FORMS.values():
        path.write_bytes(write([json.loads(records.to_json(record)) for record in some]))
        assert records.read_records(path, cls) == some


def test_numbers_of_rows_are_lines_of_jsonl_and_places_otherwise(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'\n{"a":1}\r\n \n{"a":2}')
    assert rows.read_rows(path) == [(2, {"a": 1}), (4, {"a": 2})]
    path.write_bytes(b'\n [{"a":1},\n\n{"a":2}]')
    assert rows.read_rows(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("content", [b'{"a":1}', b'[{"a":1}]'])
def test_a_byte_order_mark_is_no_text(tmp_path, content):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + content)
    assert rows.read_rows(tmp_path / "a") == [(1, {"a": 1})]


# What tables hold and JSON does not.


def test_a_table_reads_as_json_would(tmp_path):
    table = pa.table(
        {
            "rank": pa.array([float("nan"), 1.0], from_pandas=False),
            "text": pa.array([b"caf\xc3\xa9", b"tea"], pa.binary()),
            "when": pa.array([datetime.datetime(2023, 4, 15, 12)] * 2),
            "spam": pa.array([{"value": [float("nan")]}, {"value": []}]),
            "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
            "image": pa.array([b"\xff\xd8", None], pa.binary()),
        }
    )
    (tmp_path / "a").write_bytes(as_parquet(table))
    first, second = (row for _, row in rows.read_rows(tmp_path / "a"))
    assert first == {
        "rank": None, "text": "café", "when": "2023-04-15 12:00:00", "spam": {"value": [None]}, "map": {"a": 1},
        "image": b"\xff\xd8",
    }  # fmt: skip
    assert (
        second["rank"] == 1.0 and second["spam"] == {"value": []} and second["map"] == {} and second["image"] is None
    )


def test_values_of_numpy_become_those_of_python():
    given_ = {
        "a": np.array([[1, 2], [3, 4]]), "b": np.float64("nan"), "c": np.int32(3), "d": np.bool_(True), "e": (1, "x"),
        "f": np.array(["x", None], object), 7: np.str_("text"),
    }  # fmt: skip
    made = rows.plain(given_)
    assert made == {"a": [[1, 2], [3, 4]], "b": None, "c": 3, "d": True, "e": [1, "x"], "f": ["x", None], "7": "text"}
    assert [type(made[name]) for name in "cd7"] == [int, bool, str]
    assert type(rows.plain(np.float32(0.5))) is float
    assert rows.plain(math.inf) == math.inf


# What does not read.


def test_bad_lines_of_jsonl_come_all_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{\n"b"\n{"a":NaN}\n{"a":"\xff"}\n{"a":2}\n' + b'{"a":' * 5000 + b"1" + b"}" * 5000)
    assert lines_of(lambda: rows.read_rows(path)) == [
        f"{path}:2: not JSON (Expecting property name enclosed in double quotes, column 2)",
        f"{path}:3: an object a line is needed, a string found",
        f"{path}:4: not JSON (NaN is not a JSON number)",
        f"{path}:5: not UTF-8 (invalid start byte at byte 7)",
        f"{path}:7: not JSON that can be read (nested too deep)",
    ]


def test_bad_lists_name_the_line_or_the_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a": 2},\n {"a" 3}]')
    assert lines_of(lambda: rows.read_rows(path)) == [f"{path}:3: not JSON (Expecting ':' delimiter, column 7)"]
    path.write_text('[{"a": 1}]\n[{"a": 2}]')
    assert lines_of(lambda: rows.read_rows(path)) == [f"{path}:2: not JSON (Extra data, column 1)"]
    path.write_text('[{"a": 1}, 2, [3], null]')
    assert lines_of(lambda: rows.read_rows(path)) == [
        f"{path}:2: an object a line is needed, an integer found",
        f"{path}:3: an object a line is needed, a list with something else found",
        f"{path}:4: an object a line is needed, null found",
    ]
    path.write_bytes(b'[{"a": 1},\n{"a": "\xff"}]')
    assert lines_of(lambda: rows.read_rows(path)) == [f"{path}:2: not UTF-8 (invalid start byte at byte 19)"]
    path.write_text("[" * 100_000)
    assert lines_of(lambda: rows.read_rows(path)) == [f"{path}:1: not JSON that can be read (nested too deep)"]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", gzip.compress(b""), as_parquet(pa.table({"a": []}))])
def test_empty_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert lines_of(lambda: rows.read_rows(tmp_path / "a")) == [f"{tmp_path / 'a'}: the file is empty"]


def test_files_that_cannot_be_read(tmp_path):
    assert lines_of(lambda: rows.read_rows(tmp_path / "no")) == [f"{tmp_path / 'no'}: no such file"]
    assert lines_of(lambda: rows.read_rows(tmp_path)) == [f"{tmp_path}: is a folder, a file is needed"]
    path = tmp_path / "cut"
    path.write_bytes(gzip.compress(b'{"a":1}\n' * 99)[:-12])
    (line,) = lines_of(lambda: rows.read_rows(path))
    assert line.startswith(f"{path}: damaged gzip (")


@pytest.mark.parametrize("cut", [4, 30, -20, -1])
def test_a_cut_parquet_file_is_one_line(tmp_path, cut):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(MESSAGES)[:cut])
    (line,) = lines_of(lambda: rows.read_rows(path))
    assert line.startswith(f"{path}: damaged parquet (")


@FAST
@given(st.integers(4, 200), st.binary(min_size=1, max_size=20))
def test_no_damage_to_parquet_is_a_traceback(tmp_path_factory, at, noise):
    content = as_parquet(MESSAGES)
    path = tmp_path_factory.mktemp("p") / "a"
    path.write_bytes(content[:-at] + noise + content[-at + len(noise) :])
    lines = ()
    try:
        rows.read_rows(path)
    except UserError as error:
        lines = error.args
    assert len(lines) <= 1 and "\n" not in "".join(lines)


def test_ten_problems_are_enough():
    with pytest.raises(UserError) as caught:
        rows.raise_problems("a", [(number, f"line {number}") for number in range(25, 0, -1)])
    assert caught.value.args == (*(f"line {number}" for number in range(1, 11)), "a: 15 more bad lines")
    rows.raise_problems("a", [])
