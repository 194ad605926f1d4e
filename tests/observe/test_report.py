"""The closing table, from the records that stages leave."""

import pytest
from etils import epath

from selfreward_jax import workdir
from selfreward_jax.observe import report

STAGES = [
    "seed/split", "sft/train", "sft/export", "sft/check", "m1/eft", "m1/train", "m1/check", "m2/prompts",
    "m2/responses", "m2/judgments", "m2/pairs", "m2/train", "m2/check",
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A finished run, made up; M1 has no check and nobody answered in SFT's."""
    root = epath.Path(tmp_path / "run")
    facts = {
        "seed/split": {"ift": 40},
        "sft/train": {"loss": 2.34567, "examples": 40},
        "sft/export": {"dtype": "bfloat16"},
        "sft/check": {
            "judgments": 40, "parsed": 1, "pairs": 30, "accuracy": 0.0333, "low": 0.0, "high": 0.1111, "half": 0.4,
            "half_low": 0.3, "half_high": 0.45, "own_score": None,
        },
        "m1/eft": {"examples": 72},
        "m1/train": {"loss": 1.0},
        "m2/prompts": {"prompts": 16},
        "m2/responses": {"responses": 64},
        "m2/judgments": {"judgments": 192, "parsed": 144},
        "m2/pairs": {"pairs": 9, "drops": {"equal_scores": 5, "unscored": 2}, "mean_score": 3.14159},
        "m2/train": {"loss": 0.6931},
        "m2/check": {
            "answers": 16, "ended": 12, "mean_tokens": 61.26, "own_score": 2.5, "judgments": 64, "parsed": 60,
            "pairs": 30, "accuracy": 0.5, "low": 0.3333, "high": 0.6667, "half": 0.55, "half_low": 0.4, "half_high": 0.7,
        },
    }  # fmt: skip
    for number, (stage, some) in enumerate(facts.items()):
        workdir.finish(root, stage, [], [], 10.0 + number, some)
    return root


def cells(root, model):
    return dict(zip(report.COLUMNS, report.row(root, model, STAGES), strict=True))


def test_a_row_is_what_the_stages_found(root):
    assert cells(root, "m2") == {
        "model": "m2",
        "loss": "0.6931",
        "parse rate": "93.8%",
        "judge accuracy [95 %]": "50.0% [33.3%, 66.7%] of 30",
        "ties half [95 %]": "55.0% [40.0%, 70.0%]",
        "own score": "2.50",
        "candidates' score": "3.14",
        "pairs kept": "9",
        "pairs dropped": "equal_scores 5, unscored 2",
        "end of turn": "75.0%",
        "tokens": "61.3",
        "seconds": f"{sum(10 + number for number in range(6, 12))}",
    }


def test_what_a_model_does_not_have_is_a_dash_and_never_a_zero(root):
    sft = cells(root, "sft")
    assert sft["loss"] == "2.3457"
    assert sft["parse rate"] == "2.5%"
    assert sft["judge accuracy [95 %]"] == "3.3% [0.0%, 11.1%] of 30"
    empty = ("own score", "candidates' score", "pairs kept", "pairs dropped", "end of turn", "tokens")
    assert [sft[name] for name in empty] == ["-"] * len(empty)
    m1 = cells(root, "m1")
    judge = ("judge accuracy [95 %]", "ties half [95 %]")
    assert m1["loss"] == "1.0000"
    assert [m1[name] for name in (*empty, "parse rate", *judge)] == ["-"] * (len(empty) + 3)
    assert set(cells(root, "m9").values()) == {"m9", "-", "0"}


def test_a_zero_that_was_measured_is_a_zero(root):
    measured = {"answers": 4, "ended": 0, "mean_tokens": 0.0, "own_score": 0.0, "judgments": 8, "parsed": 0}
    workdir.finish(root, "m1/check", [], [], 1.0, measured)
    workdir.finish(root, "m1/train", [], [], 1.0, {"loss": 0.0})
    row = cells(root, "m1")
    assert [row[name] for name in ("loss", "parse rate", "own score", "end of turn", "tokens")] == [
        "0.0000", "0.0%", "0.00", "0.0%", "0.0",
    ]  # fmt: skip


def test_the_table_as_markdown(root):
    rows = [report.row(root, model, STAGES) for model in ("sft", "m1", "m2")]
    lines = report.markdown(rows).splitlines()
    assert len(lines) == 5
    assert lines[0] == "| " + " | ".join(report.COLUMNS) + " |"
    assert {line.count("|") for line in lines} == {len(report.COLUMNS) + 1}
    assert lines[2].startswith("| sft | 2.3457 | 2.5% |")


def test_the_report_is_printed_and_written_with_the_seconds_of_every_stage(root, capsys):
    report.write(root, ["sft", "m1", "m2"], STAGES)
    table = report.markdown([report.row(root, model, STAGES) for model in ("sft", "m1", "m2")])
    assert capsys.readouterr().out == table + "\n"
    text = (root / "report.md").read_text()
    assert text.startswith(f"# Run {root.name}\n\n{table}")
    assert report.NOTES in text
    assert "An interval that includes 50 % claims nothing" in " ".join(text.split())
    assert "| stage | seconds |\n| --- | --- |\n| seed/split | 10.0 |\n| sft/train | 11.0 |\n" in text
    assert "m1/check" not in text  # no record of it


def test_a_terminal_gets_a_table_without_marks_in_it(root, monkeypatch, capsys):
    class Wide(report.Console):
        def __init__(self):
            super().__init__(force_terminal=True, width=250, color_system=None)

    monkeypatch.setattr(report, "Console", Wide)
    report.write(root, ["sft", "m2"], STAGES)
    out = capsys.readouterr().out
    assert "50.0% [33.3%, 66.7%] of 30" in out
    assert "equal_scores 5, unscored 2" in out
