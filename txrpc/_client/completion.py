"""How a root ends its transaction: commit, rollback, and learning an outcome whose answer got lost.

The flows see a client through the `Ending` port.  Three things deserve thought:

A request that was never sent leaves the transaction certainly uncommitted, and may be sent later.  A request that was sent and
not answered is never sent again, because by then the coordinator may have ended the transaction and forgotten it: instead the
*outcome* is asked for, which the coordinator, whichever epoch it is in by then, answers from its memory or its log
(rule 12).

A commit of this process's own database never goes to the coordinator, which would know nothing of it: its end is learnt from this
process, and then from the database (`outcome_here`, rule 21).

Patience for an answer outlasts the transaction's own deadline, because the coordinator decides by that deadline and the
answer still has to travel, perhaps over a restart.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction, Status
from txrpc._protocol.messages import (
    BranchRef,
    CommitRequest,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    RollbackRequest,
    Wait,
)
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    HeuristicOutcome,
    LimitExceeded,
    OutcomeUnknown,
    Reason,
)
from txrpc.ids import BranchId, ParticipantId

__all__ = [
    "Ending",
    "LocalCommit",
    "ask_outcome",
    "cancel_calls",
    "commit",
    "only_here",
    "outcome_here",
    "rollback",
    "settle",
]

logger = logging.getLogger("txrpc.client")

_PAUSE_S = 0.05


class Ending(Protocol):
    """What ending a transaction needs from its manager.  `wait` and `reconnect` block or are awaited."""

    participant_id: ParticipantId
    patience_ms: int

    def now_ms(self) -> int:
        """Monotonic."""

    def post(self, node: str, message: Any) -> Any:
        """Send coordinator *node* a request and return a future of its `OutcomeReply`.

        The future fails with `CoordinatorUnavailable` if the session ends.  Raises the same when there is none: nothing was sent.
        """

    def tell(self, node: str, message: Any) -> None:
        """Send coordinator *node* a message that needs no answer; without a session it is dropped."""

    def end_here(self, ref: BranchRef, reason: Reason | None) -> Any:
        """Commit a branch of this process in one phase, or with a *reason* roll it back; a future of (result, reason)."""

    def runs(self, branch: BranchId) -> bool:
        """Whether a branch of this process has not ended."""

    def ask(self, resource: Any, token: str) -> Any:
        """Ask *resource* in the background how the transaction *token* of its database ended; a future of the answer."""

    def wait(self, future: Any, timeout_s: float) -> Any:
        """The result of *future*; raises `TimeoutError`."""

    def pause(self, seconds: float) -> Any:
        """Sleep."""

    def reconnect(self, timeout_s: float) -> Any:
        """The owner of the live session, waiting for one if need be.

        Raises `CoordinatorUnavailable`, also at once when there will be none; `ConfigurationError` if it was refused for good.
        """


@dataclass(slots=True)
class LocalCommit:
    """A commit of one branch of the root's own process, whose end the root has not learnt."""

    resource: Any
    branch: BranchId
    token: str = ""
    """Which transaction of the database it is, as soon as that is known."""
    result: Outcome | None = None
    """None until its operation has ended."""


def settle(part: LocalTransaction) -> Flow[None]:
    """Let calls that have ended without our noticing (futures, streams) say so."""
    for call in part.calls_out:
        if call.poll is not None:
            yield call.poll, ()


def cancel_calls(part: LocalTransaction) -> None:
    """Nobody will take the replies of the calls that are still out."""
    for call in part.calls_out:
        call.cancel()


def commit(manager: Ending, part: LocalTransaction, wait: Wait) -> Flow[None]:
    """Commit, or raise what says that it did not."""
    yield from settle(part)
    reason = part.close(Status.COMMITTING)
    if reason is None and manager.now_ms() >= part.deadline_ms:
        reason = Reason(AbortCode.TIMED_OUT, "its time was up before commit was asked for")
    refs = part.refs
    try:
        if reason is not None:
            yield from _undo(manager, part, refs, reason)
            outcome = Outcome.ABORTED
        elif not refs:
            outcome = Outcome.COMMITTED
        elif (ref := only_here(manager, refs)) is not None:
            outcome, reason = yield from _commit_here(manager, part, ref)
        else:
            outcome, reason = yield from _commit_there(manager, part, refs, wait)
    except BaseException:
        part.status = Status.UNKNOWN
        raise
    part.status = _STATUS[outcome]
    if part.heuristic:
        raise HeuristicOutcome(part.xid, Reason(AbortCode.UNSPECIFIED, part.heuristic))
    if outcome is Outcome.UNKNOWN:
        raise OutcomeUnknown(part.xid, reason or Reason(AbortCode.UNSPECIFIED))
    if outcome is Outcome.ABORTED:
        part.doom = part.doom or reason
        raise part.error(reason or Reason(AbortCode.UNSPECIFIED))


def only_here(manager: Ending, refs: tuple[BranchRef, ...]) -> BranchRef | None:
    """The only branch of a transaction, if it is one of the root's own process and commits without the coordinator."""
    if len(refs) == 1 and refs[0].participant == manager.participant_id and refs[0].vote is None:
        return refs[0]
    return None


_STATUS = {
    Outcome.COMMITTED: Status.COMMITTED,
    Outcome.ABORTED: Status.ROLLED_BACK,
    Outcome.UNKNOWN: Status.UNKNOWN,
}

Ended = tuple[Outcome, Reason | None]


def rollback(manager: Ending, part: LocalTransaction, reason: Reason) -> Flow[None]:
    """Roll back: the own branches now, those elsewhere as soon as the message arrives, or at their deadline."""
    yield from settle(part)
    part.set_doom(reason)
    part.close(Status.ROLLED_BACK)
    yield from _undo(manager, part, part.refs, part.doom or reason)


def _undo(manager: Ending, part: LocalTransaction, refs: tuple[BranchRef, ...], reason: Reason) -> Flow[None]:
    own = [ref for ref in refs if ref.participant == manager.participant_id]
    futures = [manager.end_here(ref, reason) for ref in own]
    cancel_calls(part)
    if part.owner is not None and (len(own) < len(refs) or part.in_flight):
        others = tuple(ref for ref in refs if ref.participant != manager.participant_id)
        everywhere = bool(part.in_flight)
        request = RollbackRequest(part.xid, part.owner.epoch, part.begun_tick, others, reason, everywhere)
        manager.tell(part.owner.node, request)
    for future in futures:
        # If the database does not answer: the branch is unprepared and can only end one way.
        with contextlib.suppress(TimeoutError):
            yield manager.wait, (future, manager.patience_ms / 1000)


def _commit_here(manager: Ending, part: LocalTransaction, ref: BranchRef) -> Flow[Ended]:
    future = manager.end_here(ref, None)
    patience_s = max(0, part.deadline_ms - manager.now_ms() + manager.patience_ms) / 1000
    try:
        result, reason = yield manager.wait, (future, patience_s)
    except TimeoutError:
        text = f"{ref.resource} has not answered COMMIT for {patience_s:.0f} s"
        return Outcome.UNKNOWN, Reason(AbortCode.RESOURCE_UNAVAILABLE, text)
    return result, reason


def _commit_there(manager: Ending, part: LocalTransaction, refs: tuple[BranchRef, ...], wait: Wait) -> Flow[Ended]:
    future = yield from _send_commit(manager, part, refs, wait)
    if isinstance(future, Reason):
        yield from _undo(manager, part, refs, future)
        return Outcome.ABORTED, future
    until_ms = part.deadline_ms + manager.patience_ms
    try:
        reply: OutcomeReply = yield manager.wait, (future, max(0, until_ms - manager.now_ms()) / 1000)
    except TimeoutError:
        return Outcome.UNKNOWN, Reason(AbortCode.COORDINATOR_UNAVAILABLE, "the coordinator has not answered")
    except CoordinatorUnavailable:
        assert part.owner is not None
        request = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, refs)
        found = yield from ask_outcome(manager, part.owner.node, request, until_ms)
        if found is None:
            text = "the session broke after the commit was asked for, and the coordinator did not come back in time"
            return Outcome.UNKNOWN, Reason(AbortCode.COORDINATOR_UNAVAILABLE, text)
        reply = found
    part.pending, part.heuristic = reply.pending, reply.heuristic
    return reply.outcome, reply.reason


def _send_commit(manager: Ending, part: LocalTransaction, refs: tuple[BranchRef, ...], wait: Wait) -> Flow[Any]:
    """Send the commit request to the owner, waiting for its session while there is time; or return why it was never sent."""
    owner = part.owner
    if owner is None:
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, "it began with no coordinator in reach")
    while True:
        left_ms = part.deadline_ms - manager.now_ms()
        try:
            live: Owner = yield manager.reconnect, (max(0, left_ms) / 1000,)
            if live != owner:
                text = f"it began under epoch {owner.epoch} of {owner.node}, which is in epoch {live.epoch} now"
                return Reason(AbortCode.COORDINATOR_RESTARTED, text)
            request = CommitRequest(part.xid, owner.epoch, part.begun_tick, refs, max(0, left_ms), wait)
            return manager.post(owner.node, request)
        except CoordinatorUnavailable as error:
            if manager.now_ms() >= part.deadline_ms:
                return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
            yield manager.pause, (_PAUSE_S,)
        except (ConfigurationError, LimitExceeded) as error:
            code = AbortCode.LIMIT_EXCEEDED if isinstance(error, LimitExceeded) else AbortCode.COORDINATOR_UNAVAILABLE
            return Reason(code, str(error))


def ask_outcome(manager: Ending, node: str, request: OutcomeRequest, until_ms: int) -> Flow[OutcomeReply | None]:
    """Ask coordinator *node* ("": the one that is connected) until an answer comes, over lost sessions and restarted coordinators.

    None when the time is up.
    """
    while True:
        left_s = (until_ms - manager.now_ms()) / 1000
        if left_s <= 0:
            return None
        try:
            live: Owner = yield manager.reconnect, (left_s,)
            reply: OutcomeReply = yield manager.wait, (manager.post(node or live.node, request), left_s)
            return reply
        except CoordinatorUnavailable:
            yield manager.pause, (_PAUSE_S,)
        except (TimeoutError, ConfigurationError, LimitExceeded):
            return None


def outcome_here(manager: Ending, commit: LocalCommit, until_ms: int) -> Flow[Outcome]:
    """How a commit of this process's own database ended: ask this process, then the database, while there is time (rule 21).

    UNKNOWN only if the time is up, or if the database itself cannot tell.
    """
    while True:
        result = commit.result
        if result is None and not manager.runs(commit.branch):
            result = Outcome.UNKNOWN
        if result is Outcome.UNKNOWN:
            if not commit.token:
                return Outcome.UNKNOWN
            result = yield from _ask_database(manager, commit, until_ms)
        if result is not None:
            commit.result = result
            return result
        if manager.now_ms() >= until_ms:
            return Outcome.UNKNOWN
        yield manager.pause, (_PAUSE_S,)


def _ask_database(manager: Ending, commit: LocalCommit, until_ms: int) -> Flow[Outcome | None]:
    """None while it is out of reach or still at it."""
    try:
        future = manager.ask(commit.resource, commit.token)
        result: Outcome | None = yield manager.wait, (future, max(0, until_ms - manager.now_ms()) / 1000)
        return result
    except Exception as error:
        logger.debug("cannot ask %s how a commit ended: %s", commit.resource.name, error)
        return None
