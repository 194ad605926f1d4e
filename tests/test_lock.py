"""One run a folder: the lock object of an object store, whose holder shows that it lives."""

import json
import time

import pytest
from etils import epath

from selfreward_jax import lock
from selfreward_jax.errors import UserError


def beating(path, **given):
    return lock.beating(epath.Path(path), **({"beat": 0.05, "stale": 1.0, "settle": 0.0} | given))


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    path = tmp_path / ".lock.json"
    with beating(path):
        with pytest.raises(UserError, match=r"process \d+ on .* is working here"), beating(path):
            pass
    assert not path.exists()
    with beating(path):
        assert path.exists()


def test_signs_of_life_go_on_while_it_is_held(tmp_path):
    path = tmp_path / ".lock.json"
    with beating(path):
        first = json.loads(path.read_text())["time"]
        time.sleep(0.3)
        assert json.loads(path.read_text())["time"] > first


def test_a_dead_run_is_followed_after_a_while(tmp_path):
    path = tmp_path / ".lock.json"
    path.write_text(json.dumps({"name": "process 1 on gone", "token": "x", "time": time.time() - 0.5}))
    with pytest.raises(UserError, match="wait"), beating(path):
        pass
    time.sleep(0.6)
    with beating(path):
        assert json.loads(path.read_text())["token"] != "x"


def test_of_two_that_begin_at_once_one_gives_up(tmp_path, monkeypatch):
    path = tmp_path / ".lock.json"
    written = lock._write

    def overtaken(where, owner):
        written(where, owner)
        written(where, lock._Owner("the other", "y", 0.0))

    monkeypatch.setattr(lock, "_write", overtaken)
    with pytest.raises(UserError, match="the other is working here"), beating(path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"name": 1, "token": 2, "time": "x"}'])
def test_an_object_that_is_no_lock_is_taken_over(tmp_path, text):
    path = tmp_path / ".lock.json"
    path.write_text(text)
    with beating(path):
        assert json.loads(path.read_text())["name"].startswith("process ")
