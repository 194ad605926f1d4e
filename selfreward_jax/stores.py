"""Bytes on local disks and object stores: listed, read by ranges, written whole or not at all.

A store's failure is one line for the user: each client (gcsfs, s3fs, …) has errors of its own, and some hide them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath
from etils.epath.backend import fsspec_backend

from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say

# (first byte, how many) -> the bytes, never fewer. May be called from several threads at once.
Ranges = Callable[[int, int], bytes]
Write = Callable[[Any], Any]
T = TypeVar("T")

RETRY_AFTER = (1.0, 4.0)  # seconds; a client's own retries come before these
# A client without credentials or network tries its sources in turn, for up to a minute, and says nothing meanwhile.
SAY_AFTER, ANSWER_WITHIN = 5.0, 90.0
_UPLOAD_BYTES = 32 << 20  # of one request, a multiple of 256 KiB as Google's store wants
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
_LOGIN = {
    "gs": "`gcloud auth application-default login`",
    "s3": "`aws configure`",
    "az": "`az login`",
    "hf": "`hf auth login`",
}

# It logs a traceback of each error that it also raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies on an object store (gs://, s3://): no positions to write at, no renames."""
    return "://" in os.fspath(path)


def refusal(name: str) -> str:
    """Why nothing can be opened under this name, or "": its scheme (https://, file://) is of no store that is known."""
    scheme, url, _ = name.partition("://")
    if not url or scheme in _PACKAGES:
        return ""
    known = ", ".join(f"{scheme}://" for scheme in _PACKAGES)
    return f"{scheme}:// is no store that can be used; give a local path or {known}"


def place(name: str, option: str) -> epath.Path:
    """The path that an option names, on a local disk or a store.

    Raises:
        UserError: if it is of a kind of store that is not known.
    """
    if reason := refusal(name):
        raise UserError(f"{option}={name}: {reason}")
    return epath.Path(name if is_remote(name) else os.path.expanduser(name))


def _files(path: epath.Path) -> Any:
    """The file system that epath uses for this path: two would not see each other's changes in their listings."""
    return fsspec_backend.fs(os.fspath(path))


def _failed(path: epath.PathLike, what: str, error: Exception) -> UserError:
    scheme = os.fspath(path).split("://")[0]
    if isinstance(error, ImportError):
        return UserError(f"{path}: {error}; `pip install {_PACKAGES.get(scheme, 'fsspec')}`")
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, FileNotFoundError) and is_remote(path):
        reason = "no such bucket or file"
    check = "the disk" if not is_remote(path) else f"the network and your credentials ({_LOGIN.get(scheme, 'login')})"
    return UserError(f"{path}: cannot be {what} ({reason}); check the name, {check}")


@contextlib.contextmanager
def asking(path: epath.PathLike, what: str) -> Iterator[None]:
    """Makes whatever a store's client or a disk raises inside a `UserError`; only calls to them belong there.

    Args:
        what: was to be done: "read", "written" or "removed".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _failed(path, what, error) from error


def exists(path: epath.Path) -> bool:
    """Whether a file or folder is there.

    Raises:
        UserError: if that cannot be known.
    """
    with asking(path, "read"):
        return path.exists()


def _answered(path: epath.Path, ask: Callable[[], T]) -> T:
    """The answer to a first question, or an error while the user is still there to read it."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="first question to a store").start()
    try:
        return answer.result(SAY_AFTER)
    except concurrent.futures.TimeoutError:
        if answer.done():
            raise
    say(f"{path}: no answer yet; without credentials or network it can take a minute until that is clear")
    try:
        return answer.result(ANSWER_WITHIN - SAY_AFTER)
    except concurrent.futures.TimeoutError as error:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {ANSWER_WITHIN:.0f} s") from error


def listing(folder: epath.Path) -> dict[str, int] | None:
    """What lies directly in a folder: name to bytes (0 for a folder); None if there is no such folder (or bucket).

    A link to what is gone is left out.

    Raises:
        UserError: if it cannot be listed: a store that refuses (credentials) or does not answer within 90 seconds.
    """
    path = os.fspath(folder)
    if not is_remote(folder):
        try:
            with os.scandir(path) as entries:
                return {
                    one.name: one.stat().st_size if one.is_file() else 0 for one in entries if os.path.exists(one)
                }
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failed(folder, "listed", error) from error
    try:
        found = _answered(folder, lambda: _files(folder).ls(path, detail=True, refresh=True))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever this store's client raises
        raise _failed(folder, "listed", error) from error
    # A folder that was made in a store's console holds an empty object of its own name; a file is listed as itself.
    itself = path.split("://")[1].strip("/")
    names = {entry["name"].split("://")[-1].strip("/"): entry.get("size") or 0 for entry in found}
    names.pop(itself, None)
    return {name.rsplit("/", 1)[-1]: size for name, size in names.items()}


def ask(folder: epath.Path) -> None:
    """Asks a store for a folder once, so that missing credentials, clients and networks are said now, in one line.

    Raises:
        UserError: as `listing`; never for a local folder.
    """
    if is_remote(folder):
        listing(folder)


@contextlib.contextmanager
def ranges(path: epath.Path) -> Iterator[Ranges]:
    """Opens a file to be read by ranges. Nothing of it is mapped or kept; a range of a remote file is one request.

    A remote range that fails is asked for again, twice.

    Yields:
        `read(start, count)`, which raises `UserError` if the range cannot be had whole.
    """
    if is_remote(path):
        files, name = _files(path), os.fspath(path)

        def read(start: int, count: int) -> bytes:
            return _retried(path, lambda: _whole(files.cat_file(name, start=start, end=start + count), start, count))

        yield read
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _failed(path, "read", error) from error

    def pread(start: int, count: int) -> bytes:
        try:
            return _whole(os.pread(descriptor, count, start), start, count)
        except OSError as error:
            raise _failed(path, "read", error) from error

    try:
        yield pread
    finally:
        os.close(descriptor)


def _whole(found: bytes, start: int, count: int) -> bytes:
    if len(found) != count:
        raise OSError(
            f"{len(found)} bytes came from byte {start} on, {count} were asked for: it is cut or has changed"
        )
    return found


def _retried(path: epath.Path, read: Callable[[], T]) -> T:
    for pause in (*RETRY_AFTER, None):
        try:
            return read()
        except Exception as error:  # whatever this store's client raises
            if pause is None or isinstance(error, FileNotFoundError | PermissionError):
                raise _failed(path, "read", error) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_whole(path: epath.Path) -> bytes:
    """A small file's bytes.

    Raises:
        UserError: if it cannot be read.
    """
    if is_remote(path):
        return _retried(path, lambda: _files(path).cat_file(os.fspath(path)))
    try:
        return path.read_bytes()
    except OSError as error:
        raise _failed(path, "read", error) from error


def read_if_there(path: epath.Path) -> bytes | None:
    """As `read_whole`, but None where there is no such file; a store is asked, never what a client remembers of it."""
    try:
        return read_whole(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def create(path: epath.Path, data: bytes) -> bool:
    """Writes a small file only where there is none, and says whether it did.

    gcsfs (ifGenerationMatch=0), s3fs (If-None-Match) and adlfs leave it to the store, which takes one of two that come at
    once. Another client may look first and write then.

    Raises:
        UserError: if it cannot be written for another reason.
    """
    try:
        if is_remote(path):
            _files(path).pipe_file(os.fspath(path), data, mode="create")
        else:
            with open(path, "xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    except Exception as error:  # whatever this store's client raises
        raise _failed(path, "written", error) from error
    return True


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[Write]:
    """Writes a file piece by piece; under its name it appears whole or not at all.

    A local file has another name until it is whole. A remote one is uploaded while it is written, and becomes an
    object when the upload is closed; an upload that fails is cancelled.

    Raises:
        OSError: if a local disk cannot take it.
        UserError: if a store cannot.
    """
    if not is_remote(path):
        scratch = path.parent / f".{path.name}.tmp"
        try:
            with open(scratch, "wb") as file:
                yield file.write
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return
    with asking(path, "written"):
        upload = _files(path).open(os.fspath(path), "wb", block_size=_UPLOAD_BYTES)
    try:

        def write(piece: Any) -> None:
            with asking(path, "written"):
                upload.write(piece)

        yield write
        with asking(path, "written"):
            upload.close()
    except BaseException:
        with contextlib.suppress(Exception):  # the error that matters is the first
            upload.discard()
        upload.closed = True  # else it would close itself, which makes an object of what is there
        raise


def remove(path: epath.Path) -> None:
    """Removes a file if it is there.

    Raises:
        UserError: if it cannot be removed.
    """
    with asking(path, "removed"), contextlib.suppress(FileNotFoundError):
        _files(path).rm(os.fspath(path)) if is_remote(path) else path.unlink()
