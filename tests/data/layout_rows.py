"""What the tests of layouts share: files of rows, conversations, and the lines of an error."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfreward_jax.errors import UserError


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def said(*turns):
    """Messages of a conversation that the user begins, or its system message: ("s", text) first."""
    system = [{"role": "system", "content": turns[0][1]}] if turns and isinstance(turns[0], tuple) else []
    roles = ("user", "assistant") * len(turns)
    return system + [{"role": role, "content": text} for role, text in zip(roles, turns[len(system) :], strict=False)]


def shared(*turns):
    return [{"from": who, "value": text} for who, text in turns]


def lines_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in line for line in caught.value.args)
    return list(caught.value.args)
