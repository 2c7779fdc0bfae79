"""The other side of `txrpc._grpc.ports`: transactions that only write down what the interceptors tell them."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from txrpc._protocol.messages import BranchRef, CallReport, Owner, TransactionContext
from txrpc.errors import Reason, TxrpcError, aborted
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid

OWNER = Owner("node-1", Epoch.make(3, 7))
PARTICIPANT = ParticipantId(b"procproc")

_branches = itertools.count(1)


def until(done: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not (result := done()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
    return result


class Out:
    """One outgoing call.  `end` is what the first word about its end was."""

    def __init__(self, context: TransactionContext, time_left_s: float) -> None:
        self.context = context
        self.time_left_s = time_left_s
        self.bounded = True
        self.poll: Callable[[], Any] | None = None
        self.end: str | None = None
        self.report: CallReport | None = None
        self.failure: Reason | None = None
        self.kinds: tuple[object, ...] = ()

    def replied(self, report: CallReport | None, failure: Reason | None = None, kinds: tuple[object, ...] = ()) -> None:
        if self.end is None:
            self.end, self.report, self.failure, self.kinds = "replied", report, failure, kinds

    def lost(self, reason: Reason) -> None:
        if self.end is None:
            self.end, self.failure = "lost", reason

    def error(self, reason: Reason) -> TxrpcError:
        return aborted(self.context.xid, reason)

    def settle_with(self, poll: Callable[[], Any], cancel: Callable[[], Any]) -> None:
        self.poll = poll

    @property
    def ended(self) -> bool:
        """Whether anybody has said how it ended."""
        return self.end is not None

    @property
    def branches(self) -> set[str]:
        """The resources whose branches the reply brought home."""
        return {ref.resource for ref in self.report.branches} if self.report else set()


class Handle:
    """A transaction: a root, or a joined call; synchronous."""

    def __init__(self, xid: Xid | None = None, time_left_s: float = 30.0) -> None:
        self.xid = xid or Xid.make(int(time.time() * 1000), bytes(10))
        self.time_left_s = time_left_s
        self.joined = False
        self.doom: Reason | None = None
        self.refuses: TxrpcError | None = None
        self.calls: list[Out] = []
        self.errors: list[BaseException] = []
        self.lefts = 0
        self.own: list[BranchRef] = []
        self._lock = threading.Lock()

    def use(self, resource: str) -> None:
        """Stand-in for work in a database."""
        with self._lock:
            self.own.append(BranchRef(BranchId(next(_branches).to_bytes(8, "big")), resource, PARTICIPANT, 1))

    def outgoing(self) -> Out:
        if self.refuses is not None:
            raise self.refuses
        left_ms = int(self.time_left_s * 1000)
        call = Out(TransactionContext("shop", self.xid, OWNER, left_ms, read_only=True), self.time_left_s)
        with self._lock:
            self.calls.append(call)
        return call

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)

    def settle(self) -> None:
        for call in self.calls:
            if call.end is None and call.poll is not None:
                call.poll()

    def leave(self) -> Any:
        self.settle()
        return self.report()

    def report(self) -> CallReport:
        self.lefts += 1
        below = [ref for call in self.calls if call.report for ref in call.report.branches]
        return CallReport((*self.own, *below), self.doom)

    @property
    def call(self) -> Out:
        """The only call that there was."""
        (only,) = self.calls
        return only


class AsyncHandle(Handle):
    """The same for asyncio; `leave` takes a moment, so that what must be awaited has to be."""

    async def asettle(self) -> None:
        for call in self.calls:
            if call.end is None and call.poll is not None:
                found = call.poll()
                if inspect.isawaitable(found):
                    await found

    async def leave(self) -> CallReport:
        await asyncio.sleep(0)
        await self.asettle()
        return self.report()


class Recorder:
    """A service's side: remembers who joined."""

    def __init__(self, kind: type[Handle] = Handle) -> None:
        self.contexts: list[TransactionContext] = []
        self.handles: list[Handle] = []
        self.refuses: TxrpcError | None = None
        self.doom: Reason | None = None
        self.threads: list[int] = []
        self._kind = kind

    def join(self, context: TransactionContext) -> Any:
        self.contexts.append(context)
        self.threads.append(threading.get_ident())
        if self.refuses is not None:
            raise self.refuses
        handle = self._kind(context.xid, context.time_left_ms / 1000)
        handle.doom = self.doom
        self.handles.append(handle)
        return handle

    @property
    def handle(self) -> Handle:
        """The only one that joined."""
        (only,) = self.handles
        return only
