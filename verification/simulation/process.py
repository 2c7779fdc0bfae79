"""A process of an application: the real `ClientCore`, flows and parts, on simulated sessions, calls and databases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from txrpc._client import using
from txrpc._client.asking import reason_for
from txrpc._client.branch_operation import operate
from txrpc._client.core import ClientCore
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.rollback_rules import ALWAYS
from txrpc._client.transaction import JoinedTransactionBase
from txrpc._client.using import OpenBranch
from txrpc._protocol.messages import (
    AboutEnd,
    CallReport,
    CommitRequest,
    GoAway,
    Outcome,
    OutcomeRequest,
    RollbackRequest,
    TransactionContext,
    Voted,
    Welcome,
)
from txrpc._protocol.participant.branch import Do, Operation
from txrpc.errors import AbortCode, CoordinatorUnavailable, Reason, TxrpcError
from txrpc.ids import Xid
from verification.simulation.database import Database, Refused, SimResource
from verification.simulation.history import History
from verification.simulation.network import Network, Stream
from verification.simulation.options import NODE
from verification.simulation.scheduler import Node, Promise, Scheduler, Task

__all__ = ["GROUP", "Call", "Process", "Reply", "result_of"]

GROUP = "sim"
logging.getLogger("txrpc.client").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Call:
    """A business call: what it does, and the further calls that it makes."""

    name: str
    target: str
    resource: str
    writes: bool
    then: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """How a call ended at its service."""

    report: CallReport | None
    failure: Reason | None = None


class _Turn:
    """Whose turn it is on a branch: one flow after another."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._taken = False
        self._queue: list[Promise] = []

    def acquire(self, timeout_s: float) -> Any:
        if not self._taken:
            self._taken = True
            return True
        promise = Promise()
        self._queue.append(promise)
        self._node.alarm(int(timeout_s * 1000), promise.keep, False)
        return promise

    def release(self) -> None:
        self._taken = False
        while self._queue and not self._taken:
            promise = self._queue.pop(0)
            if not promise.done:
                self._taken = True
                promise.keep(True)


class SimManager(ClientCore):
    """The manager of one incarnation: everything real but threads, sockets and time."""

    def __init__(self, process: Process, resources: list[SimResource]) -> None:
        self._process = process
        dice = process.scheduler.dice
        self.entropy = dice.randbytes
        self.jitter = dice.random
        self._woken_at: int | None = None
        self._connected: list[Promise] = []
        super().__init__(GROUP, resources, process.name)
        self._session = process  # type: ignore[assignment]
        for name in self.resources:
            self._look_after(name)

    # -------------------------------------------------------------------------------------------------- what blocks or awaits

    def now_ms(self) -> int:
        return self._process.clock_ms()

    def unix_ms(self) -> int:
        return self._process.unix_ms()

    def _start(self, do: Do, slot: OpenBranch | None) -> None:
        resource = self.resources[do.gid.resource]
        work = slot.work if slot is not None else None
        if do.operation is Operation.INTERRUPT:
            resource.interrupt(work)
            return
        self._process.soon(self._operate, do, resource, work)

    def _operate(self, do: Do, resource: SimResource, work: Any) -> None:
        task = Task(self._process, operate(do, resource, work, lambda token: self._committing(do, token)))
        task.end.then(lambda end: self._operated(do, result_of(end)))

    def _wake(self) -> None:
        due_ms = self.next_wakeup_ms()
        if due_ms is not None and (self._woken_at is None or due_ms < self._woken_at):
            self._woken_at = due_ms
            self._process.alarm(due_ms - self.now_ms(), self._tick_tock, due_ms)

    def _tick_tock(self, due_ms: int) -> None:
        if self._woken_at != due_ms:
            return
        self._woken_at = None
        for name in self.woke():
            self._look_after(name)
        self._wake()

    def _look_after(self, name: str) -> None:
        """The session is opened meanwhile: a resource may come up before it, or after."""
        resource: SimResource = self.resources[name]
        starts = bool(self._starting.trouble(name))
        promise, told = (resource.start(), self.started) if starts else (resource.in_doubt(self.group), self.swept)
        promise.then(lambda kept: self._process.soon(told, name, kept.error or kept.value))

    def _future(self) -> Promise:
        return Promise()

    def _settle(self, future: Promise, result: Any) -> None:
        if isinstance(result, BaseException):
            future.break_(result)
        else:
            future.keep(result)

    def _turn(self) -> _Turn:
        return _Turn(self._process)

    # ------------------------------------------------------------------------------------------ what the flows wait for

    def wait(self, future: Promise, timeout_s: float) -> Promise:
        promise = Promise()
        future.then(lambda kept: promise.break_(kept.error) if kept.error else promise.keep(kept.value))
        self._process.alarm(int(timeout_s * 1000), promise.break_, TimeoutError())
        return promise

    def ask(self, resource: SimResource, token: str) -> Promise:
        return resource.one_phase_result(token)

    def pause(self, seconds: float) -> Promise:
        promise = Promise()
        self._process.alarm(max(1, int(seconds * 1000)), promise.keep, None)
        return promise

    def reconnect(self, timeout_s: float) -> Any:
        if self.welcome is not None:
            return self.welcome.owner
        promise = Promise()
        self._connected.append(promise)
        error = CoordinatorUnavailable("no session")
        self._process.alarm(int(timeout_s * 1000), promise.break_, error)
        return promise

    def on_welcome(self, welcome: Welcome) -> None:
        super().on_welcome(welcome)
        waiting, self._connected = self._connected, []
        for promise in waiting:
            promise.keep(welcome.owner)


def result_of(end: Promise) -> Any:
    """What a task returned; raises what it raised."""
    if end.error is not None:
        raise end.error
    return end.value


class Process(Node):
    """One process under one address; every restart is a new incarnation with a new manager."""

    def __init__(
        self, scheduler: Scheduler, name: str, network: Network, history: History, databases: dict[str, Database]
    ) -> None:
        super().__init__(scheduler, name)
        self.network = network
        self.history = history
        self._databases = databases
        self.dial: Callable[[Process], Stream | None] = lambda _: None
        """Open a stream to whoever is the coordinator now."""
        self.peers: dict[str, Process] = {}
        self.wall_offset_ms = 1_700_000_000_000
        self.misnamed: dict[str, Database] = {}
        """Databases that this process reaches under a name that is another's: a mistake in its configuration."""
        self.requests: list[AboutEnd] = []
        """All that its roots have ever asked."""
        self.manager: SimManager
        self._stream: Stream | None = None
        self._resources: list[SimResource] = []
        self.start()

    def unix_ms(self) -> int:
        """This machine's own idea of the time."""
        return self.clock_ms() + self.wall_offset_ms

    # -------------------------------------------------------------------------------------------------- life and death

    def start(self) -> None:
        """A new incarnation."""
        self.up = True
        self.history.line(self.name, self.name, lambda: "starts")
        self._stream = None
        databases = self._databases | self.misnamed
        self._resources = [SimResource(name, database, self) for name, database in databases.items()]
        self.manager = SimManager(self, self._resources)
        self.soon(self._connect)

    def crash(self) -> None:
        """Die, and everything with it."""
        if not self.up:
            return
        self.die()
        if self._stream is not None:
            self._stream.close(self.name)
        for resource in self._resources:
            resource.abandon()

    # ------------------------------------------------------------------------------------------------------ the session

    def _connect(self) -> None:
        stream = self.dial(self)
        if stream is None:
            self.alarm(self.scheduler.dice.randint(50, 1_000), self._connect)
            return
        self._stream = stream
        stream.on_message[self.name] = self._heard
        stream.on_end[self.name] = self._lost
        stream.send(self.name, self.manager.hello())
        self.alarm(3_000, self._give_up, stream)

    def _give_up(self, stream: Stream) -> None:
        """No Welcome has come."""
        if self._stream is stream and self.manager.welcome is None:
            stream.close(self.name)
            self._lost()

    def _heard(self, message: Any) -> None:
        first = self.manager.welcome is None
        if isinstance(message, GoAway) or isinstance(message, Welcome) != first:
            assert self._stream is not None
            self._stream.close(self.name)
            self._lost()
        elif first:
            self.manager.on_welcome(message)
        else:
            self.manager.on_message(NODE, message)

    def _lost(self) -> None:
        self._stream = None
        self.manager.on_lost("the stream ended")
        self.alarm(self.scheduler.dice.randint(10, 1_000), self._connect)

    def send(self, node: str, *messages: Any) -> None:
        """See `SessionPort`."""
        assert node == NODE, f"{messages} are for {node}"
        for message in messages:
            self.say(message)
            if isinstance(message, CommitRequest | RollbackRequest | OutcomeRequest):
                self.requests.append(message)
            if isinstance(message, Voted):
                self.history.note("voted", message.xid, message.branch, message.vote)

    def say(self, message: Any) -> None:
        """Send anything at all, true or not."""
        if self._stream is None:
            raise CoordinatorUnavailable("no session")
        self._stream.send(self.name, message)

    # ------------------------------------------------------------------------------------------------------------ calls

    def call(self, part: LocalTransaction, call: Call) -> Flow[None]:
        """Make one business call in *part*, as the client interceptor does."""
        manager = self.manager
        part.check_usable(manager.now_ms())
        if part.owner is None:
            raise CoordinatorUnavailable("it began with no coordinator in reach")
        out = part.call_begins(ALWAYS, part.owner, manager.now_ms())
        reply: Reply | None = yield self._round_trip, (out.context, call)
        if reply is None:
            reason = Reason(AbortCode.CALL_END_UNKNOWN, f"{call.name}: no reply")
            out.lost(reason)
            raise part.error(reason)
        out.replied(reply.report, reply.failure)
        if reply.failure is not None:
            raise part.error(reply.failure)

    def _round_trip(self, context: TransactionContext, call: Call) -> Promise:
        promise = Promise()
        target = self.peers[call.target]
        life = self.life
        self.history.line(self.name, target.name, lambda: f"call {call.name} in {context.xid}")

        def answer(reply: Reply) -> None:
            self.history.line(target.name, self.name, lambda: f"reply {call.name}: {_summary(reply)}")
            target.network.send(target, self, arrived, reply)

        def arrived(reply: Reply) -> None:
            if self.life == life:
                promise.keep(reply)

        self.network.send(self, target, target.serve, context, call, answer)
        self.alarm(max(1, context.time_left_ms), promise.keep, None)
        return promise

    def serve(self, context: TransactionContext, call: Call, answer: Callable[[Reply], None]) -> None:
        """Run the handler of *call*, as the server interceptor does."""
        try:
            part = self.manager.join_part(context)
        except TxrpcError as error:
            answer(Reply(None, reason_for(error)))
            return
        handle = JoinedTransactionBase(self.manager, part)

        def ended(end: Promise) -> None:
            failure = None
            if end.error is not None:
                if not isinstance(end.error, TxrpcError | Refused):
                    raise end.error
                handle.failed(end.error)
                failure = reason_for(end.error)
            answer(Reply(handle._leave(), failure))

        Task(self, self._handler(part, call)).end.then(ended)

    def _handler(self, part: LocalTransaction, call: Call) -> Flow[None]:
        yield from self.work(part, call, joined=True)
        for further in call.then:
            yield from self.call(part, further)

    def work(self, part: LocalTransaction, call: Call, joined: bool) -> Flow[None]:
        """Use a resource of this process's."""
        manager = self.manager
        resource = manager.resources[call.resource]
        slot = yield from using.enter(manager, part, resource, joined)
        try:
            if call.writes:
                yield resource.write, (slot.work, slot.row.gid, call.name)
            yield manager.pause, (self.scheduler.dice.random() / 20,)
        except Exception as error:
            instead = using.failed(part, slot, error)
            if instead is not None:
                raise instead from error
            raise
        finally:
            using.leave(manager, slot)

    # ------------------------------------------------------------------------------------------- for the root's story

    def ask(self, xid: Xid, until_ms: int) -> Flow[Outcome]:
        """Learn an outcome."""
        try:
            outcome: Outcome = yield from self.manager.outcome_flow(xid, until_ms)
        except CoordinatorUnavailable:
            return Outcome.UNKNOWN
        return outcome


def _summary(reply: Reply) -> str:
    branches = ", ".join(f"{ref.branch}({ref.calls})" for ref in reply.report.branches) if reply.report else "refused"
    return f"{branches}{' !' + reply.failure.code.name if reply.failure else ''}"
