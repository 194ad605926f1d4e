"""Processes meet over real sockets: who is missing, came twice or differs is said to all that arrived."""

import socket
import threading

import pytest
from ports import free_port

from selfreward_jax import rendezvous
from selfreward_jax.errors import UserError


def meet(places, timeout=20.0):
    """Outcome of each (index, count, about): [] or the lines of its error. One thread stands for each process."""
    address, out = f"127.0.0.1:{free_port()}", {}

    def one(number, index, count, about):
        try:
            rendezvous.meet(address, count, index, about, timeout)
            out[number] = []
        except UserError as error:
            out[number] = list(error.args)

    threads = [threading.Thread(target=one, args=(number, *place)) for number, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [out[number] for number in range(len(places))]


def test_all_are_there():
    assert meet([(index, 5, {"config": "a"}) for index in (3, 0, 4, 1, 2)]) == [[]] * 5


def test_one_alone_waits_for_nobody():
    rendezvous.meet("127.0.0.1:1", 1, 0, {}, 0.0)


def test_missing_ones_are_named_to_all():
    first, third = meet([(0, 4, {}), (2, 4, {})], timeout=1.0)
    assert first == third
    assert "processes 1, 3 had not arrived" in first[0]


def test_those_who_wait_say_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_SAY_EVERY", 0.3)
    meet([(0, 3, {}), (2, 3, {})], timeout=2.5)
    meet([(1, 2, {})], timeout=2.5)
    said = capsys.readouterr().out
    assert "for process 1 of 3, " in said
    assert "process 1 of 2 waits for process 0 at 127.0.0.1:" in said


def test_nobody_leads():
    (line,) = meet([(1, 2, {})], timeout=1.0)[0]
    assert "process 1 of 2 did not reach process 0" in line and "start process 0" in line


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ((1, 3, {"config": "a"}), "process 1 was started with 3, process 0 with 2"),
        ((1, 2, {"config": "b"}), "config of process 1 is b, of process 0 a"),
        ((1, 2, {}), "config of process 1 is None"),
        ((0, 2, {"config": "a"}), "can't be used here"),  # two process 0 on one machine: the port is taken
        ((7, 2, {"config": "a"}), "--process_id=7"),
    ],
)
def test_those_that_differ(other, says):
    answers = meet([(0, 2, {"config": "a"}), other], timeout=2.0)
    assert any(says in line for lines in answers for line in lines)


def test_strangers_at_the_port_do_no_harm():
    port, out = free_port(), []

    def lead():
        rendezvous.meet(f"127.0.0.1:{port}", 2, 0, {}, 20.0)
        out.append("met")

    leader = threading.Thread(target=lead)
    leader.start()
    for noise in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1, 2]\n", b'{"index": "x"}\n', b"\xff\xfe\n"):
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as knock:
                    knock.sendall(noise)
                break
            except OSError:
                threading.Event().wait(0.05)
    rendezvous.meet(f"127.0.0.1:{port}", 2, 1, {}, 20.0)
    leader.join(30)
    assert out == ["met"]


@pytest.mark.parametrize("coordinator", ["", "host", "host:", ":80", "host:http"])
def test_an_address_that_is_none(coordinator):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        rendezvous.meet(coordinator, 2, 0, {}, 1.0)
