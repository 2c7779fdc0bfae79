"""`transaction()` and `@transactional` for synchronous programs."""

# Written by scripts/twins.py from transactional_async.py: change that one.

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from txrpc._client.flow import run
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
from txrpc._client.transaction import RootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._context import bind, restore
from txrpc._protocol.messages import Wait
from txrpc.resource import Resource

if TYPE_CHECKING:
    from txrpc._client.manager import TransactionManager

__all__ = ["Scope", "transaction", "transactional"]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
"""What a block yields: a `Transaction`, or None where the propagation allows for none."""


class Scope(BaseScope, Generic[_T]):
    """A context manager that is used once."""

    entry_point = "txrpc"

    def __enter__(self) -> _T:
        transaction: _T = self.enter()
        if self.settings.needs:
            try:
                self.admit()
            except BaseException as error:
                restore(self._previous)
                self.close(error)
                raise
        return transaction

    def admit(self) -> None:
        """Wait for what the transaction needs."""
        for resource in self.needed():
            with self.handle.use(resource):
                pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        restore(self._previous)
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """End what `open` began."""
        ends, reason = self.verdict(error)
        if not ends:
            return
        if reason is None:
            self.handle.commit(self.settings.wait)
        else:
            self.handle.rollback(reason)


@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: Propagating = ...,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[Resource | str] = ...,
    decide_in: Resource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: TransactionManager | None = ...,
) -> Scope[Transaction]: ...
@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: New,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[Resource | str] = ...,
    decide_in: Resource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: TransactionManager | None = ...,
) -> Scope[RootTransaction]: ...
@overload
def transaction(
    timeout: float | None = ...,
    *,
    propagation: Propagation | str,
    read_only: bool = ...,
    wait: Wait | str | None = ...,
    needs: Iterable[Resource | str] = ...,
    decide_in: Resource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    manager: TransactionManager | None = ...,
) -> Scope[Transaction | None]: ...
def transaction(
    timeout: float | None = None,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    read_only: bool = False,
    wait: Wait | str | None = None,
    needs: Iterable[Resource | str] = (),
    decide_in: Resource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    manager: TransactionManager | None = None,
) -> Scope[Any]:
    """A block of one transaction: ``with txrpc.transaction(timeout=5) as tx: ...``.

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
        others have voted before: see `txrpc.final_call`.  ``""``: the coordinator, where `txrpc.connect` was given a
        resource that decides.
    rollback_for, no_rollback_for: exception types and `grpc.StatusCode` members that do, or do not, roll back.
    manager: instead of the one of the last `txrpc.connect`.

    Leaving the block raises what `RootTransaction.commit` raises.
    """
    return Scope(
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
    needs: Iterable[Resource | str] = ...,
    decide_in: Resource | str | None = ...,
    rollback_for: Kind | Iterable[Kind] = ...,
    no_rollback_for: Kind | Iterable[Kind] = ...,
    retry: Retry | int | bool | None = ...,
    final: bool = ...,
    manager: TransactionManager | None = ...,
) -> Callable[[_F], _F]: ...
def transactional(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    propagation: Propagation | str = Propagation.REQUIRED,
    timeout: float | None = None,
    read_only: bool = False,
    wait: Wait | str | None = None,
    needs: Iterable[Resource | str] = (),
    decide_in: Resource | str | None = None,
    rollback_for: Kind | Iterable[Kind] = (),
    no_rollback_for: Kind | Iterable[Kind] = (),
    retry: Retry | int | bool | None = None,
    final: bool = False,
    manager: TransactionManager | None = None,
) -> Any:
    """Run a function, method or generator function inside a transaction: the caller's, or one of its own.

    On a service method the caller's is the one that came with the call.  The arguments are those of `transaction`, and:

    retry: a `Retry`; True for the default one, which tries as long as the timeout allows; or a number, its `attempts`.
        Only a root is run again, as a whole, and only after an error that says that it may help; never a call that joined
        (its root decides), never a generator.
    final: of a service method: no transaction calls this service again after it (see `txrpc.final_call`).

    Raises `UsageError` when it decorates a coroutine function: that is `txrpc.aio.transactional`'s.
    """
    settings = Settings.make(
        propagation, timeout, read_only, wait, rollback_for, no_rollback_for, retry, manager, final, needs, decide_in
    )
    decorate = functools.partial(_decorate, settings)
    return decorate if fn is None else decorate(fn)


def _decorate(settings: Settings, fn: Callable[..., Any]) -> Any:
    refuse_undecoratable(fn, Scope.entry_point, settings.retry)
    return _generator(settings, fn) if is_generator(fn) else _function(settings, fn)


def _function(settings: Settings, fn: Callable[..., Any]) -> Any:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse_unjoined(args)
        attempts = Attempts(settings.retry, settings.timeout_s)
        while True:
            scope: Scope[Any] = Scope(settings, attempts.timeout_s())
            try:
                with scope:
                    return fn(*args, **kwargs)
            except Exception as error:
                if not (scope.is_root and attempts.may_go_on(error, scope.handle)):
                    raise
            run(attempts.rest(settings.client(Scope.entry_point).state.runtime))

    return call


def _generator(settings: Settings, fn: Callable[..., Any]) -> Any:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        refuse_unjoined(args)
        scope: Scope[Any] = Scope(settings)
        scope.open()
        generator = fn(*args, **kwargs)
        send, argument = generator.send, None
        try:
            scope.admit()
            while True:
                # Current only while the generator's own code runs: in between its consumer does, in the same context.
                with bind(scope.handle, settings.rule, scope.reads_only):
                    try:
                        item = send(argument)
                    except StopIteration as stop:
                        result = stop.value
                        break
                try:
                    argument = yield item
                    send = generator.send
                except GeneratorExit:
                    with bind(scope.handle, settings.rule, scope.reads_only):
                        generator.close()
                    raise
                except BaseException as error:
                    send, argument = generator.throw, error
        except BaseException as error:
            scope.close(error)
            raise
        scope.close(None)
        return result

    return call
