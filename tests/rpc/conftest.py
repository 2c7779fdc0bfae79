"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from .aio_kit import AsyncWorld
from .interceptor_kit import World


@pytest.fixture
def world() -> Iterator[World]:
    """Servers and channels that end with the test."""
    made = World()
    with made.ends:
        yield made


@pytest.fixture
async def aworld() -> AsyncIterator[AsyncWorld]:
    """The same for asyncio."""
    made = AsyncWorld()
    async with made.ends:
        yield made
