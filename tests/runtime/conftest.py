from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

from tests.runtime.memory_resource import AsyncMemoryResource, MemoryResource
from txrpc._client.client import Client
from txrpc._client.client_async import AsyncClient
from txrpc._client.scope import set_default_client
from txrpc._protocol.messages import ToCoordinator
from txrpc.errors import CoordinatorUnavailable


class Unreachable:
    """A session that is never open: what a client can do alone."""

    address = "nowhere:1"
    trouble = "no session"
    refused = False
    over = False

    def send(self, node: str, *messages: ToCoordinator) -> None:
        raise CoordinatorUnavailable("no session")


class NoSession(Unreachable):
    def start(self) -> None: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...

    def wait_answered(self, timeout_s: float) -> None: ...


class AsyncNoSession(Unreachable):
    async def start(self) -> None: ...

    async def drain(self) -> None: ...

    async def close(self) -> None: ...

    async def wait_answered(self, timeout_s: float) -> None: ...


@pytest.fixture
def notebook() -> MemoryResource:
    return MemoryResource()


@pytest.fixture
def manager(notebook: MemoryResource) -> Iterator[Client]:
    """A manager with one resource and no coordinator, as the default one."""
    manager = Client("default", [notebook, MemoryResource("second")])
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    with manager:
        yield manager


@pytest.fixture
def aio_notebook() -> AsyncMemoryResource:
    return AsyncMemoryResource()


@pytest.fixture
async def aio_manager(aio_notebook: AsyncMemoryResource) -> AsyncIterator[AsyncClient]:
    manager = AsyncClient("default", cast("Any", [aio_notebook, AsyncMemoryResource("second")]))
    await manager.start(AsyncNoSession())
    set_default_client("txrpc.aio", manager, on=True)
    async with manager:
        yield manager
