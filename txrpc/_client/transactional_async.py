"""`transaction()` and `@transactional` for asyncio programs."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from txrpc._client.flow import arun
from txrpc._client.retry import Attempts, Retry
from txrpc._client.rollback_rules import Kind
from txrpc._client.scope import (
    BaseScope,
    New,
    Propagating,
    Propagation,
    Settings,
    is_generator,
    refuse_undecoratable,
    refuse_unjoined,
)
from txrpc._client.transaction_async import AsyncRootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._context import bind, restore
from txrpc._protocol.messages import Wait
from txrpc.resource import AsyncResource

if TYPE_CHECKING:
    from txrpc._client.manager_async import AsyncTransactionManager

__all__ = ["AsyncScope", "transaction", "transactional"]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
"""What a block yields: a `Transaction`, or None where the propagation allows for none."""


class AsyncScope(BaseScope, Generic[_T]):
    """An asynchronous context manager that is used once."""

    entry_point = "txrpc.aio"

    async def __aenter__(self) -> _T:
        transaction: _T = self.enter()
        if self.settings.needs:
            try:
                await self.admit()
            except BaseException as error:
                restore(self._previous)
                await self.close(error)
                raise
        return transaction

    async def admit(self) -> None:
        """Wait for what the transaction needs."""
        for resource in self.needed():
            async with self.handle.use(resource):
                pass

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        restore(self._previous)
        await self.close(error)

    async def close(self, error: BaseException | None) -> None:
        """End what `open` began."""
        ends, reason = self.verdict(error)
        if not ends:
            return
        if reason is None:
            await self.handle.commit(self.settings.wait)
        else:
            await self.handle.rollback(reason)


@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: Propagating = ...,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[AsyncResource | str] = ...,
    decide_in: AsyncResource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: AsyncTransactionManager | None = ...,
) -> AsyncScope[Transaction]: ...
@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: New,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[AsyncResource | str] = ...,
    decide_in: AsyncResource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: AsyncTransactionManager | None = ...,
) -> AsyncScope[AsyncRootTransaction]: ...
@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: Propagation | str,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[AsyncResource | str] = ...,
    decide_in: AsyncResource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: AsyncTransactionManager | None = ...,
) -> AsyncScope[Transaction | None]: ...
def transaction(
    timeout: float | None = None,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    read_only: bool = False,
    wait: Wait | str | None = None,
    needs: Iterable[AsyncResource | str] = (),
    decide_in: AsyncResource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    manager: AsyncTransactionManager | None = None,
) -> AsyncScope[Any]:
    """A block of one transaction: ``async with txrpc.aio.transaction(timeout=5) as tx: ...``.

    At its end the transaction commits; an exception that leaves it rolls it back and goes on.  Inside another transaction the
    block joins that one, which then only commits where it began (see `Propagation`); *timeout* and *wait* are the root's.
    *read_only* holds for the block, and for the calls that it makes.

    timeout: seconds until everything not yet prepared rolls back; 30 by default.
    read_only: the databases refuse what would write.
    wait: ``ACKNOWLEDGED``: return when every database has committed; ``DECISION``: as soon as the decision is durable.  The first
        is the default, and the second with *decide_in*.
    needs: resources of this process, or their names.  Before the block begins, the transaction waits for a connection to each of
        them, in one order for all transactions: so no two of them can wait for each other's connections.
        Each resource named takes part from then on.
    decide_in: a resource that was made with ``decides=True``, or its name, of this process or of another one that is connected: its
        database commits the decision together with its own work.  It saves most where the resource is this process's, and the
        others have voted before: see `txrpc.aio.final_call`.  ``""``: the coordinator, where `txrpc.aio.connect` was given a
        resource that decides.
    rollback_for, no_rollback_for: exception types and `grpc.StatusCode` members that do, or do not, roll back.
    manager: instead of the one of the last `txrpc.aio.connect`.

    Leaving the block raises what `RootTransaction.commit` raises.
    """
    return AsyncScope(
        Settings.make(
            propagation,
            timeout,
            read_only,
            wait,
            rollback_for,
            no_rollback_for,
            None,
            manager,
            needs=needs,
            decide_in=decide_in,
        )
    )


@overload
def transactional(fn: _F, /) -> _F: ...
@overload
def transactional(
    *,
    propagation: Propagation | str = ...,
    timeout: float | None = ...,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[AsyncResource | str] = ...,
    decide_in: AsyncResource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    retry: Retry | int | bool | None = ...,
    final: bool = ...,
    manager: AsyncTransactionManager | None = ...,
) -> Callable[[_F], _F]: ...
def transactional(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    timeout: float | None = None,
    read_only: bool = False,
    wait: Wait | str | None = None,
    needs: Iterable[AsyncResource | str] = (),
    decide_in: AsyncResource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    retry: Retry | int | bool | None = None,
    final: bool = False,
    manager: AsyncTransactionManager | None = None,
) -> Any:
    """Run a coroutine function, or asynchronous generator function, inside a transaction: the caller's, or one of its own.

    On a service method the caller's is the one that came with the call.  The arguments are those of `transaction`, and:

    retry: a `Retry`; True for the default one, which tries as long as the timeout allows; or a number, its `attempts`.
        Only a root is run again, as a whole, and only after an error that says that it may help; never a call that joined
        (its root decides), never a generator.
    final: of a service method: no transaction calls this service again after it (see `txrpc.final_call`).

    Raises `UsageError` when it decorates anything else: that is `txrpc.transactional`'s.
    """
    settings = Settings.make(
        propagation, timeout, read_only, wait, rollback_for, no_rollback_for, retry, manager, final, needs, decide_in
    )
    decorate = functools.partial(_decorate, settings)
    return decorate if fn is None else decorate(fn)


def _decorate(settings: Settings, fn: Callable[..., Any]) -> Any:
    refuse_undecoratable(fn, AsyncScope.entry_point, settings.retry)
    return _generator(settings, fn) if is_generator(fn) else _function(settings, fn)


def _function(settings: Settings, fn: Callable[..., Any]) -> Any:
    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        refuse_unjoined(args)
        attempts = Attempts(settings.retry, settings.timeout_s)
        while True:
            scope: AsyncScope[Any] = AsyncScope(settings, attempts.timeout_s())
            try:
                async with scope:
                    return await fn(*args, **kwargs)
            except Exception as error:
                if not (scope.is_root and attempts.may_go_on(error, scope.handle)):
                    raise
            await arun(attempts.rest(settings.client(AsyncScope.entry_point).state.runtime))

    return call


def _generator(settings: Settings, fn: Callable[..., Any]) -> Any:
    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        refuse_unjoined(args)
        scope: AsyncScope[Any] = AsyncScope(settings)
        scope.open()
        generator = fn(*args, **kwargs)
        send, argument = generator.asend, None
        try:
            await scope.admit()
            while True:
                # Current only while the generator's own code runs: in between its consumer does, in the same context.
                with bind(scope.handle, settings.rule, scope.reads_only):
                    try:
                        item = await send(argument)
                    except StopAsyncIteration:
                        break
                try:
                    argument = yield item
                    send = generator.asend
                except GeneratorExit:
                    with bind(scope.handle, settings.rule, scope.reads_only):
                        await generator.aclose()
                    raise
                except BaseException as error:
                    send, argument = generator.athrow, error
        except BaseException as error:
            await scope.close(error)
            raise
        await scope.close(None)

    return call
