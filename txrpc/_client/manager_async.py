"""`AsyncTransactionManager`: what `txrpc.aio.connect` returns.  It has a client, which does the work."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, overload

from txrpc._client import completion
from txrpc._client.client_async import AsyncClient
from txrpc._client.flow import arun
from txrpc._client.rollback_rules import Kind, RollbackRules
from txrpc._client.scope import New, Propagating, Propagation
from txrpc._client.state import ManagerStatus
from txrpc._client.transaction_async import AsyncRootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._client.transactional_async import AsyncScope, transaction
from txrpc._context import current
from txrpc._protocol.messages import Outcome, Wait
from txrpc.errors import TransactionExists
from txrpc.ids import Xid
from txrpc.resource import AsyncResource

__all__ = ["AsyncTransactionManager"]


class AsyncTransactionManager:
    """An asyncio process's side of its transactions.  It belongs to the event loop that it was connected in.

    As a context manager it closes itself: ``async with await txrpc.aio.connect(...) as manager: ...``.
    """

    __slots__ = ("_client",)

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def __repr__(self) -> str:
        return f"<TransactionManager {self.process} of group {self.group}>"

    @property
    def group(self) -> str:
        """The coordinator group that it belongs to."""
        return self._client.state.group

    @property
    def process(self) -> str:
        """Return what this process is called in the coordinator's status, for people."""
        return self._client.state.process

    def status(self) -> ManagerStatus:
        """Return whether there is a session with a coordinator, and which resources are ready.  Sends nothing."""
        return self._client.core.status()

    def begin(
        self,
        timeout: float | None = None,
        *,
        read_only: bool = False,
        decide_in: AsyncResource | str | None = None,
        rollback_for: Kind | Iterable[Kind] = (),
        no_rollback_for: Kind | Iterable[Kind] = (),
    ) -> AsyncRootTransaction:
        """Begin a transaction and make it current in this context until it ends.

        timeout: seconds until everything that is not prepared yet rolls back; 30 by default.
        read_only: the databases refuse what would write.
        decide_in, rollback_for, no_rollback_for: see `txrpc.aio.transaction`.

        Sends nothing.  Raises `TransactionExists` inside another transaction, `UsageError` for a bad argument, `ForkedError`.
        """
        if (existing := current()) is not None:
            raise TransactionExists(
                f"begin() inside transaction {existing.xid}: end it first, or use propagation REQUIRES_NEW"
            )
        rules = RollbackRules.make(rollback_for, no_rollback_for)
        root = self._client.new_root(timeout, read_only, rules, decide_in)
        root._make_current()
        return root

    @overload
    def transaction(
        self,
        timeout: float | None = ...,
        *,
        propagation: Propagating = ...,
        read_only: bool = ...,
        wait: Wait | str | None = ...,
        needs: Iterable[AsyncResource | str] = ...,
        decide_in: AsyncResource | str | None = ...,
        rollback_for: Kind | Iterable[Kind] = ...,
        no_rollback_for: Kind | Iterable[Kind] = ...,
    ) -> AsyncScope[Transaction]: ...
    @overload
    def transaction(
        self,
        timeout: float | None = ...,
        *,
        propagation: New,
        read_only: bool = ...,
        wait: Wait | str | None = ...,
        needs: Iterable[AsyncResource | str] = ...,
        decide_in: AsyncResource | str | None = ...,
        rollback_for: Kind | Iterable[Kind] = ...,
        no_rollback_for: Kind | Iterable[Kind] = ...,
    ) -> AsyncScope[AsyncRootTransaction]: ...
    @overload
    def transaction(
        self,
        timeout: float | None = ...,
        *,
        propagation: Propagation | str,
        read_only: bool = ...,
        wait: Wait | str | None = ...,
        needs: Iterable[AsyncResource | str] = ...,
        decide_in: AsyncResource | str | None = ...,
        rollback_for: Kind | Iterable[Kind] = ...,
        no_rollback_for: Kind | Iterable[Kind] = ...,
    ) -> AsyncScope[Transaction | None]: ...
    def transaction(
        self,
        timeout: float | None = None,
        *,
        propagation: Propagation | str = Propagation.REQUIRED,
        read_only: bool = False,
        wait: Wait | str | None = None,
        needs: Iterable[AsyncResource | str] = (),
        decide_in: AsyncResource | str | None = None,
        rollback_for: Kind | Iterable[Kind] = (),
        no_rollback_for: Kind | Iterable[Kind] = (),
    ) -> AsyncScope[Any]:
        """A block of one transaction of this manager's: see `txrpc.aio.transaction`."""
        return transaction(
            timeout,
            propagation=propagation,
            read_only=read_only,
            wait=wait,
            needs=needs,
            decide_in=decide_in,
            rollback_for=rollback_for,
            no_rollback_for=no_rollback_for,
            manager=self,
        )

    async def outcome(self, xid: Xid, timeout: float = 10.0) -> Outcome:
        """Return how *xid* ended, asking for at most *timeout* seconds.

        For a transaction of this manager's whose commit raised `OutcomeUnknown`, or was cancelled, the answer is definite as
        soon as its database (if it used only one, of this process) or its coordinator is back.  For any other transaction,
        UNKNOWN means that there is no record of a commit (any more).
        Raises `CoordinatorUnavailable` if the coordinator did not answer.
        """
        state = self._client.state
        outcome: Outcome = await arun(completion.outcome(state, xid, state.now_ms() + int(timeout * 1000)))
        return outcome

    async def close(self, grace_s: float = 5.0) -> None:
        """End the session and let go of the resources.

        Roll-backs and commits under way get *grace_s* seconds; what stays prepared is finished by the process that connects next.
        """
        await self._client.close(grace_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()
