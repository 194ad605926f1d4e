"""Metrics: a segment a process, read back as one run."""

import json

import pytest
from etils import epath

from selfreward_jax.observe import metrics


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "deep" / "metrics"


def segment(folder, *rows):
    write, close = metrics.writer(folder)
    for row in rows:
        write(row)
    close()


def test_rows_come_back(folder):
    rows = [{"step": 0, "loss": 0.25, "tokens": 7}, {"step": 1, "loss": 1e-9, "tokens": 8}]
    segment(folder, *rows)
    assert metrics.read(folder) == rows
    assert [path.name for path in folder.iterdir()] == ["segment-00000.jsonl"]


def test_a_row_is_there_before_the_file_is_closed(folder):
    write, close = metrics.writer(folder)
    write({"step": 3, "loss": 1.0})
    assert metrics.read(folder) == [{"step": 3, "loss": 1.0}]
    close()


def test_a_redone_step_counts_once_as_redone(folder):
    segment(folder, *({"step": step, "loss": float(step)} for step in range(5)))
    segment(folder, *({"step": step, "loss": 10.0 * step} for step in range(3, 7)))
    rows = metrics.read(folder)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["loss"] for row in rows] == [0, 1, 2, 30, 40, 50, 60]
    assert sorted(path.name for path in folder.iterdir()) == ["segment-00000.jsonl", "segment-00001.jsonl"]


def test_a_cut_line_is_left_out(folder):
    segment(folder, {"step": 0, "loss": 1.0})
    file = folder / "segment-00000.jsonl"
    file.write_text(file.read_text() + json.dumps({"step": 1, "loss": 2.0})[:-4])
    assert metrics.read(folder) == [{"step": 0, "loss": 1.0}]
    segment(folder, {"step": 1, "loss": 3.0})
    assert [row["loss"] for row in metrics.read(folder)] == [1.0, 3.0]


def test_ten_segments_are_read_in_order(folder):
    for number in range(12):
        segment(folder, {"step": 0, "loss": float(number)})
    assert metrics.read(folder) == [{"step": 0, "loss": 11.0}]


def test_no_folder_is_no_rows(folder):
    assert metrics.read(folder) == []
