"""Files on disks and object stores: exact ranges, whole files or none, and a line for every failure."""

import errno
import gc
import threading

import pytest
from etils import epath

from selfreward_jax import stores
from selfreward_jax.errors import UserError

DATA = bytes(range(256)) * 4
LOGIN = "check the name, the network and your credentials (`gcloud auth application-default login`)"


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    """A folder on each kind of storage."""
    if request.param == "gs":
        request.getfixturevalue("bucket")
        return epath.Path("gs://bucket/folder")
    return epath.Path(tmp_path)


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(stores, "RETRY_AFTER", (0.0, 0.0))


def put(path, data=DATA):
    with stores.writing(path) as write:
        write(data)


def test_what_is_written_is_listed_read_and_removed(root, no_pause):
    put(root / "a.bin")
    with stores.writing(root / "b.bin") as write:
        for start in range(0, len(DATA), 100):
            write(memoryview(DATA)[start : start + 100])
    put(root / "a.bin", b"new")
    assert stores.listing(root) == {"a.bin": 3, "b.bin": len(DATA)}
    assert stores.read_whole(root / "a.bin") == b"new"
    with stores.ranges(root / "b.bin") as read:
        for start, count in ((0, 1), (7, 300), (len(DATA) - 1, 1), (0, len(DATA)), (5, 0)):
            assert read(start, count) == DATA[start : start + count]
        with pytest.raises(
            UserError, match=r"b.bin: cannot be read \(4 bytes came from byte 1020 on, 5 were asked for"
        ):
            read(len(DATA) - 4, 5)
    stores.remove(root / "a.bin")
    stores.remove(root / "a.bin")
    assert stores.listing(root) == {"b.bin": len(DATA)}


def test_a_file_is_created_only_where_there_is_none(root, no_pause):
    put(root / "b.bin")
    assert stores.read_if_there(root / "a.bin") is None
    assert stores.create(root / "a.bin", b"first") and not stores.create(root / "a.bin", b"second")
    assert stores.read_if_there(root / "a.bin") == b"first"


def test_a_create_that_the_store_refuses_is_one_line(bucket):
    def refuse(what, path):
        raise RuntimeError("403 Forbidden\nyou may not")

    bucket.fault = refuse
    with pytest.raises(UserError) as caught:
        stores.create(epath.Path("gs://bucket/a.bin"), b"")
    assert str(caught.value) == f"gs://bucket/a.bin: cannot be written (403 Forbidden you may not); {LOGIN}"


def test_folders_that_are_not_there(root):
    assert stores.listing(root / "nowhere") is None
    put(root / "a.bin")
    assert stores.listing(root / "nowhere") is None


def test_subfolders_are_listed_and_a_consoles_marker_is_not(bucket):
    bucket.objects |= {"bucket/folder/": b"", "bucket/folder/sub/x": b"1", "bucket/folder/y": b"22"}
    assert stores.listing(epath.Path("gs://bucket/folder")) == {"sub": 0, "y": 2}


def test_a_local_folder_has_its_subfolders_too(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert stores.listing(epath.Path(tmp_path)) == {"sub": 0}
    (tmp_path / "file").write_text("")
    assert stores.listing(epath.Path(tmp_path / "file")) is None


def half(path, data, error):
    with stores.writing(path) as write:
        write(data)
        raise error


def test_a_write_that_fails_leaves_what_was_there(root, request):
    put(root / "a.bin")
    with pytest.raises(OSError, match="No space left"):
        half(root / "a.bin", b"half", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        half(root / "b.bin", b"half" * (10 << 20), KeyboardInterrupt())
    gc.collect()  # a file that is forgotten closes itself, which would publish it
    assert stores.listing(root) == {"a.bin": len(DATA)}
    assert stores.read_whole(root / "a.bin") == DATA
    if "bucket" in request.fixturenames:
        assert request.getfixturevalue("bucket").cancelled == ["bucket/folder/a.bin", "bucket/folder/b.bin"]


def test_an_object_is_there_when_its_upload_is_closed_and_not_before(bucket):
    with stores.writing(epath.Path("gs://bucket/big")) as write:
        for _ in range(5):
            write(b"x" * (8 << 20))
        assert bucket.objects == {}
    assert bucket.objects["bucket/big"] == b"x" * (40 << 20)


def test_an_upload_that_the_store_refuses_is_one_line(bucket):
    def refuse(what, path):
        raise RuntimeError("403 Forbidden\nyou may not")

    bucket.fault = refuse
    with pytest.raises(UserError) as caught:
        put(epath.Path("gs://bucket/a.bin"))
    assert str(caught.value) == f"gs://bucket/a.bin: cannot be written (403 Forbidden you may not); {LOGIN}"
    assert bucket.objects == {}


def test_a_range_that_fails_is_asked_for_again(bucket, no_pause):
    bucket.objects["bucket/a.bin"] = DATA
    errors = [RuntimeError("reset"), TimeoutError()]

    def fault(what, path):
        if errors:
            raise errors.pop()

    bucket.fault = fault
    with stores.ranges(epath.Path("gs://bucket/a.bin")) as read:
        assert read(3, 4) == DATA[3:7]
    assert errors == []


@pytest.mark.parametrize(("error", "tries"), [(ValueError("reset\nby peer"), 3), (PermissionError("no"), 1)])
def test_a_store_that_goes_on_failing_is_one_line(error, tries, bucket, no_pause):
    seen = []

    def fault(what, path):
        seen.append(what)
        raise error

    bucket.fault = fault
    for read in (lambda: stores.read_whole(epath.Path("gs://bucket/a.bin")), ranged):
        seen.clear()
        with pytest.raises(UserError) as caught:
            read()
        reason = " ".join(str(error).split())
        assert str(caught.value) == f"gs://bucket/a.bin: cannot be read ({reason}); {LOGIN}"
        assert len(seen) == tries


def ranged():
    with stores.ranges(epath.Path("gs://bucket/a.bin")) as read:
        read(0, 1)


def test_an_object_that_is_gone_is_not_waited_for(bucket):
    with pytest.raises(
        UserError, match=r"gs://bucket/a.bin: cannot be read \(no such bucket or file\); check the name"
    ):
        ranged()


def test_a_local_file_that_cannot_be_read(tmp_path):
    for read in (stores.read_whole, lambda path: stores.ranges(path).__enter__()):
        with pytest.raises(UserError, match=r"gone: cannot be read \(.*No such file.*\); check the name, the disk"):
            read(epath.Path(tmp_path / "gone"))


def test_a_store_without_credentials_is_one_line(bucket):
    def refuse(what, path):
        raise ConnectionRefusedError("Anonymous caller does not have storage.objects.list access")

    bucket.fault = refuse
    with pytest.raises(UserError) as caught:
        stores.listing(epath.Path("gs://bucket/folder"))
    assert str(caught.value) == (
        f"gs://bucket/folder: cannot be listed (Anonymous caller does not have storage.objects.list access); {LOGIN}"
    )


def test_a_store_that_does_not_answer(bucket, monkeypatch, capsys):
    monkeypatch.setattr(stores, "SAY_AFTER", 0.01)
    monkeypatch.setattr(stores, "ANSWER_WITHIN", 0.05)
    done = threading.Event()
    bucket.fault = lambda what, path: done.wait()
    with pytest.raises(UserError, match=r"gs://bucket/folder: cannot be listed \(no answer within 0 s\)"):
        stores.listing(epath.Path("gs://bucket/folder"))
    done.set()
    assert capsys.readouterr().out.startswith("gs://bucket/folder: no answer yet")


def test_a_slow_answer_is_an_answer(bucket, monkeypatch, capsys):
    monkeypatch.setattr(stores, "SAY_AFTER", 0.01)
    bucket.objects["bucket/folder/a"] = b"1"
    bucket.fault = lambda what, path: threading.Event().wait(0.1)
    assert stores.listing(epath.Path("gs://bucket/folder")) == {"a": 1}
    bucket.fault = lambda what, path: (threading.Event().wait(0.1), {}["timeout"])
    with pytest.raises(UserError, match=r"cannot be listed \('timeout'\)"):
        stores.listing(epath.Path("gs://bucket/folder"))
    assert capsys.readouterr().out.count("no answer yet") == 2
