"""One process's part in one transaction: what a root sees from begin to its end, or a joined call from join to its reply.

How to think of it
    A part gathers three things: the branches used so far (its own, and those that replies carried home), the calls that are
    out, and whether the transaction is doomed.  Ending it is a race that exactly one caller wins: `close` moves it out of ACTIVE.
    A part may be used by several threads at once (`txrpc.carry`), so everything here happens under its lock; nothing blocks.

Calls of one branch are counted where they run and added up where they return (rule 9), so the root's own use of a
resource in its own process counts nothing: there is no reply that could get lost.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from txrpc._client.rollback_rules import RollbackRules
from txrpc._protocol.messages import BranchRef, CallReport, Outcome, Owner, TransactionContext
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, CallsInFlight, IllegalState, Reason, TransactionTimedOut, TxrpcError, aborted
from txrpc.ids import BranchId, RegisterId, Xid

__all__ = ["Hook", "LocalTransaction", "OutgoingCall", "Status", "TransactionEvent"]

logger = logging.getLogger("txrpc.client")
_warned: set[str] = set()
"""Resources about which a warning has been logged: once is enough."""


class Status(enum.Enum):
    """How a transaction stands, as its own process sees it."""

    ACTIVE = "active"
    ROLLBACK_ONLY = "rollback only"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TransactionEvent:
    """What the hooks of a transaction are called with.

    outcome: None before the commit; UNKNOWN if it could not be learnt.
    reason: why it was rolled back.
    pending: after a commit, resources that have not acknowledged the decision yet (they will).
    """

    xid: Xid
    outcome: Outcome | None = None
    reason: Reason | None = None
    pending: tuple[str, ...] = ()


Hook = Callable[[TransactionEvent], Any]


@dataclass(slots=True)
class Hooks:
    """What users have registered, in the order of registration."""

    before_commit: list[Hook] = field(default_factory=list)
    after: list[tuple[Outcome | None, Hook]] = field(default_factory=list)
    """With the outcome that it is for; None: any."""

    def take_after(self, outcome: Outcome) -> list[Hook]:
        """Return those that are for *outcome*, once."""
        after, self.after = self.after, []
        return [hook for wanted, hook in after if wanted in (None, outcome)]


class OutgoingCall:
    """One call to another service, until its end is known.  See `txrpc._grpc.ports.OutgoingCallPort`."""

    __slots__ = ("_cancel", "_part", "_rule", "bounded", "context", "poll", "time_left_s")

    def __init__(self, part: LocalTransaction, rule: RollbackRules, context: TransactionContext) -> None:
        self._part = part
        self._rule = rule
        self.context = context
        self.time_left_s = context.time_left_ms / 1000
        self.bounded = True
        self.poll: Callable[[], Any] | None = None
        self._cancel: Callable[[], Any] | None = None

    def replied(self, report: CallReport | None, failure: Reason | None = None, kinds: tuple[object, ...] = ()) -> None:
        """The end is known."""
        if self.context.decide is not None and report is not None and report.committed:
            self._part.committed_there = True
        doom = failure if failure is not None and self._rule.rolls_back(kinds) else None
        self._part.call_ended(self, report, doom)

    def lost(self, reason: Reason) -> None:
        """The end is not known."""
        if self.context.final:
            self._part.lost_vote = True
        self._part.call_ended(self, None, reason)

    def error(self, reason: Reason) -> TxrpcError:
        """Return what to raise where the transaction rolls back because of *reason*."""
        return self._part.error(reason)

    def settle_with(self, poll: Callable[[], Any], cancel: Callable[[], Any]) -> None:
        """Register how to learn of an end that was not reported, and how to bring one about."""
        self.poll, self._cancel = poll, cancel

    def cancel(self) -> None:
        """Cancel the call: its reply is not needed any more.  (A blocking call of another thread cannot be cancelled.)"""
        if self._cancel is not None:
            self._cancel()


class LocalTransaction:
    """See the module's docstring."""

    def __init__(
        self,
        xid: Xid,
        owner: Owner | None,
        group: str,
        deadline_ms: int,
        read_only: bool,
        begun_tick: int,
        timeout_s: float | None = None,
        call_reads_only: bool = False,
        register: RegisterId | None = None,
    ) -> None:
        self.xid = xid
        self.owner = owner
        self.group = group
        self.deadline_ms = deadline_ms
        """Monotonic."""
        self.timeout_s = timeout_s
        """The root's, for people; None in a joined call."""
        self.read_only = read_only
        self.call_reads_only = call_reads_only
        """Of a joined call: it may only read, though the transaction may write elsewhere."""
        self.register = register
        """Where the transaction is decided, if a resource decides it."""
        self.decides_in = ""
        """The root's: which resource that is."""
        self.asked_to_decide = False
        """Whether a call, or the coordinator, was told to decide: from then on only the register says how the transaction ends."""
        self.committed_there = False
        """Whether the reply of such a call has said that it is committed."""
        self.begun_tick = begun_tick
        self.around: tuple[Xid, ...] = ()
        """The transactions whose code waits for the end of this one."""
        self.status = Status.ACTIVE
        self.doom: Reason | None = None
        self.pending: tuple[str, ...] = ()
        """After COMMITTED: resources whose branch has not acknowledged yet."""
        self.heuristic = ""
        """A sentence if a branch was found ended against the decision."""
        self.hooks = Hooks()
        self._lock = threading.Lock()
        self.in_flight = 0
        """Calls whose end was not known when the part was closed: each may have opened branches that are not known here."""
        self.lost_vote = False
        """Whether the end of a final call is not known: it may have left a prepared branch that is not known here."""
        self._out: set[OutgoingCall] = set()
        self._refs: dict[BranchId, BranchRef] = {}
        self._own: set[BranchId] = set()

    # ------------------------------------------------------------------------------------------------------ gathering

    def check_usable(self, now_ms: int) -> None:
        """Raise unless work may still be done in this part."""
        if self.asked_to_decide:
            raise IllegalState(f"transaction {self.xid} was decided by its last call: no work can follow")
        if self.doom is not None:
            raise self.error(self.doom)
        if self.status is not Status.ACTIVE:
            raise IllegalState(f"transaction {self.xid} has ended here: {self.status.value}")
        if now_ms >= self.deadline_ms:
            self.set_doom(Reason(AbortCode.TIMED_OUT, "the transaction's deadline has passed"))
            self.check_usable(now_ms)

    def set_doom(self, reason: Reason) -> None:
        """From now on the transaction can only roll back; the first reason stays."""
        with self._lock:
            self._doom(reason)

    def call_begins(
        self,
        rule: RollbackRules,
        owner: Owner,
        now_ms: int,
        reads_only: bool = False,
        final: bool = False,
        decide: tuple[PreparedBranch, ...] | None = None,
    ) -> OutgoingCall:
        """Register a call; the caller has made sure that the part is usable."""
        left_ms = max(1, self.deadline_ms - now_ms)
        context = TransactionContext(
            self.group, self.xid, owner, left_ms, self.read_only, reads_only, final, self.register, decide
        )
        call = OutgoingCall(self, rule, context)
        with self._lock:
            self._out.add(call)
            self.asked_to_decide = self.asked_to_decide or decide is not None
        return call

    def call_ended(self, call: OutgoingCall, report: CallReport | None, doom: Reason | None) -> None:
        """Take the end of a call; only the first word about it counts."""
        with self._lock:
            if call not in self._out:
                return
            self._out.discard(call)
            for ref in report.branches if report else ():
                self._merge(ref)
            if report is not None and report.doomed is not None:
                self._doom(report.doomed)
            if doom is not None:
                self._doom(doom)

    def used(self, ref: BranchRef) -> bool:
        """Note a branch of this process; returns whether this part had not used it before."""
        with self._lock:
            if ref.branch in self._own:
                return False
            self._own.add(ref.branch)
            self._merge(ref)
            return True

    def voted(self, ref: BranchRef) -> None:
        """Note the early vote of a branch of this process."""
        with self._lock:
            self._merge(ref)

    def miscounted(self) -> Reason | None:
        """Return why the votes do not hold: one counted other calls than this part saw (rule 9), or knows no register."""
        for ref in self.refs:
            if ref.register != self.register:
                text = f"{ref.resource} does not know that {self.decides_in} decides: upgrade txrpc in its process"
                return Reason(AbortCode.PROTOCOL_VIOLATION, text)
            if ref.vote is not None and ref.calls != ref.counted:
                text = (
                    f"{ref.resource} had completed {ref.counted} calls when it voted, the root saw {ref.calls}: one ran twice, or "
                    "its end was lost, or it was called again after its final call"
                )
                return Reason(AbortCode.CALLS_DIFFER, text)
        return None

    @property
    def own(self) -> tuple[BranchId, ...]:
        """The branches of this process that this very part has used."""
        with self._lock:
            return tuple(self._own)

    @property
    def calls_out(self) -> list[OutgoingCall]:
        """The calls whose end is not known yet."""
        with self._lock:
            return list(self._out)

    @property
    def refs(self) -> tuple[BranchRef, ...]:
        """The branches seen so far."""
        with self._lock:
            return tuple(self._refs.values())

    # --------------------------------------------------------------------------------------------------------- ending

    def close(self, status: Status) -> Reason | None:
        """Stop taking work, which only one caller can do, and say why the transaction can only roll back, if so.

        Raises `IllegalState` if it was closed before.  Calls still out doom it, because what they will do is not known.
        """
        with self._lock:
            if self.status is not Status.ACTIVE:
                raise IllegalState(f"transaction {self.xid} has ended already: {self.status.value}")
            self.status = status
            self.in_flight = count = len(self._out)
            if count:
                text = f"{count} call{'s' if count > 1 else ''} of the transaction had not returned when it was to end"
                self._doom(Reason(AbortCode.CALL_END_UNKNOWN, text))
            return self.doom

    def error(self, reason: Reason) -> TxrpcError:
        """Return what to raise where the transaction rolls back because of *reason*."""
        if self.in_flight and reason.code is AbortCode.CALL_END_UNKNOWN:
            return CallsInFlight(f"transaction {self.xid} was rolled back: {reason.text}")
        error = aborted(self.xid, reason)
        if isinstance(error, TransactionTimedOut) and self.timeout_s is not None:
            return TransactionTimedOut(self.xid, reason, f"{error}; its timeout was {self.timeout_s:g} s")
        return error

    def report(self) -> CallReport:
        """Return what the reply of a joined call carries home."""
        with self._lock:
            return CallReport(tuple(self._refs.values()), self.doom, self.committed_there)

    def _doom(self, reason: Reason) -> None:
        if self.doom is None and self.status is not Status.COMMITTED:
            self.doom = reason

    def _warn_of_replicas(self, ref: BranchRef) -> None:
        if ref.resource in _warned:
            return
        if any(seen.resource == ref.resource and seen.participant != ref.participant for seen in self._refs.values()):
            _warned.add(ref.resource)
            logger.warning(
                "transaction %s uses resource %r in two processes: their branches do not see each other's writes, and wait for "
                "each other's locks; route the calls of one transaction to one replica (by the header txrpc-xid)",
                self.xid,
                ref.resource,
            )

    def _merge(self, ref: BranchRef) -> None:
        """Add up the calls of one branch; a branch votes early once."""
        seen = self._refs.get(ref.branch)
        if seen is None:
            self._warn_of_replicas(ref)
            self._refs[ref.branch] = ref
            return
        if seen.vote is not None and ref.vote is not None:
            self._doom(Reason(AbortCode.PROTOCOL_VIOLATION, f"two replies carried the early vote of {ref.resource}"))
        voter = seen if seen.vote is not None else ref
        self._refs[ref.branch] = replace(voter, calls=seen.calls + ref.calls)
