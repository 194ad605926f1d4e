"""One run a folder: the lock object of an object store, whose holder shows that it lives."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from selfreward_jax import lock
from selfreward_jax.errors import UserError

ROOT = Path(__file__).parents[1]


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


def text(name, age=0.0):
    return json.dumps({"name": name, "token": name, "time": time.time() - age}).encode()


BUCKET = "gs://bucket/run/.lock.json"
OBJECT = "bucket/run/.lock.json"


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_of_two_that_begin_at_once_the_store_takes_one(bucket):
    """Both see no lock; the second's write comes late, long after the first has begun to work."""

    def late(what, path):
        bucket.fault = lambda what, path: None
        if what == "upload":
            bucket.objects[OBJECT] = text("the other")
        else:
            bucket.fault = late

    bucket.fault = late
    with pytest.raises(UserError, match="the other is working here"), beating(BUCKET):
        pass
    assert json.loads(bucket.objects[OBJECT])["token"] == "the other"  # neither overwritten nor removed


def test_of_two_that_take_over_at_once_one_gives_up(bucket):
    bucket.objects[OBJECT] = text("dead", age=5)

    def other():  # has also read the dead one's sign of life: removes what is there by now, and writes its own
        wait_for(lambda: b"dead" not in bucket.objects.get(OBJECT, b"dead"))
        bucket.objects[OBJECT] = text("the other")

    beside = threading.Thread(target=other)
    beside.start()
    with pytest.raises(UserError, match="the other is working here"), beating(BUCKET, settle=0.5):
        pass
    beside.join()
    assert json.loads(bucket.objects[OBJECT])["token"] == "the other"


def test_a_late_write_on_a_store_that_has_no_conditions_ends_the_run_it_overwrote(bucket):
    bucket.conditional = False
    said = []
    with beating(BUCKET, lost=said.append):
        assert said == []
        bucket.objects[OBJECT] = text("the late one")  # it had read before we wrote
        wait_for(lambda: said)
        time.sleep(0.2)
    (line,) = said
    assert line.startswith("--workdir=gs://bucket/run: the late one works here now; this run")
    assert json.loads(bucket.objects[OBJECT])["token"] == "the late one"


def test_an_owner_that_was_paused_is_told_and_leaves_the_new_owners_lock(bucket):
    said = []
    with beating(BUCKET, beat=0.5, stale=0.1, lost=said.append):  # no sign of life in time: as if stopped
        time.sleep(0.2)
        with beating(BUCKET, beat=0.02, stale=0.1):
            wait_for(lambda: said)
            new = json.loads(bucket.objects[OBJECT])["token"]
            assert len(said) == 1
    with beating(BUCKET, lost=said.append):
        paused_at_its_end = bucket.objects[OBJECT] = text("new")
    assert bucket.objects[OBJECT] == paused_at_its_end != new  # what is another's is not removed


def test_a_lock_that_was_removed_by_hand_is_made_again(bucket):
    with beating(BUCKET):
        mine = json.loads(bucket.objects.pop(OBJECT))["token"]
        wait_for(lambda: OBJECT in bucket.objects)
        assert json.loads(bucket.objects[OBJECT])["token"] == mine
    assert bucket.objects == {}


def test_signs_of_life_that_fail_do_not_end_a_run(bucket):
    asked, said = [], []

    def fault(what, path):
        asked.append(what)
        raise PermissionError("no network")

    with beating(BUCKET, lost=said.append):
        bucket.fault = fault
        wait_for(lambda: len(asked) > 3)
        bucket.fault = lambda what, path: None
        before = bucket.objects[OBJECT]
        wait_for(lambda: bucket.objects[OBJECT] != before)
    assert said == [] and bucket.objects == {}


def test_a_run_that_lost_its_lock_ends_at_once_with_one_line(tmp_path):
    """The main thread may be anywhere: it is not asked."""
    program = (
        "import json, time\nfrom etils import epath\nfrom selfreward_jax import lock\n"
        f"path = epath.Path({str(tmp_path / '.lock.json')!r})\n"
        "with lock.beating(path, beat=0.05, settle=0.0):\n"
        "    path.write_text(json.dumps({'name': 'process 7', 'token': 'x', 'time': time.time()}))\n"
        "    time.sleep(60)\n"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert time.monotonic() - began < 50 and ended.returncode == 2
    assert ended.stderr.startswith(f"error: --workdir={tmp_path}: process 7 works here now; this run showed no sign")
    assert ended.stderr.count("\n") == 1 and ended.stdout == ""
    assert json.loads((tmp_path / ".lock.json").read_text())["token"] == "x"


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"name": 1, "token": 2, "time": "x"}'])
def test_an_object_that_is_no_lock_is_taken_over(tmp_path, text):
    path = tmp_path / ".lock.json"
    path.write_text(text)
    with beating(path):
        assert json.loads(path.read_text())["name"].startswith("process ")
