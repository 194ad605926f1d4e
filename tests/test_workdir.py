"""The run's folder: atomic files, records of stages, the lock, a config that changed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from fake_bucket import Bucket

from selfreward_jax import lock, workdir
from selfreward_jax.errors import UserError
from selfreward_jax.observe import metrics


@pytest.fixture
def root(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path)


def test_a_file_is_replaced_whole(root: epath.Path) -> None:
    workdir.write_text(root / "a" / "b.txt", "one")
    workdir.write_text(root / "a" / "b.txt", "two")
    assert (root / "a" / "b.txt").read_text() == "two"
    assert [path.name for path in (root / "a").iterdir()] == ["b.txt"]


def test_a_full_disk_leaves_the_old_file(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir.write_text(root / "kept.txt", "before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(root), "replace", full)
    with pytest.raises(UserError, match=r"kept.txt: No space left on device; make room"):
        workdir.write_text(root / "kept.txt", "after")
    assert (root / "kept.txt").read_text() == "before"
    assert [path.name for path in root.iterdir()] == ["kept.txt"]


def record(root: epath.Path, **facts: Any) -> None:
    workdir.finish(root, "m2/pairs", [root / "in.txt"], [root / "out"], 1.5, facts)


def test_a_stage_is_done_while_inputs_and_outputs_stand(root: epath.Path) -> None:
    (root / "in.txt").write_text("in")
    (root / "out").mkdir()
    (root / "out" / "part").write_text("12345")
    assert not workdir.is_done(root, "m2/pairs")
    record(root, pairs=3)
    assert workdir.is_done(root, "m2/pairs")
    assert workdir.facts(root, "m2/pairs") == {"pairs": 3, "seconds": 1.5}
    (root / "in.txt").write_text("other")
    assert not workdir.is_done(root, "m2/pairs")
    (root / "in.txt").write_text("in")
    assert workdir.is_done(root, "m2/pairs")
    (root / "out" / "part").write_text("123")
    assert not workdir.is_done(root, "m2/pairs")


def test_partial_output_is_kept_only_with_the_same_settings(root: epath.Path) -> None:
    (root / "in.txt").write_text("in")
    part = root / "m2" / "responses"
    for settings, kept in (({"n": 4}, False), ({"n": 4}, True), ({"n": 8}, False)):
        part.mkdir(parents=True, exist_ok=True)
        (part / "part-0").write_text("x")
        workdir.begin(root, "m2/responses", settings, [root / "in.txt"], [part])
        assert part.exists() is kept, settings
    (root / "in.txt").write_text("changed")
    part.mkdir(parents=True)
    workdir.begin(root, "m2/responses", {"n": 8}, [root / "in.txt"], [part])
    assert not part.exists()


def test_a_second_process_is_refused_while_the_first_lives(root: epath.Path) -> None:
    code = (
        "import sys\nfrom etils import epath\nfrom selfreward_jax import lock\n"
        "with lock.locked(epath.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    repository = str(Path(__file__).resolve().parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=repository,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on .* is working here"), lock.locked(root):
        pass
    child.kill()
    child.communicate()
    with lock.locked(root):  # the system freed it with the process
        assert (root / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=f"^--workdir={tmp_path}/file/run: .*; take a folder that can") as caught,
        lock.locked(epath.Path(tmp_path / "file" / "run")),
    ):
        pass
    assert len(caught.value.args) == 1


def test_a_start_that_made_nothing_does_not_bind_the_next(root: epath.Path) -> None:
    workdir.check_config(root, {"model.source": "/nope"}, set(), override=False)
    workdir.begin(root, "seed/split", {}, [], [])
    workdir.check_config(root, {"model.source": "/there"}, set(), override=False)
    assert workdir.read_json(root / "config.json") == {"model.source": "/there"}
    workdir.finish(root, "seed/split", [], [], 1.0, {})
    with pytest.raises(UserError, match="this run was begun with '/there'"):
        workdir.check_config(root, {"model.source": "/other"}, set(), override=False)


def test_a_changed_config_names_the_fields(root: epath.Path) -> None:
    workdir.check_config(root, {"seed": 0, "dpo.beta": 0.1, "target": "m2"}, {"target"}, override=False)
    workdir.finish(root, "seed/split", [], [], 1.0, {})
    workdir.check_config(root, {"seed": 0, "dpo.beta": 0.1, "target": "m3"}, {"target"}, override=False)
    with pytest.raises(UserError) as caught:
        workdir.check_config(root, {"seed": 1, "dpo.beta": 0.2, "target": "m3"}, {"target"}, override=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "--config.dpo.beta=0.2: this run was begun with 0.1"
    assert lines[1] == "--config.seed=1: this run was begun with 0"
    assert "--resume=override" in lines[2]
    workdir.check_config(root, {"seed": 1, "dpo.beta": 0.2, "target": "m3"}, {"target"}, override=True)
    workdir.check_config(root, {"seed": 1, "dpo.beta": 0.2, "target": "m3"}, {"target"}, override=False)


def test_a_record_that_is_not_json_says_so(root: epath.Path) -> None:
    workdir.write_text(workdir.record_path(root, "m2/pairs"), "{")
    with pytest.raises(UserError, match=r"not JSON on line 1; delete it"):
        workdir.is_done(root, "m2/pairs")


@pytest.mark.parametrize("text", ["[]", "3", '{"x": 1}', '{"inputs": [], "outputs": {}, "facts": {}, "seconds": 1}'])
def test_a_record_that_is_another_kind_of_json_says_so(root: epath.Path, text: str) -> None:
    path = workdir.record_path(root, "m2/pairs")
    workdir.write_text(path, text)
    for read in (workdir.is_done, workdir.facts):
        with pytest.raises(
            UserError, match=r"pairs.json: not what was written there \(an object with inputs, .*delete it"
        ):
            read(root, "m2/pairs")
    workdir.write_text(path.with_suffix(".begun.json"), text)
    with pytest.raises(UserError, match=r"pairs.begun.json: not what .*with identity\); delete it"):
        workdir.begin(root, "m2/pairs", {}, [], [])


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_config_that_was_damaged_says_how_to_go_on(root: epath.Path, text: str) -> None:
    workdir.finish(root, "seed/split", [], [], 1.0, {})
    (root / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: not .*; put it back, or add --resume=override") as caught:
        workdir.check_config(root, {"seed": 0}, set(), override=False)
    assert len(caught.value.args) == 1
    workdir.check_config(root, {"seed": 0}, set(), override=True)
    assert workdir.read_json(root / "config.json") == {"seed": 0}


def test_a_folder_on_an_object_store(bucket, capsys: pytest.CaptureFixture[str]) -> None:
    root = epath.Path("gs://bucket/run")
    with lock.locked(root):
        assert "bucket/run/.lock.json" in bucket.objects
        with pytest.raises(UserError, match="is working here"), lock.locked(root):
            pass
        workdir.check_config(root, {"seed": 0}, set(), override=False)
        part = workdir.parts(root / "m2" / "responses", 2)[0]
        workdir.begin(root, "m2/responses", {"n": 4}, [], [root / "m2" / "responses"])
        workdir.write_text(part, "one\n")
        workdir.begin(root, "m2/responses", {"n": 4}, [], [root / "m2" / "responses"])  # a resume keeps it
        assert workdir.exist([part, part.parent / "part-00001-of-00002.jsonl"]) == [True, False]
        workdir.finish(root, "m2/responses", [], [part], 1.0, {"responses": 1})
        assert workdir.is_done(root, "m2/responses") and workdir.facts(root, "m2/responses")["responses"] == 1
        workdir.write_text(part, "two\n")
        assert not workdir.is_done(root, "m2/responses")
        write, close = metrics.writer(root / "m2" / "metrics")
        write({"step": 0, "loss": 1.5})
        close()
        assert metrics.read(root / "m2" / "metrics") == [{"step": 0, "loss": 1.5}]
    assert "bucket/run/.lock.json" not in bucket.objects
    assert not any(name.endswith(".tmp") for name in bucket.objects)


def test_a_store_without_credentials_is_one_line(bucket) -> None:
    def refuse(what: str, path: str) -> None:
        raise OSError("Anonymous caller does not have storage.objects.list access")

    bucket.fault = refuse
    with (
        pytest.raises(UserError, match=r"gs://bucket/run: cannot be listed .*gcloud auth") as caught,
        lock.locked(epath.Path("gs://bucket/run")),
    ):
        pass
    assert len(caught.value.args) == 1


class Refused(Exception):
    """What a store's client may raise: no OSError."""


@pytest.mark.parametrize(
    "ask",
    [
        lambda root: workdir.is_done(root, "m2/pairs"),
        lambda root: workdir.facts(root, "m2/pairs"),
        lambda root: workdir.begin(root, "m2/pairs", {}, [], []),
        lambda root: workdir.exist([root / "a"]),
        lambda root: workdir.remove(root / "a"),
        lambda root: workdir.manifest(root / "a"),
        lambda root: workdir.check_config(root, {}, set(), override=False),
        lambda root: lock._read(root / ".lock.json"),
        lambda root: metrics.read(root / "metrics"),
        lambda root: metrics.writer(root / "metrics"),
    ],
)
def test_a_store_that_refuses_while_the_run_goes_on_is_one_line(
    bucket, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Refused("403: no\nlonger")

    bucket.fault = refuse
    for name in ("exists", "isdir", "info", "rm"):
        monkeypatch.setattr(Bucket, name, refuse)
    with pytest.raises(
        UserError,
        match=r"gs://bucket/run.*: cannot be (read|listed|removed|written) \(403: no longer\); .*gcloud auth",
    ):
        ask(epath.Path("gs://bucket/run"))
