"""Public entry points for synchronous programs: build the manager, its session and the interceptors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager
from txrpc._client.rollback_rules import Kind
from txrpc._client.scope import default_client
from txrpc._client.transaction import JoinedTransaction, RootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._context import current
from txrpc._environment import coordinator_addresses
from txrpc._grpc import client
from txrpc._grpc.client import ClientInterceptor
from txrpc._grpc.server import ServerInterceptor
from txrpc._grpc.session import Session
from txrpc._protocol.messages import TransactionContext
from txrpc.errors import ConfigurationError, CoordinatorUnavailable
from txrpc.options import SessionOptions
from txrpc.resource import Resource

__all__ = ["begin", "client_interceptors", "connect", "current_transaction", "intercept_channel", "server_interceptors"]


def connect(
    address: str | None = None,
    *,
    resources: Iterable[Resource] = (),
    group: str = "default",
    process: str = "",
    commit_timeout: float = 10.0,
    decide_in: Resource | str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: SessionOptions | None = None,
) -> TransactionManager:
    """Connect this process to its coordinator, and make the result what `transaction` and the interceptors use.

    address: ``host:port`` of the coordinator, or of all coordinators of a group with commas between them, in the order in which
        new transactions prefer them; by default what the environment variable ``TXRPC_COORDINATOR`` says.
    resources: the databases of this process; each is checked first (see the resource's own ``start``).
    group: the coordinator group, the same everywhere.
    process: how this process is called in the coordinator's status, for people.
    commit_timeout: seconds for which ``commit()`` goes on waiting for its answer when the transaction's deadline has passed, before
        it raises `OutcomeUnknown`; long enough for a coordinator that restarts.
    decide_in: the resource, or its name, whose database decides transactions that do not say otherwise: see `transaction`.
    credentials: for TLS, e.g. ``grpc.ssl_channel_credentials(ca)``; None connects in the clear.

    If the coordinator does not answer within ``options.connect_timeout_s`` a warning is logged and connecting goes on behind.  So
    does starting a resource whose database is out of reach: until it is ready its use raises `ResourceUnavailable`.
    Raises `ConfigurationError` if the coordinator refuses this process, or for what a resource's check finds.  Thread-safe.  After
    a fork call it again, in the child.
    """
    options = options or SessionOptions()
    client = Client(group, resources, process, commit_timeout, decide_in)
    sessions = [
        Session(each, client.core, options=options, channel_credentials=credentials)
        for each in coordinator_addresses(address)
    ]
    client.connect(*sessions, patience_s=options.connect_timeout_s, in_background=True)
    return TransactionManager(client)


def begin(
    timeout: float | None = None,
    *,
    read_only: bool = False,
    decide_in: Resource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
) -> RootTransaction:
    """Begin a transaction of the manager of the last `connect`: see `TransactionManager.begin`."""
    manager = TransactionManager(default_client("txrpc"))
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
    """For `grpc.intercept_channel`: calls made inside a transaction take it along.

    outside: methods that are meant to be called outside of it: ``"/package.Service/Method"``, or ``"/package.Service/*"``.

    A call inside a transaction that a server answers without taking part raises `NotJoined`, and the transaction rolls back.
    """
    return [ClientInterceptor(outside)]


def intercept_channel(channel: grpc.Channel, outside: Iterable[str] = ()) -> grpc.Channel:
    """*channel* with the client interceptor next to the network, whatever interceptors it has already; it is not changed itself.

    For channels that something else has wrapped as they were made, as OpenTelemetry's ``GrpcInstrumentorClient().instrument()``
    does: above such a wrapper the end of a response stream cannot be seen, and the call raises `NotJoined`.  Otherwise it is
    ``grpc.intercept_channel(channel, *client_interceptors(outside))``.
    """
    return client.intercept_channel(channel, outside)


def server_interceptors(manager: TransactionManager | None = None) -> list[Any]:
    """For `grpc.server`: calls that come with a transaction join it, through *manager* or that of the last `connect`."""
    if manager is not None:
        manager._client.state.serves = True
    return [ServerInterceptor(_DefaultJoiner() if manager is None else manager._client)]


class _DefaultJoiner:
    def join(self, context: TransactionContext) -> JoinedTransaction:
        try:
            client: Client = default_client("txrpc")
        except ConfigurationError as error:
            raise CoordinatorUnavailable(f"the called service takes no part in transactions: {error}") from None
        return client.join(context)
