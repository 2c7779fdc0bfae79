"""The manager of a synchronous program: a thread for the clock, a few for what coordinators ask of databases."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

from txrpc._client import effects, registers
from txrpc._client.branch_operation import broke, operate
from txrpc._client.coordinators import Outbox, find, unavailable
from txrpc._client.core import ClientCore, check_timeout
from txrpc._client.flow import run
from txrpc._client.locks import BranchLock
from txrpc._client.rollback_rules import RollbackRules
from txrpc._client.scope import set_default_client
from txrpc._client.state import ClientState, OpenBranch
from txrpc._client.transaction import JoinedTransaction, RootTransaction
from txrpc._protocol.messages import Outcome, Owner, TransactionContext
from txrpc._protocol.participant.branch import Do, Operation
from txrpc.errors import CoordinatorUnavailable
from txrpc.resource import Resource

__all__ = ["Client"]

logger = logging.getLogger("txrpc.client")

_LONGEST_SLEEP_S = 60.0
_FINISHERS = 4
_CLOSING_S = 0.02


class SessionPort(Outbox, Protocol):
    """What a client needs of its session.  See `txrpc._grpc.session`."""

    def start(self) -> None:
        """Begin to connect."""

    def drain(self) -> None:
        """Let a coordinator in this process finish what it is deciding; one elsewhere goes on by itself."""

    def close(self) -> None:
        """Close it for good."""

    def wait_answered(self, timeout_s: float) -> None:
        """Wait until the first attempt to connect has ended in one way or the other."""


class Client:
    """A synchronous process's side of txrpc: what a `TransactionManager` has.  Safe to use from any thread."""

    def __init__(
        self,
        group: str,
        resources: Iterable[Resource],
        process: str = "",
        commit_timeout: float = 10.0,
        decide_in: Resource | str | None = None,
        workers: int = 16,
    ) -> None:
        check_timeout(commit_timeout, "commit_timeout")
        self.state = ClientState.make(group, resources, process, runtime=self)
        self.state.commit_timeout_ms = int(commit_timeout * 1000)
        self.state.decide_in = registers.default_of(self.state, decide_in)
        self.core = ClientCore(self.state)
        # One resource never waits for another, and finishing never behind the PREPAREs that wait for what it would free.
        self._workers = {name: ThreadPoolExecutor(workers, f"txrpc-{name}") for name in self.state.resources}
        self._finishers = {
            name: ThreadPoolExecutor(_FINISHERS, f"txrpc-finish-{name}") for name in self.state.resources
        }
        # An operation that hangs must not keep the one that breaks it off waiting.
        self._breakers = ThreadPoolExecutor(2, thread_name_prefix="txrpc-breaker")
        self._clock = threading.Condition(self.state.lock)
        self._sleeps_until_ms = 0
        self._connected = threading.Condition(self.state.lock)
        self._sessions: tuple[SessionPort, ...] = ()
        self._closed = False
        self._clock_thread = threading.Thread(target=self._run_clock, name="txrpc-clock", daemon=True)

    # ------------------------------------------------------------------------------------------------------ life

    def start(self, *sessions: SessionPort) -> None:
        """Check the resources and open the sessions, one for each coordinator, in the order of preference.

        A database that is out of reach is tried again in the background; raises what `Resource.start` raises otherwise.
        """
        # Daemon threads, which the end of the program does not wait for: a database that does not answer must not keep it.
        starts = [
            threading.Thread(target=self._start_resource, args=(name,), daemon=True) for name in self.state.resources
        ]
        for thread in starts:
            thread.start()
        until_s = time.monotonic() + self.state.start_patience_s
        for thread in starts:
            thread.join(max(0.0, until_s - time.monotonic()))
        with self.state.lock:
            self.state.starting.check()
        self.state.sessions = self._sessions = sessions
        self._clock_thread.start()
        for session in sessions:
            session.start()

    def connect(self, *sessions: SessionPort, patience_s: float, in_background: bool = False) -> None:
        """`start`, wait for a session, and be the program's client; if that fails, `close`.

        *in_background*: a coordinator that is not there is no failure, connecting goes on.
        """
        try:
            self.start(*sessions)
            self.wait_connected(patience_s)
        except BaseException as error:
            if in_background and isinstance(error, CoordinatorUnavailable):
                logger.warning("%s; connecting goes on in the background", error)
            else:
                self.close()
                raise
        set_default_client("txrpc", self, on=True)

    def close(self, grace_s: float = 5.0) -> None:
        """End the session and let go of the resources.

        Roll-backs and commits under way get *grace_s* seconds; what stays prepared is finished by the process that connects next.
        """
        with self.state.lock:
            if self._closed:
                return
            self._closed = True
            self._clock.notify_all()
        set_default_client("txrpc", self, on=False)
        until_s = time.monotonic() + grace_s
        while self.state.committing and time.monotonic() < until_s:
            time.sleep(_CLOSING_S)  # their branches are prepared, perhaps, and nothing else would end them
        for session in self._sessions:
            session.drain()
        with self.state.lock:
            registers.mark(self.state)
        pools = (*self._workers.values(), *self._finishers.values())
        for pool in pools:
            pool.shutdown(wait=False)
        for pool in pools:
            for thread in list(pool._threads):
                thread.join(max(0.0, until_s - time.monotonic()))
        for session in self._sessions:
            session.close()
        self.sessions_changed()
        self._breakers.shutdown(wait=False, cancel_futures=True)
        for resource in self.state.resources.values():
            resource.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- transactions

    def new_root(
        self, timeout: float | None, read_only: bool, rule: RollbackRules, decide_in: Resource | str | None = None
    ) -> RootTransaction:
        """A transaction that is not current anywhere."""
        return RootTransaction(self.state, self.core.begin_part(timeout, read_only, decide_in), rule)

    def join(self, context: TransactionContext) -> JoinedTransaction:
        """A handle for one incoming call.  See `txrpc._grpc.ports.Joiner`."""
        return JoinedTransaction(self.state, self.core.join_part(context), context)

    # ------------------------------------------------------------------------------------------ what the flows wait for

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """The result of *future*; raises `TimeoutError`."""
        return future.result(timeout_s)

    def ask(self, resource: Resource, token: str) -> Future[Outcome | None]:
        """See `Runtime`."""
        return self._finishers[resource.name].submit(resource.one_phase_result, token)

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def sessions_changed(self) -> None:
        """See `Runtime`."""
        with self._connected:
            self._connected.notify_all()

    def reconnect(self, node: str, timeout_s: float) -> Owner:
        """See `Runtime`."""
        self.core.check_fork()
        until_s = time.monotonic() + timeout_s
        with self._connected:
            while (owner := find(self.state, node)) is None:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise unavailable(self.state, node)
                self._connected.wait(left_s)
            return owner

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until a session is open and every coordinator has answered or failed once; raises what `reconnect` raises."""
        until_s = time.monotonic() + timeout_s
        self.reconnect("", timeout_s)
        for session in self._sessions:
            session.wait_answered(max(0.0, until_s - time.monotonic()))

    # -------------------------------------------------------------------------------------------------- what blocks or awaits

    def operate(self, do: Do, branch: OpenBranch | None) -> None:
        pools = self._finishers if do.operation in effects.FINISHING else self._workers
        pool = self._breakers if do.operation is Operation.INTERRUPT else pools[do.gid.resource]
        self._submit(pool, self._operate, do, branch)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: Any) -> None:
        """Once the manager is closing, what stays undone is for the process that connects next.

        When the system has no thread left, the work waits in the pool's queue, which comes before its threads, for one that is
        free or can be started later: a deadline that is kept late is better than a clock that has died.
        """
        try:
            pool.submit(work, *arguments)
        except RuntimeError as error:
            if not self._closed:
                logger.error("no thread for a worker: the work waits", extra={"reason": str(error)})

    def operate_here(self, do: Do, branch: OpenBranch | None) -> None:
        """See `Runtime`.  A resource that would wait for its database does so in a worker, which outlasts the root's deadline."""
        asks_later = hasattr(self.state.resources[do.gid.resource], "how_it_ended")
        if do.operation is Operation.PREPARE or (branch is not None and asks_later):
            self._operate(do, branch)
        else:
            self.operate(do, branch)

    def _operate(self, do: Do, branch: OpenBranch | None) -> None:
        resource = self.state.resources[do.gid.resource]
        try:
            committing = functools.partial(effects.committing, self.state, do)
            effects.operated(self.state, do, run(operate(do, resource, branch, committing)))
        except BaseException as error:
            effects.operated(self.state, do, run(broke(do, resource, branch, error)))
            if not isinstance(error, Exception):
                raise  # Ctrl-C in the root's own thread

    def aside(
        self, name: str, verb: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[Any], None]
    ) -> None:
        self._submit(self._finishers[name], self._aside, verb, arguments, then)

    def _aside(self, verb: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        found: Any
        try:
            found = verb(*arguments)
        except Exception as error:
            found = error
        then(found)

    def future(self) -> Future[Any]:
        return Future()

    def settle(self, future: Future[Any], result: object) -> None:
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    def branch_lock(self) -> BranchLock:
        return BranchLock()

    def wake(self) -> None:
        next_ms = self.core.next_wakeup_ms()
        if next_ms is not None and next_ms < self._sleeps_until_ms:
            self._clock.notify_all()

    def _run_clock(self) -> None:
        while True:
            try:
                for name in self.core.woke():
                    self._submit(self._finishers[name], self._look_after, name)
            except Exception as error:  # one mistake must not end all deadlines of the process
                logger.error("deadline or sweep failed", exc_info=error)
            with self._clock:
                if self._closed:
                    return
                now_ms, next_ms = self.state.now_ms(), self.core.next_wakeup_ms()
                limit_ms = now_ms + int(_LONGEST_SLEEP_S * 1000)
                self._sleeps_until_ms = limit_ms if next_ms is None else min(next_ms, limit_ms)
                if self._sleeps_until_ms > now_ms:
                    self._clock.wait((self._sleeps_until_ms - now_ms) / 1000)
                self._sleeps_until_ms = 0

    def _look_after(self, name: str) -> None:
        if self.state.starting.trouble(name):
            self._start_resource(name)
        else:
            sweep = self.state.resources[name].in_doubt
            self._aside(sweep, (self.state.group,), functools.partial(self.core.swept, name, self.state.now_ms()))

    def _start_resource(self, name: str) -> None:
        try:
            self.core.started(name, self.state.resources[name].start())
        except Exception as error:
            self.core.started(name, error)
