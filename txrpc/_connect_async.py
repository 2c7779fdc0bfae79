"""The doors of asyncio programs, where a manager, its session and the interceptors are put together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from txrpc._client.manager_async import AsyncJoinedCall, AsyncManager, AsyncTransaction
from txrpc._client.rollback_rules import Kind
from txrpc._client.scope import default_manager, set_default_manager
from txrpc._context import current
from txrpc._environment import coordinator_address
from txrpc._grpc.client_async import aio_client_interceptors
from txrpc._grpc.server_async import AsyncServerInterceptor
from txrpc._grpc.session_async import AsyncSession
from txrpc._protocol.messages import TransactionContext
from txrpc.errors import ConfigurationError, CoordinatorUnavailable
from txrpc.options import SessionOptions
from txrpc.resource import AsyncResource

__all__ = ["begin", "client_interceptors", "connect", "current_transaction", "server_interceptors"]

logger = logging.getLogger("txrpc")


async def connect(
    address: str | None = None,
    *,
    resources: Iterable[AsyncResource] = (),
    group: str = "default",
    process: str = "",
    options: SessionOptions | None = None,
) -> AsyncManager:
    """Connect this process to its coordinator.  See `txrpc.connect`; the manager belongs to the running event loop."""
    options = options or SessionOptions()
    manager = AsyncManager(group, resources, process)
    session = AsyncSession(
        coordinator_address(address),
        hello=manager.hello,
        on_welcome=manager.on_welcome,
        on_message=manager.on_message,
        on_lost=manager.on_lost,
        options=options,
    )
    try:
        await manager.start(session)
        await session.wait_connected(options.connect_timeout_s)
    except CoordinatorUnavailable as error:
        logger.warning("%s; connecting goes on in the background", error)
    except BaseException:
        await manager.close()
        raise
    set_default_manager("txrpc.aio", manager, on=True)
    return manager


def begin(
    timeout: float | None = None,
    *,
    read_only: bool = False,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
) -> AsyncTransaction:
    """`Manager.begin` of the manager of the last `connect`."""
    manager: AsyncManager = default_manager("txrpc.aio")
    return manager.begin(timeout, read_only=read_only, rollback_for=rollback_for, no_rollback_for=no_rollback_for)


def current_transaction() -> AsyncTransaction | AsyncJoinedCall | None:
    """The transaction that the running code belongs to, or None.

    At its root this is the `Transaction`; in a service method that joined it has no ``commit`` and no ``rollback``, but
    everything else: ``xid``, ``status``, ``time_left_s``, ``set_rollback_only``.
    """
    handle: AsyncTransaction | AsyncJoinedCall | None = current()
    return handle


def client_interceptors(outside: Iterable[str] = ()) -> list[Any]:
    """For `grpc.aio.insecure_channel` and `grpc.aio.secure_channel`; see `txrpc.client_interceptors`."""
    return aio_client_interceptors(outside)


def server_interceptors(manager: AsyncManager | None = None) -> list[Any]:
    """For `grpc.aio.server`: calls that come with a transaction join it, through *manager* or that of the last `connect`."""
    if manager is not None:
        manager.serves = True
    return [AsyncServerInterceptor(manager or _DefaultJoiner())]


class _DefaultJoiner:
    def join(self, context: TransactionContext) -> AsyncJoinedCall:
        try:
            manager: AsyncManager = default_manager("txrpc.aio")
        except ConfigurationError as error:
            raise CoordinatorUnavailable(f"the called service takes no part in transactions: {error}") from None
        return manager.join(context)
