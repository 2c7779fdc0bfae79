"""The manager of an asyncio program: tasks on the program's own event loop, and no thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, Self

from txrpc._client import effects, registers
from txrpc._client.branch_operation import broke, operate
from txrpc._client.coordinators import Outbox, find, unavailable
from txrpc._client.core import ClientCore, check_timeout
from txrpc._client.flow import arun
from txrpc._client.locks import AsyncBranchLock
from txrpc._client.rollback_rules import RollbackRules
from txrpc._client.scope import set_default_client
from txrpc._client.state import ClientState, OpenBranch
from txrpc._client.transaction_async import AsyncJoinedTransaction, AsyncRootTransaction
from txrpc._context import set_current
from txrpc._protocol.messages import Outcome, Owner, TransactionContext
from txrpc._protocol.participant.branch import Do, Operation
from txrpc.errors import CoordinatorUnavailable
from txrpc.resource import AsyncResource

__all__ = ["AsyncClient"]

logger = logging.getLogger("txrpc.client")

_FINISHERS = 4
_CLOSING_S = 0.02


class AsyncSessionPort(Outbox, Protocol):
    """What a client needs of its session.  See `txrpc._grpc.session_async`."""

    async def start(self) -> None:
        """Begin to connect."""

    async def drain(self) -> None:
        """Let a coordinator in this process finish what it is deciding; one elsewhere goes on by itself."""

    async def close(self) -> None:
        """Close it for good."""

    async def wait_answered(self, timeout_s: float) -> None:
        """Wait until the first attempt to connect has ended in one way or the other."""


class AsyncClient:
    """An asyncio process's side of txrpc: what an `AsyncTransactionManager` has.  Belongs to the loop that it was started on."""

    def __init__(
        self,
        group: str,
        resources: Iterable[AsyncResource],
        process: str = "",
        commit_timeout: float = 10.0,
        decide_in: AsyncResource | str | None = None,
        workers: int = 16,
    ) -> None:
        check_timeout(commit_timeout, "commit_timeout")
        self.state = ClientState.make(group, resources, process, runtime=self)
        self.state.commit_timeout_ms = int(commit_timeout * 1000)
        self.state.decide_in = registers.default_of(self.state, decide_in)
        self.core = ClientCore(self.state)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # See `Client`: per resource, and for finishing apart.
        self._workers = {name: asyncio.Semaphore(workers) for name in self.state.resources}
        self._finishers = {name: asyncio.Semaphore(_FINISHERS) for name in self.state.resources}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._connected = asyncio.Event()
        self._sessions: tuple[AsyncSessionPort, ...] = ()
        self._closed = False

    # ------------------------------------------------------------------------------------------------------ life

    async def start(self, *sessions: AsyncSessionPort) -> None:
        """Check the resources and open the sessions.  See `Client.start`."""
        self._loop = asyncio.get_running_loop()
        for name in self.state.resources:
            self._spawn(self._start_resource(name))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.state.start_patience_s)
        self.state.starting.check()
        self.state.sessions = self._sessions = sessions
        for session in sessions:
            await session.start()

    async def connect(self, *sessions: AsyncSessionPort, patience_s: float, in_background: bool = False) -> None:
        """`start`, wait for a session, and be the program's client; if that fails, `close`.

        *in_background*: a coordinator that is not there is no failure, connecting goes on.
        """
        try:
            await self.start(*sessions)
            await self.wait_connected(patience_s)
        except BaseException as error:
            if in_background and isinstance(error, CoordinatorUnavailable):
                logger.warning("%s; connecting goes on in the background", error)
            else:
                await self.close()
                raise
        set_default_client("txrpc.aio", self, on=True)

    async def close(self, grace_s: float = 5.0) -> None:
        """End the session and let go of the resources.

        Roll-backs and commits under way get *grace_s* seconds; what stays prepared is finished by the process that connects next.
        """
        if self._closed:
            return
        self._closed = True
        set_default_client("txrpc.aio", self, on=False)
        until_s = time.monotonic() + grace_s
        while self.state.committing and time.monotonic() < until_s:
            await asyncio.sleep(_CLOSING_S)  # their branches are prepared, perhaps, and nothing else would end them
        for session in self._sessions:
            await session.drain()
        registers.mark(self.state)
        if self._timer is not None:
            self._timer.cancel()
        if self._tasks:
            _done, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
        for session in self._sessions:
            await session.close()
        self.sessions_changed()
        for resource in self.state.resources.values():
            await resource.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---------------------------------------------------------------------------------------------------- transactions

    def new_root(
        self, timeout: float | None, read_only: bool, rule: RollbackRules, decide_in: AsyncResource | str | None = None
    ) -> AsyncRootTransaction:
        """A transaction that is not current anywhere."""
        return AsyncRootTransaction(self.state, self.core.begin_part(timeout, read_only, decide_in), rule)

    def join(self, context: TransactionContext) -> AsyncJoinedTransaction:
        """A handle for one incoming call.  See `txrpc._grpc.ports.Joiner`."""
        return AsyncJoinedTransaction(self.state, self.core.join_part(context), context)

    # ------------------------------------------------------------------------------------------ what the flows wait for

    async def wait(self, future: asyncio.Future[Any], timeout_s: float) -> Any:
        """The result of *future*; raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            return await future

    def ask(self, resource: AsyncResource, token: str) -> asyncio.Future[Outcome | None]:
        """See `Runtime`."""
        return asyncio.ensure_future(resource.one_phase_result(token))

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    def sessions_changed(self) -> None:
        """See `Runtime`."""
        self._connected.set()
        self._connected = asyncio.Event()

    async def reconnect(self, node: str, timeout_s: float) -> Owner:
        """See `Runtime`."""
        self.core.check_fork()
        if (owner := find(self.state, node)) is not None:
            return owner  # nearly always: no timer is needed
        try:
            async with asyncio.timeout(timeout_s):
                while (owner := find(self.state, node)) is None:
                    await self._connected.wait()
                return owner
        except TimeoutError:
            raise unavailable(self.state, node) from None

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait until a session is open and every coordinator has answered or failed once; raises what `reconnect` raises."""
        until_s = asyncio.get_running_loop().time() + timeout_s
        await self.reconnect("", timeout_s)
        for session in self._sessions:
            await session.wait_answered(max(0.0, until_s - asyncio.get_running_loop().time()))

    # -------------------------------------------------------------------------------------------------- what blocks or awaits

    def operate(self, do: Do, branch: OpenBranch | None) -> None:
        self._spawn(self._operate(do, branch))

    operate_here = operate  # in a task of its own: a COMMIT under way must not be cancelled with the root's

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if self._loop is None or self._loop.is_closed():
            coroutine.close()
            return
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _operate(self, do: Do, branch: OpenBranch | None) -> None:
        set_current(None)  # the task has copied the slot of the code that caused it
        resource = self.state.resources[do.gid.resource]
        try:

            async def committing(token: str) -> None:
                effects.committing(self.state, do, token)

            async with self._turn(do):
                result = await arun(operate(do, resource, branch, committing))
            effects.operated(self.state, do, result)
        except Exception as error:
            effects.operated(self.state, do, await arun(broke(do, resource, branch, error)))

    def _turn(self, do: Do) -> AbstractAsyncContextManager[Any]:
        if do.operation is Operation.INTERRUPT:
            return contextlib.nullcontext()
        pools = self._finishers if do.operation in effects.FINISHING else self._workers
        return pools[do.gid.resource]

    def aside(
        self, name: str, verb: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[Any], None]
    ) -> None:
        self._spawn(self._aside(name, verb, arguments, then))

    async def _aside(
        self, name: str, verb: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[Any], None]
    ) -> None:
        found: Any
        try:
            async with self._finishers[name]:
                found = await verb(*arguments)
        except Exception as error:
            found = error
        then(found)

    def future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def settle(self, future: asyncio.Future[Any], result: object) -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
            future.exception()  # the waiter may be gone, which is no news
        else:
            future.set_result(result)

    def branch_lock(self) -> AsyncBranchLock:
        return AsyncBranchLock()

    def wake(self) -> None:
        next_ms = self.core.next_wakeup_ms()
        if next_ms is None or self._closed or self._loop is None:
            return
        if self._timer is None or next_ms < self._timer_ms:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_ms = next_ms
            self._timer = self._loop.call_later(max(0, next_ms - self.state.now_ms()) / 1000, self._tick_tock)

    def _tick_tock(self) -> None:
        self._timer = None
        for name in self.core.woke():
            self._spawn(self._look_after(name))
        self.wake()

    async def _look_after(self, name: str) -> None:
        if self.state.starting.trouble(name):
            await self._start_resource(name)
        else:
            then = functools.partial(self.core.swept, name, self.state.now_ms())
            await self._aside(name, self.state.resources[name].in_doubt, (self.state.group,), then)

    async def _start_resource(self, name: str) -> None:
        try:
            self.core.started(name, await self.state.resources[name].start())
        except Exception as error:
            self.core.started(name, error)
