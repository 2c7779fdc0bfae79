"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .interceptor_kit import World


@pytest.fixture
def world() -> Iterator[World]:
    """Servers and channels that end with the test."""
    made = World()
    with made.ends:
        yield made
