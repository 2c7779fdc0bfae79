"""What tests stand on: ports and processes."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.waiting import eventually, is_alive
from txrpc.testing import processes
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


PARENT = """
import sys
from txrpc.testing.processes import Child
children = [Child([sys.executable, "-c", "import time; time.sleep(600)"], name=name) for name in ("left", "killed")]
for child in children:
    child.start()
children[1].kill()
print(children[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_children_end_with_their_parent(killed: bool) -> None:
    """A coordinator ran on for ever when the tests that had started it were killed."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        if killed:
            parent.kill()
    eventually(lambda: not is_alive(child))


def test_what_has_ended_is_not_killed_by_the_watchdog() -> None:
    """Its number may be another process's by then."""
    told = b"started 11\nstarted 22\nstarted 33\nended 22\nended 44\n"
    done = subprocess.run(
        ["/bin/sh", "-c", 'kill() { echo "$@"; }' + processes._WATCHDOG], input=told, capture_output=True, check=True
    )
    assert done.stdout.split() == [b"-9", b"11", b"-9", b"33"]
