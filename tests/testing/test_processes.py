"""What tests stand on: ports and processes."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from txrpc.testing.processes import free_port


def draw(monkeypatch: pytest.MonkeyPatch, *ports: int) -> list[int]:
    """Have these drawn first, and then whatever chance gives: no number of a port is free on every machine."""
    left, chance = list(ports), random.randrange
    monkeypatch.setattr(random, "randrange", lambda start, stop: left.pop(0) if left else chance(start, stop))
    return left


def test_a_port_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given may be bound only later: two members of one group had one address, once in five thousand tests."""
    first = free_port()
    left = draw(monkeypatch, first)
    assert free_port() != first
    assert not left


OTHER = """
import sys
from txrpc.testing.processes import free_port
print(free_port(), flush=True)
sys.stdin.read()
"""


def test_a_port_that_another_process_was_given_is_not_given_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in several processes, and start others that run tests."""
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        left = draw(monkeypatch, theirs)
        assert free_port() != theirs
        assert not left
        other.communicate()
    draw(monkeypatch, theirs)
    assert free_port() == theirs
