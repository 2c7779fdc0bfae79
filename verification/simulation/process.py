"""A process of an application: the real `ClientCore`, flows and parts, on simulated sessions, calls and databases."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from txrpc._client import branches, completion, deciding_call, effects
from txrpc._client.branch_operation import operate
from txrpc._client.coordinators import find, live, unavailable
from txrpc._client.core import ClientCore
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.reasons import reason_of
from txrpc._client.rollback_rules import ALWAYS
from txrpc._client.state import ClientState, OpenBranch
from txrpc._client.transaction_base import JoinedTransactionBase
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
from txrpc._protocol.participant.branch import BranchState, Do, Operation
from txrpc.errors import AbortCode, BadMessage, CoordinatorUnavailable, Reason, TxrpcError
from txrpc.ids import Gid, Xid
from verification.simulation.database import Database, Refused, SimResource
from verification.simulation.history import History
from verification.simulation.network import Network, Stream
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
    final: bool = False
    """Whether its caller says, truly or not, that the transaction calls the target no more."""
    decides: bool = False
    """Whether it is the transaction's last call, to the service whose database decides."""


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


class SimRuntime:
    """The `Runtime` of one incarnation: in the scheduler's time instead of threads and sockets."""

    def __init__(self, process: Process, resources: list[SimResource]) -> None:
        self._process = process
        self._woken_at: int | None = None
        self._waiting: list[tuple[str, Promise]] = []
        dice = process.scheduler.dice
        self.state = ClientState.make(
            GROUP,
            resources,
            process.name,
            runtime=self,
            now_ms=process.clock_ms,
            unix_ms=process.unix_ms,
            entropy=dice.randbytes,
            jitter=dice.random,
        )
        self.state.sessions = tuple(process.sessions)
        self.core = ClientCore(self.state)
        for name in self.state.resources:
            self._look_after(name)

    def operate(self, do: Do, branch: OpenBranch | None) -> None:
        resource = self.state.resources[do.gid.resource]
        if do.operation is Operation.INTERRUPT:
            resource.interrupt(branch.work if branch is not None else None)
            return
        self._process.soon(self._operate, do, resource, branch)

    def operate_here(self, do: Do, branch: OpenBranch | None) -> None:
        self.operate(do, branch)

    def _operate(self, do: Do, resource: SimResource, branch: OpenBranch | None) -> None:
        committing = functools.partial(effects.committing, self.state, do)
        task = Task(self._process, operate(do, cast("Any", resource), branch, committing))
        task.end.then(lambda end: effects.operated(self.state, do, result_of(end)))

    def wake(self) -> None:
        due_ms = self.core.next_wakeup_ms()
        if due_ms is not None and (self._woken_at is None or due_ms < self._woken_at):
            self._woken_at = due_ms
            self._process.alarm(due_ms - self._process.clock_ms(), self._tick_tock, due_ms)

    def _tick_tock(self, due_ms: int) -> None:
        if self._woken_at != due_ms:
            return
        self._woken_at = None
        for name in self.core.woke():
            self._look_after(name)
        self.wake()

    def _look_after(self, name: str) -> None:
        """The session is opened meanwhile: a resource may come up before it, or after."""
        resource: SimResource = self.state.resources[name]
        starts = bool(self.state.starting.trouble(name))
        promise = resource.start() if starts else resource.in_doubt(self.state.group)
        told: Callable[..., None] = functools.partial(self.core.swept, name, self.state.now_ms())
        if starts:
            told = functools.partial(self.core.started, name)
        promise.then(lambda kept: self._process.soon(told, kept.error or kept.value))

    def aside(
        self, _name: str, verb: Callable[..., Promise], arguments: tuple[Any, ...], then: Callable[[Any], None]
    ) -> None:
        verb(*arguments).then(lambda kept: self._process.soon(then, kept.error or kept.value))

    def future(self) -> Promise:
        return Promise()

    def settle(self, future: Promise, result: object) -> None:
        if isinstance(result, BaseException):
            future.break_(result)
        else:
            future.keep(result)

    def branch_lock(self) -> _Turn:
        return _Turn(self._process)

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

    def reconnect(self, node: str, timeout_s: float) -> Any:
        if (owner := find(self.state, node)) is not None:
            return owner
        promise = Promise()
        self._waiting.append((node, promise))
        self._process.alarm(int(timeout_s * 1000), promise.break_, unavailable(self.state, node))
        return promise

    def sessions_changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for node, promise in waiting:
            if (owner := find(self.state, node)) is not None:
                promise.keep(owner)
            else:
                self._waiting.append((node, promise))


def result_of(end: Promise) -> Any:
    """What a task returned; raises what it raised."""
    if end.error is not None:
        raise end.error
    return end.value


class SimSession:
    """The session of one incarnation with the coordinator at one address: it dials until it dies."""

    refused = over = False

    def __init__(self, process: Process, address: str) -> None:
        self.address = address
        self._process = process
        self._stream: Stream | None = None
        self._home = ""
        self.open = False

    @property
    def trouble(self) -> str:
        return "" if self.open else "no session"

    def connect(self) -> None:
        """Dial, and say Hello."""
        process = self._process
        stream = process.dial(process, self.address)
        if stream is None:
            process.alarm(process.scheduler.dice.randint(50, 1_000), self.connect)
            return
        self._stream = stream
        stream.on_message[process.name] = self._heard
        stream.on_end[process.name] = self._lost
        stream.send(process.name, ("", process.core.hello(self)))
        process.alarm(3_000, self._give_up, stream)

    def _give_up(self, stream: Stream) -> None:
        """No Welcome has come."""
        if self._stream is stream and not self.open:
            self.hang_up()

    def hang_up(self) -> None:
        """End the stream, as for a new attempt."""
        if self._stream is not None:
            self._stream.close(self._process.name)
            self._lost()

    def die(self) -> None:
        """The process dies."""
        if self._stream is not None:
            self._stream.close(self._process.name)

    def _heard(self, item: tuple[str, Any]) -> None:
        node, message = item
        if not self.open:
            self._first(node, message)
        elif node == self._home and isinstance(message, GoAway | Welcome):
            self.hang_up()
        else:
            self._process.core.on_message(self, node, message)

    def _first(self, node: str, message: Any) -> None:
        if not isinstance(message, Welcome):
            self.hang_up()
            return
        self.open, self._home = True, node
        try:
            self._process.core.on_welcome(self, message)
        except BadMessage:
            self.hang_up()

    def _lost(self) -> None:
        was_open, self._stream, self.open = self.open, None, False
        if was_open:
            self._process.core.on_lost(self, "the stream ended")
        self._process.alarm(self._process.scheduler.dice.randint(10, 1_000), self.connect)

    def send(self, node: str, *messages: Any) -> None:
        """See `Outbox`."""
        for message in messages:
            self.say(node, message)
            self._process.said(node, message)

    def say(self, node: str, message: Any) -> None:
        """Send anything at all, true or not."""
        if self._stream is None:
            raise CoordinatorUnavailable("no session")
        self._stream.send(self._process.name, (node, message))


class Process(Node):
    """One process under one address; every restart is a new incarnation with a new client."""

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        network: Network,
        history: History,
        databases: dict[str, Database],
        coordinators: tuple[str, ...],
        dial: Callable[[Process, str], Stream | None],
    ) -> None:
        super().__init__(scheduler, name)
        self._coordinators = coordinators
        self.dial = dial
        """Open a stream to the coordinator that is at an address now."""
        self.network = network
        self.history = history
        self._databases = databases
        self.peers: dict[str, Process] = {}
        self.wall_offset_ms = 1_700_000_000_000
        self.misnamed: dict[str, Database] = {}
        """Databases that this process reaches under a name that is another's: a mistake in its configuration."""
        self.requests: list[tuple[str, AboutEnd]] = []
        """All that its roots have ever asked."""
        self.runtime: SimRuntime
        self.sessions: list[SimSession] = []
        self._resources: list[SimResource] = []
        self.start()

    @property
    def state(self) -> ClientState:
        """The client's, of this incarnation."""
        return self.runtime.state

    @property
    def core(self) -> ClientCore:
        """The client's, of this incarnation."""
        return self.runtime.core

    def in_doubt(self) -> list[Gid]:
        """The branches that this incarnation asks for."""
        rows = self.state.participant.rows.values()
        return [row.gid for row in rows if row.state is BranchState.PREPARED]

    def unix_ms(self) -> int:
        """This machine's own idea of the time."""
        return self.clock_ms() + self.wall_offset_ms

    # -------------------------------------------------------------------------------------------------- life and death

    def start(self) -> None:
        """A new incarnation."""
        self.up = True
        self.history.line(self.name, self.name, lambda: "starts")
        self.sessions = [SimSession(self, address) for address in self._coordinators]
        databases = self._databases | self.misnamed
        self._resources = [SimResource(name, database, self) for name, database in databases.items()]
        self.runtime = SimRuntime(self, self._resources)
        for session in self.sessions:
            self.soon(session.connect)

    def crash(self) -> None:
        """Die, and everything with it."""
        if not self.up:
            return
        self.die()
        for session in self.sessions:
            session.die()
        for resource in self._resources:
            resource.abandon()

    # ------------------------------------------------------------------------------------------------------ the sessions

    def said(self, node: str, message: Any) -> None:
        """Note what a coordinator was told."""
        if isinstance(message, CommitRequest | RollbackRequest | OutcomeRequest):
            self.requests.append((node, message))
        if isinstance(message, Voted):
            self.history.note("voted", message.xid, message.branch, message.vote)

    def say(self, node: str, message: Any) -> None:
        """Send coordinator *node* anything at all, true or not; it is lost if there is no session."""
        known = live(self.state, node)
        if known is not None and isinstance(known.session, SimSession):
            known.session.say(node, message)

    # ------------------------------------------------------------------------------------------------------------ calls

    def call(self, part: LocalTransaction, call: Call) -> Flow[None]:
        """Make one business call in *part*, as the client interceptor does."""
        part.check_usable(self.clock_ms())
        if part.owner is None:
            raise CoordinatorUnavailable("it began with no coordinator in reach")
        if call.decides:
            out = deciding_call.begin(part, ALWAYS, part.owner, self.clock_ms(), False)
        else:
            out = part.call_begins(ALWAYS, part.owner, self.clock_ms(), final=call.final)
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
            part = self.core.join_part(context)
        except TxrpcError as error:
            answer(Reply(None, reason_of(error)))
            return
        handle = JoinedTransactionBase(self.state, part, context)

        def ended(end: Promise) -> None:
            failure = None
            if end.error is not None:
                if not isinstance(end.error, TxrpcError | Refused):
                    raise end.error
                handle.failed(end.error)
                failure = reason_of(end.error)
            votes = Task(self, handle._call_ended())
            votes.end.then(lambda _end: answer(Reply(handle._leave(), failure)))

        Task(self, self._handler(part, call)).end.then(ended)

    def _handler(self, part: LocalTransaction, call: Call) -> Flow[None]:
        yield from self.work(part, call, joined=True)
        for further in call.then:
            yield from self.call(part, further)

    def work(self, part: LocalTransaction, call: Call, joined: bool) -> Flow[None]:
        """Use a resource of this process's."""
        state = self.state
        resource = state.resources[call.resource]
        branch = yield from branches.enter(state, part, resource, joined)
        branch.work.gid = branch.row.gid
        try:
            if call.writes:
                yield resource.write, (branch.work, branch.row.gid, call.name)
            yield self.runtime.pause, (self.scheduler.dice.random() / 20,)
        except Exception as error:
            instead = branches.failed(part, branch, error)
            if instead is not None:
                raise instead from error
            raise
        finally:
            branches.leave(state, branch)

    # ------------------------------------------------------------------------------------------- for the root's story

    def ask(self, xid: Xid, until_ms: int) -> Flow[Outcome]:
        """Learn an outcome."""
        try:
            outcome: Outcome = yield from completion.outcome(self.state, xid, until_ms)
        except CoordinatorUnavailable:
            return Outcome.UNKNOWN
        return outcome


def _summary(reply: Reply) -> str:
    branches = ", ".join(f"{ref.branch}({ref.calls})" for ref in reply.report.branches) if reply.report else "refused"
    return f"{branches}{' !' + reply.failure.code.name if reply.failure else ''}"
