"""`transaction()` and `@transactional` for asyncio programs; `transactional` has the words."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from txrpc._client.rollback_rules import Kind
from txrpc._client.scope import (
    BaseScope,
    Propagating,
    Propagation,
    Retry,
    Settings,
    refuse_undecoratable,
    refuse_unjoined,
)
from txrpc._client.transaction import Transaction
from txrpc._context import bind, restore
from txrpc._protocol.messages import Wait
from txrpc.errors import UsageError

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
        return transaction

    async def __aexit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
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
    wait: Wait | str = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: AsyncTransactionManager | None = ...,
) -> AsyncScope[Transaction]: ...
@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: Propagation | str,
    read_only: bool = ...,
    wait: Wait | str = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: AsyncTransactionManager | None = ...,
) -> AsyncScope[Transaction | None]: ...
def transaction(
    timeout: float | None = None,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    read_only: bool = False,
    wait: Wait | str = Wait.ACKNOWLEDGED,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    manager: AsyncTransactionManager | None = None,
) -> AsyncScope[Any]:
    """A block of one transaction: ``async with txrpc.aio.transaction(timeout=5) as tx: ...``.  See `txrpc.transaction`."""
    return AsyncScope(
        Settings.make(propagation, timeout, read_only, wait, rollback_for, no_rollback_for, None, manager)
    )


@overload
def transactional(fn: _F, /) -> _F: ...
@overload
def transactional(
    *,
    propagation: Propagation | str = ...,
    timeout: float | None = ...,
    read_only: bool = ...,
    wait: Wait | str = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    retry: Retry | int | None = ...,
    manager: AsyncTransactionManager | None = ...,
) -> Callable[[_F], _F]: ...
def transactional(
    fn: Any = None,
    /,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    timeout: float | None = None,
    read_only: bool = False,
    wait: Wait | str = Wait.ACKNOWLEDGED,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    retry: Retry | int | None = None,
    manager: AsyncTransactionManager | None = None,
) -> Any:
    """Run a coroutine function, or asynchronous generator function, inside a transaction.  See `txrpc.transactional`.

    Raises `UsageError` when it decorates anything else: that is `txrpc.transactional`'s.
    """
    settings = Settings.make(propagation, timeout, read_only, wait, rollback_for, no_rollback_for, retry, manager)
    decorate = functools.partial(_decorate, settings)
    return decorate if fn is None else decorate(fn)


def _decorate(settings: Settings, fn: Any) -> Any:
    refuse_undecoratable(fn)
    if inspect.isasyncgenfunction(fn):
        if settings.retry is not None:
            raise UsageError(
                f"{fn.__qualname__} is a generator: what it has yielded cannot be taken back, so no retry="
            )
        return _generator(settings, fn)
    if inspect.iscoroutinefunction(fn):
        return _function(settings, fn)
    raise UsageError(f"{getattr(fn, '__qualname__', fn)} is not asynchronous: decorate it with txrpc.transactional")


def _function(settings: Settings, fn: Any) -> Any:
    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        refuse_unjoined(args)
        attempt = 1
        while True:
            scope: AsyncScope[Any] = AsyncScope(settings)
            try:
                async with scope:
                    return await fn(*args, **kwargs)
            except Exception as error:
                pause_s = settings.again_in_s(attempt, error, scope.handle) if scope.is_root else None
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)
            attempt += 1

    return call


def _generator(settings: Settings, fn: Any) -> Any:
    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        refuse_unjoined(args)
        scope: AsyncScope[Any] = AsyncScope(settings)
        scope.open()
        generator = fn(*args, **kwargs)
        send, argument = generator.asend, None
        try:
            while True:
                # Current only while the generator's own code runs: in between its consumer does, in the same context.
                with bind(scope.handle, settings.rule):
                    try:
                        item = await send(argument)
                    except StopAsyncIteration:
                        break
                try:
                    argument = yield item
                    send = generator.asend
                except GeneratorExit:
                    with bind(scope.handle, settings.rule):
                        await generator.aclose()
                    raise
                except BaseException as error:
                    send, argument = generator.athrow, error
        except BaseException as error:
            await scope.close(error)
            raise
        await scope.close(None)

    return call
