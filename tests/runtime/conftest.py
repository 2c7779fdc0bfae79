from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

from tests.runtime.notebook import AioNotebook, Notebook
from txrpc.runtime.manager import Manager
from txrpc.runtime.manager_aio import AioManager
from txrpc.runtime.scope import set_default_manager


class NoSession:
    """A coordinator that is never in reach: what a manager can do alone."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class AioNoSession:
    async def start(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def manager(notebook: Notebook) -> Iterator[Manager]:
    """A manager with one resource and no coordinator, as the default one."""
    manager = Manager("default", [notebook, Notebook("second")])
    manager.start(NoSession())
    set_default_manager("txrpc", manager, on=True)
    with manager:
        yield manager


@pytest.fixture
def aio_notebook() -> AioNotebook:
    return AioNotebook()


@pytest.fixture
async def aio_manager(aio_notebook: AioNotebook) -> AsyncIterator[AioManager]:
    manager = AioManager("default", cast("Any", [aio_notebook, AioNotebook("second")]))
    await manager.start(AioNoSession())
    set_default_manager("txrpc.aio", manager, on=True)
    async with manager:
        yield manager
