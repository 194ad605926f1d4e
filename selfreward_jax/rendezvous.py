"""Processes meet before jax starts, because jax ends a process (SIGABRT) when another does not arrive or differs.

Process 0 listens at the coordinator's address; each other process says who it is; all hear the same answer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from selfreward_jax.errors import UserError

_LONGEST = 1 << 16  # bytes of a message
_SAY_EVERY = 10.0  # seconds of waiting


def meet(coordinator: str, count: int, index: int, about: Mapping[str, str], timeout: float) -> None:
    """Returns on every process when all `count` are there and agree.

    Args:
        coordinator: HOST:PORT of process 0.
        about: what must be the same everywhere, e.g. {"--config.seed": "0"}.
        timeout: seconds to wait.

    Raises:
        UserError: on every process that arrived: which ones are missing, came twice, or differ and in what.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT of process 0, the port from 1 to 65535")
    hello = {"index": index, "count": count, "about": dict(about)}
    deadline = time.monotonic() + timeout
    if count == 1:
        return
    lines = _lead((host, int(port)), hello, deadline) if index == 0 else _join((host, int(port)), hello, deadline)
    if lines:
        raise UserError(*lines)


def _lead(address: tuple[str, int], own: dict[str, Any], deadline: float) -> list[str]:
    host, port = address
    began = time.monotonic()
    here = {0: own}
    problems: list[str] = []
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} can't be used here ({error.strerror}); take another"
                " (JAX_COORDINATOR_PORT where it is found out)"
            ) from error
        waiting = []
        said = began
        while len(here) < own["count"] and not problems and time.monotonic() < deadline:
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                absent = ", ".join(str(index) for index in range(own["count"]) if index not in here)
                _say(f"waiting at {host}:{port} for process {absent} of {own['count']}, {deadline - said:.0f} s more")
            for guest, hello in _arrivals(server, deadline):
                waiting.append(open_sockets.enter_context(guest))
                problems += _differences(own, hello, here)
                here[hello["index"]] = hello
        missing = sorted(set(range(own["count"])) - set(here))
        if missing and not problems:
            problems.append(
                f"--num_processes={own['count']}: after {time.monotonic() - began:.0f} s processes"
                f" {', '.join(map(str, missing))} had not arrived at {host}:{port}; start them, with this coordinator"
            )
        for guest in waiting:
            with contextlib.suppress(OSError):  # one that has left by now needs no answer
                guest.sendall(json.dumps({"problems": problems}).encode() + b"\n")
    return problems


def _arrivals(server: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
    """The next process to say who it is, if one comes; what else knocks at the port is turned away."""
    server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
    try:
        guest, _ = server.accept()
    except TimeoutError:
        return
    hello = _read(guest, 5.0)
    if isinstance(hello.get("index"), int) and isinstance(hello.get("count"), int) and "about" in hello:
        yield guest, hello
    else:
        guest.close()


def _differences(own: dict[str, Any], other: dict[str, Any], here: Mapping[int, Any]) -> list[str]:
    who = f"process {other['index']}"
    lines = []
    if other["count"] != own["count"]:
        lines.append(f"--num_processes: {who} was started with {other['count']}, process 0 with {own['count']}")
    elif other["index"] in here or not 0 <= other["index"] < own["count"]:
        lines.append(f"--process_id={other['index']}: came twice or is not below {own['count']}")
    return lines + differences(other["index"], own["about"], other["about"])


def differences(index: int, own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what the process of this index differs from process 0, a line each."""
    return [
        f"{name} of process {index} is {other.get(name)}, of process 0 {value}; start all with the same"
        for name, value in own.items()
        if other.get(name) != value
    ]


def _join(address: tuple[str, int], hello: dict[str, Any], deadline: float) -> list[str]:
    where = f"process {hello['index']} of {hello['count']}"
    reason, said = "nobody listens there", time.monotonic()
    while time.monotonic() < deadline:
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            _say(f"{where} waits for process 0 at {address[0]}:{address[1]} ({reason}), {deadline - said:.0f} s more")
        try:
            with socket.create_connection(address, timeout=5.0) as server:
                server.sendall(json.dumps(hello).encode() + b"\n")
                answer = _read(server, deadline - time.monotonic() + 5.0)
                if "problems" in answer:
                    return [str(line) for line in answer["problems"]]
                reason = "no answer"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    return [f"{where} did not reach process 0 at {address[0]}:{address[1]} ({reason}); start process 0 there"]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _read(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """One JSON object on a line; {} for anything else."""
    data = b""
    connection.settimeout(max(0.01, seconds))
    try:
        while not data.endswith(b"\n") and len(data) < _LONGEST:
            more = connection.recv(4096)
            if not more:
                break
            data += more
        found = json.loads(data)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
