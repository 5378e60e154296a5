"""The ports that the tests give to process groups."""

from __future__ import annotations

import multiprocessing
import socket

import pytest

from tests import ranks
from tests.ranks import free_port


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port that this process was given, from now on the only one that there is."""
    only = free_port()
    monkeypatch.setattr(ranks, "_PORTS", range(only, only + 1))
    return only


def asks_and_fails(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        free_port()


def test_a_port_that_another_process_was_given_is_not_free_though_nothing_listens(port: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=asks_and_fails, args=("No free port",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_port_on_which_something_listens_is_not_free(port: int) -> None:
    ranks._reservations.pop().close()
    with socket.create_server(("127.0.0.1", port)):
        asks_and_fails("No free port")
    assert free_port() == port
