"""Public entry points for programs with a coordinator inside: see `txrpc._embedded_session`, which is loaded when it is used."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from txrpc._client.client import Client
from txrpc._client.client_async import AsyncClient
from txrpc._client.manager import TransactionManager
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc.resource import AsyncResource, Resource

__all__ = ["embedded", "embedded_async"]


def embedded(
    log: str,
    *,
    resources: Iterable[Resource] = (),
    group: str = "default",
    process: str = "",
    commit_timeout: float = 10.0,
    decide_in: Resource | str | None = None,
    node: str = "embedded",
    listen: str = "",
    credentials: grpc.ServerCredentials | None = None,
) -> TransactionManager:
    """Make a coordinator inside this program, and its manager what `transaction` uses: several databases, and no server.

    log: URL of the decision log, for example ``sqlite:///txrpc.db``, or a database of PostgreSQL's.
    resources, group, process, commit_timeout, decide_in: see `txrpc.connect`.
    node: the coordinator's name, the same after every restart.  Programs whose coordinators one process connects to need different
        ones.
    listen: ``host:port`` at which other processes reach this coordinator with `txrpc.connect`, so that services can join this
        program's transactions, and ``txrpc status`` can ask; port 0 lets the system choose, and `TransactionManager.status` has it.
        Without it only this process uses the coordinator, and services that are called in a transaction cannot join it.
    credentials: for TLS there, e.g. ``grpc.ssl_server_credentials(...)``; None serves in the clear.

    What a crash leaves prepared is finished when the program starts again with the same log and the same resources; services keep
    their branches until then.  One program at a time may have a log: on a SQLite file a second one is refused; on another database
    it would end the first one's coordinator.
    Raises `ConfigurationError` if the log cannot be opened, the address cannot be had, or for what a resource's check finds.
    """
    from txrpc._embedded_session import Embedding, ThreadSession

    client = Client(group, resources, process, commit_timeout, decide_in)
    embedding = Embedding(log, group, node, listen, credentials)
    client.connect(ThreadSession(client.core, embedding), patience_s=commit_timeout)
    return TransactionManager(client)


async def embedded_async(
    log: str,
    *,
    resources: Iterable[AsyncResource] = (),
    group: str = "default",
    process: str = "",
    commit_timeout: float = 10.0,
    decide_in: AsyncResource | str | None = None,
    node: str = "embedded",
    listen: str = "",
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncTransactionManager:
    """Make a coordinator inside this asyncio program.  See `txrpc.embedded`; it belongs to the running event loop."""
    from txrpc._embedded_session import Embedding, LoopSession

    client = AsyncClient(group, resources, process, commit_timeout, decide_in)
    embedding = Embedding(log, group, node, listen, credentials)
    await client.connect(LoopSession(client.core, embedding), patience_s=commit_timeout)
    return AsyncTransactionManager(client)
