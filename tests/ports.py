"""Ports of this machine, for tests that start servers or processes."""

import socket


def free_port():
    """A port that nobody listens at; another may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
