"""Public entry points for asyncio programs: build the manager, its session and the interceptors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from txrpc._client.client_async import AsyncClient
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc._client.rollback_rules import Kind
from txrpc._client.scope import default_client
from txrpc._client.transaction_async import AsyncJoinedTransaction, AsyncRootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._context import current
from txrpc._environment import coordinator_addresses
from txrpc._grpc.client_async import aio_client_interceptors
from txrpc._grpc.server_async import AsyncServerInterceptor
from txrpc._grpc.session_async import AsyncSession
from txrpc._protocol.messages import TransactionContext
from txrpc.errors import ConfigurationError, CoordinatorUnavailable
from txrpc.options import SessionOptions
from txrpc.resource import AsyncResource

__all__ = ["begin", "client_interceptors", "connect", "current_transaction", "server_interceptors"]


async def connect(
    address: str | None = None,
    *,
    resources: Iterable[AsyncResource] = (),
    group: str = "default",
    process: str = "",
    commit_timeout: float = 10.0,
    decide_in: AsyncResource | str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: SessionOptions | None = None,
) -> AsyncTransactionManager:
    """Connect this process to its coordinator.  See `txrpc.connect`; the manager belongs to the running event loop."""
    options = options or SessionOptions()
    client = AsyncClient(group, resources, process, commit_timeout, decide_in)
    sessions = [
        AsyncSession(each, client.core, options=options, channel_credentials=credentials)
        for each in coordinator_addresses(address)
    ]
    await client.connect(*sessions, patience_s=options.connect_timeout_s, in_background=True)
    return AsyncTransactionManager(client)


def begin(
    timeout: float | None = None,
    *,
    read_only: bool = False,
    decide_in: AsyncResource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
) -> AsyncRootTransaction:
    """Begin a transaction of the manager of the last `connect`: see `AsyncTransactionManager.begin`."""
    manager = AsyncTransactionManager(default_client("txrpc.aio"))
    return manager.begin(
        timeout,
        read_only=read_only,
        decide_in=decide_in,
        rollback_for=rollback_for,
        no_rollback_for=no_rollback_for,
    )


def current_transaction() -> Transaction | None:
    """The transaction that the running code belongs to, or None.

    At its root this is the `RootTransaction`; in a service method that joined it has no ``commit`` and no ``rollback``, but
    everything else: ``xid``, ``status``, ``time_left_s``, ``set_rollback_only``.
    """
    transaction: Transaction | None = current()
    return transaction


def client_interceptors(outside: Iterable[str] = ()) -> list[Any]:
    """For `grpc.aio.insecure_channel` and `grpc.aio.secure_channel`; see `txrpc.client_interceptors`."""
    return aio_client_interceptors(outside)


def server_interceptors(manager: AsyncTransactionManager | None = None) -> list[Any]:
    """For `grpc.aio.server`: calls that come with a transaction join it, through *manager* or that of the last `connect`."""
    if manager is not None:
        manager._client.state.serves = True
    return [AsyncServerInterceptor(_DefaultJoiner() if manager is None else manager._client)]


class _DefaultJoiner:
    def join(self, context: TransactionContext) -> AsyncJoinedTransaction:
        try:
            client: AsyncClient = default_client("txrpc.aio")
        except ConfigurationError as error:
            raise CoordinatorUnavailable(f"the called service takes no part in transactions: {error}") from None
        return client.join(context)
