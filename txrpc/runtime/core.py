"""What both managers share: the participant's table and everything around it that has no colour.

How to think of it
    A manager is the process's side of txrpc.  It holds the participant (the table of this process's branches), the session to
    the coordinator, and the resources.  Everything that changes the table happens under one lock and yields effects, which
    are honoured under the same lock where they are cheap (messages are queued, futures are set) and handed to `_start` where
    they block (operations on a database).

    What the coordinator asks about branches goes straight into the table.  Replies to what roots asked go to futures.

Recovery is three small things here: on every welcome the table asks about what is in doubt, the databases are swept for
prepared branches that no live process of this resource knows, and the sweep is repeated at a slow, jittered pace.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    ForkedError,
    LimitExceeded,
    Reason,
    TxrpcError,
    UsageError,
    aborted,
)
from txrpc.failpoints import failpoint
from txrpc.flows.part import Part, Status
from txrpc.flows.using import Slot
from txrpc.ids import GROUP_MAX, RESOURCE_MAX, BranchId, Epoch, Gid, ParticipantId, Xid, check_name
from txrpc.protocol.branch import BranchInput, BranchState, Do, Effects, Operation
from txrpc.protocol.messages import (
    PROTOCOL_VERSION,
    BranchRef,
    Commit,
    CommitRequest,
    FromCoordinator,
    Hello,
    OnePhaseResult,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    Resolve,
    ResourceInfo,
    Rollback,
    Tick,
    ToCoordinator,
    TransactionContext,
    Welcome,
)
from txrpc.protocol.participant import Participant

__all__ = ["ManagerCore", "SessionPort"]

logger = logging.getLogger("txrpc.runtime")

DEFAULT_TIMEOUT_S = 30.0
_SWEEP_MS = 30_000
_SWEEP_RETRY_MS = 2_000
_MAX_BRANCHES = 10_000
_MAX_UNKNOWN = 10_000
_ANY_EPOCH = Epoch(0)
"""In a question about a transaction that this process knows nothing of but its XID."""
_NOBODY = Owner("none", Epoch.make(1, 0))
"""Owner of a transaction that began with no coordinator in reach: its one branch is never prepared, only committed in one phase."""


class SessionPort(Protocol):
    """What a manager needs of `txrpc.rpc.session`; one a colour, `start`, `close` and `wait_connected` being coloured."""

    start: Callable[[], Any]
    close: Callable[..., Any]
    wait_connected: Callable[..., Any]

    def send(self, *messages: ToCoordinator) -> None:
        """Queue; raises `CoordinatorUnavailable` when there is no session."""


class ManagerCore:
    """See the module's docstring; `Manager` and `AioManager` add threads and tasks."""

    patience_ms = 30_000

    def __init__(self, group: str, resources: Iterable[Any], process: str = "") -> None:
        self.group = check_name("group", group, GROUP_MAX)
        self.process = process or f"pid {os.getpid()}"
        self.participant_id = ParticipantId(os.urandom(8))
        self.resources: dict[str, Any] = {}
        for resource in resources:
            check_name("resource", resource.name, RESOURCE_MAX)
            if resource.name in self.resources:
                raise ConfigurationError(f"two resources are named {resource.name!r}: each needs a name of its own")
            self.resources[resource.name] = resource
        self.welcome: Welcome | None = None
        self._infos: tuple[ResourceInfo, ...] = ()
        self._session: SessionPort | None = None
        self._seen: Owner | None = None
        self._tick = 0
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._table = Participant(random.random)
        self._slots: dict[BranchId, Slot] = {}
        self._asking: dict[Xid, list[Any]] = {}
        self._ending: dict[BranchId, Any] = {}
        self._sweep_at: dict[str, int] = {}
        self._unknown: dict[Xid, OutcomeRequest] = {}

    # ------------------------------------------------------------------------------------------- what a colour adds

    def _start(self, do: Do, slot: Slot | None) -> None:
        """Carry out an operation on a resource, elsewhere, and call `_operated` with its result."""
        raise NotImplementedError

    def _wake(self) -> None:
        """`next_wakeup_ms` may have moved forward."""
        raise NotImplementedError

    def _future(self) -> Any:
        raise NotImplementedError

    def _settle(self, future: Any, result: Any) -> None:
        """Set the result or the exception of a future that somebody may have given up."""
        raise NotImplementedError

    def _turn(self) -> Any:
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- transactions

    def now_ms(self) -> int:
        """Monotonic time."""
        return time.monotonic_ns() // 1_000_000

    def begin_part(self, timeout_s: float | None, read_only: bool) -> Part:
        """A root's part.  Nothing is sent."""
        self._check_fork()
        timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise UsageError(f"timeout is a positive number of seconds, not {timeout_s!r}")
        welcome = self.welcome
        if welcome is not None and timeout_s * 1000 > welcome.max_timeout_ms:
            raise UsageError(
                f"timeout={timeout_s:g} s is above the coordinator's max_timeout of {welcome.max_timeout_ms / 1000:g} s"
            )
        xid = Xid.make(time.time_ns() // 1_000_000, os.urandom(10))
        owner = welcome.owner if welcome is not None else None
        deadline_ms = self.now_ms() + int(timeout_s * 1000)
        return Part(xid, owner, self.group, deadline_ms, read_only, self._tick)

    def join_part(self, context: TransactionContext) -> Part:
        """The part of an incoming call.  See `txrpc.rpc.ports.Joiner.join` for what is raised."""
        self._check_fork()
        if context.group != self.group:
            raise ConfigurationError(
                f"the caller belongs to coordinator group {context.group!r}, this service to {self.group!r}"
            )
        if self.resources:
            self._check_owner(context)
        if context.time_left_ms <= 0:
            raise aborted(context.xid, Reason(AbortCode.TIMED_OUT, "the call arrived with no time left"))
        with self._lock:
            if self._table.closed(context.xid):
                raise aborted(
                    context.xid, Reason(AbortCode.BRANCH_UNKNOWN, "the call came after the transaction had ended here")
                )
        deadline_ms = self.now_ms() + context.time_left_ms
        return Part(context.xid, context.owner, self.group, deadline_ms, context.read_only, self._tick)

    def _check_owner(self, context: TransactionContext) -> None:
        welcome = self.welcome
        if welcome is None or welcome.owner.node != context.owner.node:
            node = context.owner.node
            raise CoordinatorUnavailable(
                f"this service has no session with coordinator {node!r}, which owns the transaction"
            )
        if welcome.owner.epoch != context.owner.epoch:
            if welcome.owner.epoch < context.owner.epoch:
                raise CoordinatorUnavailable("this service has not reconnected to the restarted coordinator yet")
            text = f"it began under epoch {context.owner.epoch} of a coordinator that is in {welcome.owner.epoch} now"
            raise aborted(context.xid, Reason(AbortCode.COORDINATOR_RESTARTED, text))

    def left(self, part: Part) -> None:
        """A joined call of *part* has ended: its branches have one completed call more (rule 9)."""
        with self._lock:
            for branch in part.own:
                row = self._table.rows.get(branch)
                if row is not None:
                    row.running -= 1
                    row.calls += 1
                    row.doom = row.doom or part.doom

    # ---------------------------------------------------------------------------------- branches, as flows.using sees them

    def slot(self, part: Part, resource: Any) -> Slot:
        """See `txrpc.flows.using.Branches`."""
        name: str = resource.name
        known: Any = self.resources.get(name)
        if known is not resource:
            raise ConfigurationError(
                f"resource {name!r} is not one that this manager was connected with: connect(resources=[...])"
            )
        with self._lock:
            row = self._table.find(part.xid, resource.name)
            if row is not None:
                slot = self._slots.get(row.branch)
                if row.state is not BranchState.ACTIVE or slot is None:
                    raise aborted(part.xid, row.doom or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))
                return slot
            return self._open(part, resource)

    def _open(self, part: Part, resource: Any) -> Slot:
        if self._table.closed(part.xid):
            raise aborted(part.xid, Reason(AbortCode.BRANCH_UNKNOWN, "the transaction has ended here"))
        if len(self._slots) >= _MAX_BRANCHES:
            raise LimitExceeded(f"this process has {_MAX_BRANCHES} open branches")
        owner = part.owner
        if owner is None:
            if part.refs:
                raise CoordinatorUnavailable(
                    "the transaction began with no coordinator in reach, so it can use one resource of this process only"
                )
            owner = _NOBODY
        branch = BranchId(os.urandom(8))
        gid = Gid(self.group, owner.node, owner.epoch, part.xid, branch, self.participant_id, resource.name)
        slot = Slot(self._table.open(gid, part.deadline_ms), resource, self._turn())
        self._slots[branch] = slot
        self._wake()
        return slot

    def began(self, slot: Slot, work: Any) -> None:
        """See `txrpc.flows.using.Branches`."""
        with self._lock:
            slot.work = work

    def could_not_begin(self, slot: Slot) -> None:
        """See `txrpc.flows.using.Branches`."""
        with self._lock:
            slot.row.users -= 1
            slot.gone = True
            if slot.row.state is BranchState.ACTIVE:
                del self._slots[slot.row.branch]
                self._table.discard(slot.row)
            else:
                self._honour(self._table.step(BranchInput.RELEASED, slot.row.branch, self.now_ms()))

    def user_enters(self, slot: Slot, part: Part) -> None:
        """See `txrpc.flows.using.Branches`."""
        with self._lock:
            row = slot.row
            if row.state is not BranchState.ACTIVE:
                raise aborted(part.xid, row.doom or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))
            row.users += 1

    def first_use(self, slot: Slot, part: Part, joined: bool) -> None:
        """The work is there: from now on *part* lists the branch."""
        row = slot.row
        with self._lock:
            if part.used(BranchRef(row.branch, row.gid.resource, self.participant_id, int(joined))):
                row.running += joined

    def user_leaves(self, slot: Slot) -> None:
        """See `txrpc.flows.using.Branches`."""
        with self._lock:
            slot.row.users -= 1
            if not slot.row.users and slot.row.state is BranchState.ROLLING_BACK:
                self._honour(self._table.step(BranchInput.RELEASED, slot.row.branch, self.now_ms()))

    # ------------------------------------------------------------------------------------ asking, as flows.ending sees it

    def post(self, message: Any) -> Any:
        """See `txrpc.flows.ending.Ending`."""
        if isinstance(message, CommitRequest):
            failpoint("client.before_commit_request")
        with self._lock:
            future = self._future()
            self._send(message)
            self._asking.setdefault(message.xid, []).append(future)
        if isinstance(message, CommitRequest):
            failpoint("client.after_commit_request")
        return future

    def tell(self, message: ToCoordinator) -> None:
        """See `txrpc.flows.ending.Ending`."""
        try:
            self._send(message)
        except CoordinatorUnavailable:
            logger.debug("dropped a message: no session", extra={"message": type(message).__name__})

    def end_here(self, ref: BranchRef, reason: Reason | None) -> Any:
        """See `txrpc.flows.ending.Ending`."""
        kind = BranchInput.LOCAL_COMMIT if reason is None else BranchInput.LOCAL_ROLLBACK
        detail = ref.calls if reason is None else reason
        branch = ref.branch
        with self._lock:
            future = self._ending.setdefault(branch, self._future())
            if branch not in self._table.rows:
                del self._ending[branch]
                gone = Reason(AbortCode.TIMED_OUT, "the branch was rolled back long ago")
                self._settle(future, (OnePhaseResult.ABORTED, gone))
            self._honour(self._table.step(kind, branch, self.now_ms(), detail))
            return future

    def ended(self, part: Part) -> None:
        """A root's transaction has ended; if nobody knows how, keep what it takes to ask."""
        if part.status is Status.UNKNOWN and part.owner is not None:
            with self._lock:
                while len(self._unknown) >= _MAX_UNKNOWN:
                    del self._unknown[next(iter(self._unknown))]
                self._unknown[part.xid] = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs)

    def _outcome_request(self, xid: Xid) -> OutcomeRequest:
        with self._lock:
            return self._unknown.get(xid) or OutcomeRequest(xid, _ANY_EPOCH, 0)

    def _outcome_reply(self, xid: Xid, reply: OutcomeReply | None) -> Outcome:
        if reply is None:
            raise CoordinatorUnavailable(f"the coordinator did not say in time how transaction {xid} ended")
        if reply.outcome is not Outcome.UNKNOWN:
            with self._lock:
                self._unknown.pop(xid, None)
        return reply.outcome

    def _session_or_raise(self) -> Any:
        if self._session is None:
            raise CoordinatorUnavailable("this manager has no coordinator")
        return self._session

    def _send(self, *messages: ToCoordinator) -> None:
        if self._session is None or self.welcome is None:
            raise CoordinatorUnavailable("there is no session with a coordinator")
        self._session.send(*messages)

    # ---------------------------------------------------------------------------------------------------- the session

    def hello(self) -> Hello:
        """What this process says first, on every connect."""
        return Hello(PROTOCOL_VERSION, self.group, self.participant_id, self.process, self._infos, self._seen)

    def on_welcome(self, welcome: Welcome) -> None:
        """A session has begun."""
        with self._lock:
            if self._seen is not None and self._seen != welcome.owner:
                fields = {"node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
                logger.info("the coordinator has restarted", extra=fields)
            self.welcome, self._seen, self._tick = welcome, welcome.owner, welcome.tick
            self._honour(self._table.connected(self.now_ms()))
            self._honour(self._table.coordinator_is(welcome.owner, self.now_ms()))
            self._sweep_at = dict.fromkeys(self.resources, self.now_ms())
            self._wake()

    def on_lost(self, text: str) -> None:
        """The session has ended: nothing on its way will be answered on it."""
        with self._lock:
            self.welcome = None
            lost, self._asking = self._asking, {}
        for futures in lost.values():
            for future in futures:
                self._settle(future, CoordinatorUnavailable(f"the session with the coordinator broke: {text}"))

    def on_message(self, message: FromCoordinator) -> None:
        """Take a message of the coordinator's."""
        with self._lock:
            if isinstance(message, OutcomeReply):
                for future in self._asking.pop(message.xid, ()):
                    self._settle(future, message)
            elif isinstance(message, Tick):
                self._tick = message.tick
            elif not isinstance(message, Welcome):
                self._about_branch(message)

    def _about_branch(self, message: Any) -> None:
        now_ms = self.now_ms()
        if isinstance(message, Resolve) and self._is_foreign(message):
            self._honour(self._table.resolve_foreign(self._gid(message), message.token, now_ms))
            return
        if isinstance(message, Commit | Rollback) and message.gid.resource not in self.resources:
            logger.error(
                "asked to finish a branch of resource %s, which this process does not have", message.gid.resource
            )
            return
        self._honour(self._table.received(message, now_ms))

    def _is_foreign(self, message: Resolve) -> bool:
        """Whether this asks about another process's branch, which this one's database can tell."""
        return bool(message.branch not in self._table.rows and message.token and message.resource in self.resources)

    def _gid(self, message: Resolve) -> Gid:
        owner = self._seen or _NOBODY
        return Gid(
            self.group, owner.node, owner.epoch, message.xid, message.branch, self.participant_id, message.resource
        )

    # -------------------------------------------------------------------------------------------------------- effects

    def _honour(self, effects: Effects) -> None:
        """Called under the lock, so that messages about one branch leave in the order of the steps that made them."""
        for branch, result, reason in effects.settle:
            future = self._ending.pop(branch, None)
            if future is not None:
                self._settle(future, (result, reason))
        if effects.send:
            try:
                self._send(*effects.send)
            except CoordinatorUnavailable:
                logger.debug("dropped messages: no session", extra={"count": len(effects.send)})
        for do in effects.do:
            slot = self._slots.get(do.gid.branch)
            if do.operation in _NEEDS_WORK and (slot is None or slot.work is None):
                if do.operation is Operation.ROLLBACK:
                    self._operated(do, (BranchInput.ROLLED_BACK, None))
            else:
                self._start(do, slot)
        self._wake()

    def _operated(self, do: Do, result: tuple[BranchInput, Any]) -> None:
        """The result of an operation."""
        with self._lock:
            if do.operation in _ENDS_WORK:
                self._slots.pop(do.gid.branch, None)
            self._honour(self._table.step(result[0], do.gid.branch, self.now_ms(), result[1]))

    def _broke(self, do: Do, error: BaseException) -> None:
        """A resource broke its contract, or this program is mistaken: the branch must not wait for ever."""
        fields = {"operation": do.operation.value, "gid": str(do.gid)}
        logger.error("operation failed", extra=fields, exc_info=error)
        reason = Reason(AbortCode.UNSPECIFIED, f"{do.operation.value} failed: {type(error).__name__}")
        if do.operation is not Operation.INTERRUPT:
            kind = _BROKE.get(do.operation, BranchInput.FINISH_FAILED)
            detail = (OnePhaseResult.UNKNOWN, reason) if kind is BranchInput.ONE_PHASE_ENDED else reason
            self._operated(do, (kind, detail))

    def _committing(self, do: Do, token: str) -> None:
        """COMMIT in one phase is about to be sent to the database."""
        with self._lock:
            message = self._table.committing(do.gid.branch, token)
        if message is not None:
            self.tell(message)

    # ----------------------------------------------------------------------------------------------------- the clock

    def woke(self) -> list[str]:
        """Let time pass; returns the resources whose databases are to be swept now."""
        with self._lock:
            now_ms = self.now_ms()
            self._honour(self._table.woke(now_ms))
            if self.welcome is None:
                return []
            due = [name for name, at_ms in self._sweep_at.items() if at_ms <= now_ms]
            for name in due:
                self._sweep_at[name] = now_ms + int(_SWEEP_MS * (0.5 + random.random()))
            return due

    def next_wakeup_ms(self) -> int | None:
        """When `woke` is due."""
        with self._lock:
            due = list(self._sweep_at.values()) if self.welcome is not None else []
            next_ms = self._table.next_wakeup_ms()
            return min([*due, next_ms] if next_ms is not None else due, default=None)

    def swept(self, name: str, found: Sequence[tuple[Gid, int]] | BaseException) -> None:
        """What the database of resource *name* holds prepared for this group, or why it could not say."""
        with self._lock:
            if isinstance(found, BaseException):
                logger.warning("cannot look for branches in doubt in resource %s: %s", name, found)
                self._sweep_at[name] = self.now_ms() + int(_SWEEP_RETRY_MS * (0.5 + random.random()))
                self._wake()
                return
            for gid, since_ms in found:
                if self._seen is not None and gid.node == self._seen.node:
                    self._honour(self._table.in_doubt(gid, since_ms, self.now_ms()))

    # ------------------------------------------------------------------------------------------------------------ fork

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                "this txrpc manager was made in the parent of this process, and gRPC does not survive a fork: "
                "call txrpc.connect() in the child (gunicorn: in post_fork; multiprocessing: in the worker function)"
            )


_NEEDS_WORK = frozenset({Operation.ROLLBACK, Operation.INTERRUPT})
_ENDS_WORK = frozenset({Operation.PREPARE, Operation.COMMIT_ONE_PHASE, Operation.ROLLBACK})


_BROKE = {
    Operation.PREPARE: BranchInput.PREPARE_FAILED,
    Operation.COMMIT_ONE_PHASE: BranchInput.ONE_PHASE_ENDED,
    Operation.ROLLBACK: BranchInput.ROLLED_BACK,
}


def reason_for(error: BaseException) -> Reason:
    """The reason of a txrpc error that carries one; else that the application failed."""
    reason = getattr(error, "reason", None)
    if isinstance(error, TxrpcError) and isinstance(reason, Reason):
        return reason
    if isinstance(error, CoordinatorUnavailable):
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
    return Reason(AbortCode.APPLICATION_ERROR, f"{type(error).__name__}: {error}"[:300])
