"""What tests stand on: ports and processes."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from txrpc.testing.processes import free_port


def test_a_port_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given may be bound only later: two members of one group had one address, once in five thousand tests."""
    ports = [31_001, 31_001, 31_002]
    monkeypatch.setattr(random, "randrange", lambda *_range: ports.pop(0))
    first, second = free_port(), free_port()
    assert (first, second) == (31_001, 31_002)
    assert not ports


OTHER = """
import random, sys
from txrpc.testing.processes import free_port
random.randrange = lambda *_range: 31_003
print(free_port(), flush=True)
sys.stdin.read()
"""


def test_a_port_that_another_process_was_given_is_not_given_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in several processes, and start others that run tests."""
    ports = [31_003, 31_004]
    monkeypatch.setattr(random, "randrange", lambda *_range: ports.pop(0))
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"31003\n"
        assert free_port() == 31_004
        other.communicate()
    ports[:] = [31_003]
    assert free_port() == 31_003
