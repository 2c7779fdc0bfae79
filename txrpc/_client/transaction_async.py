"""The transaction objects of asyncio programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from txrpc._client import branches, completion
from txrpc._client.flow import arun
from txrpc._client.local_transaction import LocalTransaction, Status, TransactionEvent
from txrpc._client.reasons import reason_of
from txrpc._client.state import ClientState
from txrpc._client.transaction_base import JoinedTransactionBase, RootTransactionBase, log_hook_error
from txrpc._context import bind, restore, set_current
from txrpc._protocol.messages import CallReport, Outcome, Wait
from txrpc.errors import AbortCode, Reason
from txrpc.resource import AsyncResource, Work

__all__ = ["AsyncJoinedTransaction", "AsyncRootTransaction"]


@asynccontextmanager
async def _use(
    client: ClientState, part: LocalTransaction, resource: AsyncResource, joined: bool
) -> AsyncIterator[Work]:
    branch = await arun(branches.enter(client, part, resource, joined))
    try:
        yield branch.work
    except BaseException as error:
        instead = branches.failed(part, branch, error)
        if instead is not None:
            raise instead from error
        raise
    finally:
        branches.leave(client, branch)


class AsyncJoinedTransaction(JoinedTransactionBase):
    """The current transaction inside a service method that was called with a transaction's context."""

    def use(self, resource: AsyncResource) -> AbstractAsyncContextManager[Work]:
        """Use this transaction's branch in *resource* for one block.  See `txrpc.resource.ResourceUser`."""
        return _use(self._client, self._part, resource, joined=True)

    async def leave(self) -> CallReport:
        """End this call's part.  See `txrpc._grpc.ports.Handle`."""
        if self._report is not None:
            return self._report
        await arun(completion.settle(self._part))
        await arun(self._call_ended())
        return self._leave()


class AsyncRootTransaction(RootTransactionBase):
    """A transaction at its root.  `commit` and `rollback` end it, from any task, once."""

    _previous: Any = None
    _is_current = False

    def use(self, resource: AsyncResource) -> AbstractAsyncContextManager[Work]:
        """Use this transaction's branch in *resource* for one block.  See `txrpc.resource.ResourceUser`."""
        return _use(self._client, self._part, resource, joined=False)

    async def commit(self, wait: Wait | None = None) -> None:
        """Commit every branch, or none.

        Returns when all have committed; or with ``wait=Wait.DECISION``, and by default where a resource decides, as soon as the
        decision is durable; `pending` then names what is still under way.

        Raises `TransactionAborted` (nothing was committed), `CallsInFlight` (likewise, and your mistake), `OutcomeUnknown` (ask
        `TransactionManager.outcome` later), `HeuristicOutcome`, `IllegalState`, or what a `before_commit` hook raised (it is rolled
        back).
        """
        try:
            if self._part.hooks.before_commit:
                await self._before_commit()
            await arun(completion.commit(self._client, self._part, wait))
        finally:
            completion.keep_unknown(self._client, self._part)
            await self._completed()

    async def rollback(self, reason: Reason | str | None = None) -> None:
        """Roll every branch back.

        Raises `IllegalState` if it was committed, also by a call that was to decide it and whose reply was lost; then
        `OutcomeUnknown` as well.
        """
        if not isinstance(reason, Reason):
            reason = Reason(AbortCode.REQUESTED, reason or "rollback() was called")
        try:
            await arun(completion.rollback(self._client, self._part, reason))
        finally:
            completion.keep_unknown(self._client, self._part)
            await self._completed()

    def _make_current(self) -> None:
        self._previous, self._is_current = set_current(self, self._rules), True

    async def _before_commit(self) -> None:
        hooks = self._part.hooks.before_commit
        try:
            with bind(self, self._rules):
                while hooks and self.status is Status.ACTIVE:
                    result = hooks.pop(0)(TransactionEvent(self.xid))
                    if asyncio.iscoroutine(result):
                        await result
        except BaseException as error:
            if not self.ended:
                await arun(completion.rollback(self._client, self._part, reason_of(error)))
            raise

    async def _completed(self) -> None:
        if self._is_current:
            restore(self._previous)
            self._is_current, self._previous = False, None
        if not self._part.hooks.after:
            return
        event = self._event()
        with bind(None):  # not even in a transaction around this one
            for hook in self._part.hooks.take_after(event.outcome or Outcome.UNKNOWN):
                try:
                    result = hook(event)
                    if asyncio.iscoroutine(result):
                        await result
                except Exception as error:
                    log_hook_error(self.xid, error)
