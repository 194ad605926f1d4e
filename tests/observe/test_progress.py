"""The progress line: a rate, an estimate, and silence in between."""

import re

import pytest

from selfreward_jax.observe import progress as module
from selfreward_jax.observe.progress import progress, say


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock.now += 2`."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(module, "time", fake)
    return fake


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_say_prints_at_once(capsys):
    say("[m1] hello")
    assert lines(capsys) == ["[m1] hello"]


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    with progress("m2/responses", 100, "prompts") as advance:
        for _ in range(100):
            clock.now += 0.5
            advance(1, "1.2k tok/s")
    printed = lines(capsys)
    assert 9 <= len(printed) <= 12  # 50 seconds, a line in five
    assert printed[-1] == "[m2/responses] 100/100 prompts  2/s  elapsed 0:50  eta 0:00  1.2k tok/s"
    done = [int(re.search(r"(\d+)/100", line)[1]) for line in printed]
    assert done == sorted(set(done))


def test_the_estimate_is_what_is_left_at_this_rate(clock, capsys):
    with progress("x", 5000, "rows") as advance:
        clock.now += 100
        advance(100)
    (line,) = lines(capsys)
    assert "1/s" in line
    assert "elapsed 1:40" in line
    assert "eta 1:21:40" in line
    assert line == line.rstrip()


def test_what_an_earlier_process_did_does_not_count_as_speed(clock, capsys):
    with progress("x", 100, "rows", done=50) as advance:
        clock.now += 10
        advance(10)
    (line,) = lines(capsys)
    assert line.startswith("[x] 60/100 rows  1/s  elapsed 0:10  eta 0:40")


def test_the_last_line_is_printed_however_soon(clock, capsys):
    with progress("x", 3, "rows") as advance:
        for _ in range(3):
            clock.now += 0.01
            advance(1)
    assert lines(capsys)[-1].startswith("[x] 3/3 rows")


def test_no_time_and_no_progress_are_no_division_by_zero(clock, capsys):
    with progress("x", 3, "rows") as advance:
        advance(0)
    assert "eta ?" in lines(capsys)[0]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with progress("m2/judgments", 4, "judgments", done=1) as advance:
        advance(1)
        advance(2, "parsed 96 %")
    shown = capsys.readouterr().out
    assert "m2/judgments" in shown
    assert "4/4" in shown
    assert "judgments" in shown
    assert "parsed 96 %" in shown
