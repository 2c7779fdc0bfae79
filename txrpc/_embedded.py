"""Public entry points for programs with a coordinator inside: see `txrpc._embedded_session`, which is loaded when it is used."""

from __future__ import annotations

from collections.abc import Iterable

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
) -> TransactionManager:
    """Make a coordinator inside this program, and its manager what `transaction` uses: several databases, no server, no gRPC.

    log: URL of the decision log, for example ``sqlite:///txrpc.db``, or a database of PostgreSQL's.
    resources, group, process, commit_timeout: see `txrpc.connect`.

    What a crash leaves prepared is finished when the program starts again with the same log and the same resources.  One program at
    a time may have a log: on a SQLite file a second one is refused; on another database it would end the first one's coordinator.
    Services that are called inside a transaction cannot join it, since only this process reaches the coordinator.
    Raises `ConfigurationError` if the log cannot be opened, or for what a resource's check finds.
    """
    from txrpc._embedded_session import ThreadSession

    client = Client(group, resources, process, commit_timeout)
    client.connect(ThreadSession(client.core, log, group), patience_s=commit_timeout)
    return TransactionManager(client)


async def embedded_async(
    log: str,
    *,
    resources: Iterable[AsyncResource] = (),
    group: str = "default",
    process: str = "",
    commit_timeout: float = 10.0,
) -> AsyncTransactionManager:
    """Make a coordinator inside this asyncio program.  See `txrpc.embedded`; it belongs to the running event loop."""
    from txrpc._embedded_session import LoopSession

    client = AsyncClient(group, resources, process, commit_timeout)
    await client.connect(LoopSession(client.core, log, group), patience_s=commit_timeout)
    return AsyncTransactionManager(client)
