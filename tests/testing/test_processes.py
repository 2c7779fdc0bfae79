"""What tests stand on: ports and processes."""

from __future__ import annotations

import random

import pytest

from txrpc.testing.processes import free_port


def test_a_port_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given may be bound only later: two members of one group had one address, once in five thousand tests."""
    ports = [31_001, 31_001, 31_002]
    monkeypatch.setattr(random, "randrange", lambda *_range: ports.pop(0))
    first, second = free_port(), free_port()
    assert (first, second) == (31_001, 31_002)
    assert not ports
