"""How a root ends its transaction: commit, rollback, and learning an outcome whose answer got lost.

Three things deserve thought:

A request that was never sent leaves the transaction certainly uncommitted, and may be sent later.  A request that was sent and
not answered is never sent again, because by then the coordinator may have ended the transaction and forgotten it: instead the
*outcome* is asked for, which the coordinator, whichever epoch it is in by then, answers from its memory or its log
(rule 12).

A commit of this process's own database never goes to the coordinator, which would know nothing of it: its end is learnt from this
process, and then from the database (`_outcome_here`, rule 21).

Patience for an answer outlasts the transaction's own deadline, because the coordinator decides by that deadline and the
answer still has to travel, perhaps over a restart.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from txrpc._client import branches, deciding, effects, requests
from txrpc._client.coordinators import all_over, live
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction, Status
from txrpc._client.requests import Ended
from txrpc._client.state import ClientState, LocalCommit
from txrpc._protocol.messages import (
    BranchRef,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    RollbackRequest,
    Vote,
    Wait,
)
from txrpc._protocol.participant.branch import BranchState
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    HeuristicOutcome,
    IllegalState,
    LimitExceeded,
    OutcomeUnknown,
    Reason,
)
from txrpc.ids import BranchId, Epoch, Xid

__all__ = ["cancel_calls", "commit", "keep_unknown", "outcome", "rollback", "settle"]

logger = logging.getLogger("txrpc.client")

_ANY_EPOCH = Epoch(0)
"""In a question about a transaction that this process knows nothing of but its XID."""


def settle(part: LocalTransaction) -> Flow[None]:
    """Let calls that have ended without our noticing (futures, streams) say so."""
    for call in part.calls_out:
        if call.poll is not None:
            yield call.poll, ()


def cancel_calls(part: LocalTransaction) -> None:
    """Cancel the calls that are still out: their replies are not needed any more."""
    for call in part.calls_out:
        call.cancel()


def commit(client: ClientState, part: LocalTransaction, wait: Wait | None = None) -> Flow[None]:
    """Commit, or raise what says that it did not."""
    yield from settle(part)
    if wait is None:
        wait = Wait.DECISION if part.decides_in else Wait.ACKNOWLEDGED
    if part.decides_in in client.resources:
        yield from deciding.join(client, part)
    reason = part.close(Status.COMMITTING)
    if reason is None and client.now_ms() >= part.deadline_ms:
        reason = Reason(AbortCode.TIMED_OUT, "the transaction's deadline has passed")
    reason = reason or part.miscounted()
    refs = part.refs
    try:
        if part.asked_to_decide:
            outcome, reason = yield from _learn(client, part)
            if outcome is Outcome.COMMITTED and wait is Wait.ACKNOWLEDGED:
                yield from deciding.second_phase(client, part)
        elif reason is not None:
            yield from _undo(client, part, refs, reason)
            outcome = Outcome.ABORTED
        elif not refs:
            outcome = Outcome.COMMITTED
        elif part.decides_in in client.resources:
            outcome, reason = yield from _commit_deciding(client, part, wait)
        elif (ref := _only_here(client, refs)) is not None:
            outcome, reason = yield from requests.commit_here(client, part, ref, ref.calls)
        else:
            outcome, reason = yield from _commit_there(client, part, wait)
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


def _only_here(client: ClientState, refs: tuple[BranchRef, ...]) -> BranchRef | None:
    """The only branch of a transaction, if it is one of the root's own process and commits without the coordinator."""
    if len(refs) == 1 and refs[0].participant == client.participant_id and refs[0].vote is None:
        return refs[0]
    return None


_STATUS = {
    Outcome.COMMITTED: Status.COMMITTED,
    Outcome.ABORTED: Status.ROLLED_BACK,
    Outcome.UNKNOWN: Status.UNKNOWN,
}


def rollback(client: ClientState, part: LocalTransaction, reason: Reason) -> Flow[None]:
    """Roll back: the own branches now, those elsewhere as soon as the message arrives, or at their deadline."""
    yield from settle(part)
    part.set_doom(reason)
    part.close(Status.ROLLED_BACK)
    if part.asked_to_decide:
        outcome, why = yield from _learn(client, part)
        part.status = _STATUS[outcome]
        if outcome is Outcome.COMMITTED:
            raise IllegalState(
                f"transaction {part.xid} has committed: the call that was to decide it has, whatever followed"
            )
        if outcome is Outcome.UNKNOWN:
            raise OutcomeUnknown(part.xid, why or reason)
        return
    yield from _undo(client, part, part.refs, part.doom or reason)


def _undo(client: ClientState, part: LocalTransaction, refs: tuple[BranchRef, ...], reason: Reason) -> Flow[None]:
    own = [ref for ref in refs if ref.participant == client.participant_id]
    futures = [requests.rollback_here(client, ref, reason) for ref in own]
    cancel_calls(part)
    everywhere = bool(part.in_flight) or part.lost_vote
    voted = any(ref.vote is Vote.PREPARED for ref in own)
    if part.owner is not None and (len(own) < len(refs) or voted or everywhere):
        others = tuple(ref for ref in refs if ref.participant != client.participant_id or ref.vote is Vote.PREPARED)
        request = RollbackRequest(part.xid, part.owner.epoch, part.begun_tick, others, reason, everywhere)
        effects.tell(client, part.owner.node, request)
    for future in futures:
        # If the database does not answer: the branch is unprepared and can only end one way.
        with contextlib.suppress(TimeoutError):
            yield client.runtime.wait, (future, client.commit_timeout_ms / 1000)


def _learn(client: ClientState, part: LocalTransaction) -> Flow[Ended]:
    """How a transaction has ended whose right to decide was given away: a reply has said so, or its register is asked."""
    part.pending = tuple(sorted({ref.resource for ref in part.refs if ref.vote is Vote.PREPARED}))
    if part.committed_there:
        return Outcome.COMMITTED, None
    assert part.owner is not None
    until_ms = part.deadline_ms + client.commit_timeout_ms
    request = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs, part.register)
    found = yield from _ask_outcome(client, "", request, until_ms)
    while _is_away(found) and client.now_ms() < until_ms:
        yield client.runtime.pause, (requests.PAUSE_S,)
        found = yield from _ask_outcome(client, "", request, until_ms)
    if found is None or found.outcome is Outcome.UNKNOWN:
        why = found.reason.text if found is not None and found.reason is not None else "no coordinator answers"
        return Outcome.UNKNOWN, Reason(
            AbortCode.RESOURCE_UNAVAILABLE, f"{part.decides_in} has not said that it has decided, and {why}"
        )
    part.pending = found.pending
    if found.outcome is Outcome.ABORTED:
        yield from _undo(client, part, part.refs, part.doom or found.reason or Reason(AbortCode.UNSPECIFIED))
    return found.outcome, part.doom or found.reason


def _is_away(found: OutcomeReply | None) -> bool:
    """Return whether the register could not be asked: its database, or all processes that reach it, are away for a moment."""
    reason = found.reason if found is not None and found.outcome is Outcome.UNKNOWN else None
    return reason is not None and reason.code is AbortCode.RESOURCE_UNAVAILABLE


def _commit_deciding(client: ClientState, part: LocalTransaction, wait: Wait) -> Flow[Ended]:
    ended = yield from deciding.commit(client, part, wait)
    if isinstance(ended, Reason):
        yield from _undo(client, part, part.refs, ended)
        return Outcome.ABORTED, ended
    return ended


def _commit_there(client: ClientState, part: LocalTransaction, wait: Wait) -> Flow[Ended]:
    client.committing.add(part.xid)
    try:
        decider = deciding.elsewhere(part)
        if _asks_only_here(client, part, decider):
            # Prepared in the root's own thread, with no message and no change of threads.
            yield from branches.vote_early(client, part)
        reason = part.doom or part.miscounted()
        future = reason or (yield from requests.send_commit(client, part, part.refs, wait, decider))
        if isinstance(future, Reason):
            yield from _undo(client, part, part.refs, future)
            return Outcome.ABORTED, future
        if part.register is not None:
            return (yield from _await_decision(client, part, future))
        return (yield from _await_reply(client, part, future))
    finally:
        client.committing.discard(part.xid)


def _await_decision(client: ClientState, part: LocalTransaction, future: Any) -> Flow[Ended]:
    """Return what the coordinator says that was asked to have the transaction decided; without a word only the register knows."""
    part.asked_to_decide = True
    until_ms = part.deadline_ms + client.commit_timeout_ms
    try:
        reply: OutcomeReply | None = yield client.runtime.wait, (future, max(0, until_ms - client.now_ms()) / 1000)
    except (TimeoutError, CoordinatorUnavailable):
        reply = None
    if reply is None or reply.outcome is Outcome.UNKNOWN:
        return (yield from _learn(client, part))
    part.pending, part.heuristic = reply.pending, reply.heuristic
    return reply.outcome, reply.reason


def _await_reply(client: ClientState, part: LocalTransaction, future: Any) -> Flow[Ended]:
    """Return what the coordinator says to a commit request that was sent."""
    until_ms = part.deadline_ms + client.commit_timeout_ms
    try:
        reply: OutcomeReply = yield client.runtime.wait, (future, max(0, until_ms - client.now_ms()) / 1000)
    except TimeoutError:
        return Outcome.UNKNOWN, Reason(AbortCode.COORDINATOR_UNAVAILABLE, "the coordinator has not answered")
    except CoordinatorUnavailable:
        assert part.owner is not None
        request = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs)
        found = yield from _ask_outcome(client, part.owner.node, request, until_ms)
        if found is None:
            text = "the session broke after the commit was asked for, and the coordinator did not come back in time"
            return Outcome.UNKNOWN, Reason(AbortCode.COORDINATOR_UNAVAILABLE, text)
        reply = found
    part.pending, part.heuristic = reply.pending, reply.heuristic
    return reply.outcome, reply.reason


def _asks_only_here(client: ClientState, part: LocalTransaction, decider: BranchId | None) -> bool:
    """Return whether all votes that are missing are those of this process, and there is a coordinator to tell them to.

    Where others must be asked as well, all prepare at the same time.  *decider* gives no vote.
    """
    known = live(client, part.owner.node) if part.owner is not None else None
    missing = [ref for ref in part.refs if ref.vote is None and ref.branch != decider]
    return known is not None and all(ref.participant == client.participant_id for ref in missing)


def _ask_outcome(client: ClientState, node: str, request: OutcomeRequest, until_ms: int) -> Flow[OutcomeReply | None]:
    """Ask coordinator *node* ("": any) until an answer comes, over lost sessions and coordinators that restart or are taken over.

    None when the time is up.
    """
    while True:
        left_s = (until_ms - client.now_ms()) / 1000
        if left_s <= 0:
            return None
        try:
            there: Owner = yield client.runtime.reconnect, (node, left_s)
            reply: OutcomeReply = yield client.runtime.wait, (requests.post(client, there.node, request), left_s)
            return reply
        except CoordinatorUnavailable:
            if all_over(client):
                return None
            yield client.runtime.pause, (requests.PAUSE_S,)
        except (TimeoutError, ConfigurationError, LimitExceeded):
            return None


def _outcome_here(client: ClientState, commit: LocalCommit, until_ms: int) -> Flow[Outcome]:
    """How a commit of this process's own database ended: ask this process, then the database, while there is time (rule 21).

    UNKNOWN only if the time is up, or if the database itself cannot tell.
    """
    while True:
        runs = requests.runs(client, commit.branch)  # looked at first: what ends it is told before it is over
        result = commit.result
        if result is None and not runs:
            result = Outcome.UNKNOWN
        if result is Outcome.UNKNOWN:
            if not commit.token:
                return Outcome.UNKNOWN
            result = yield from _ask_database(client, commit, until_ms)
        if result is not None:
            commit.result = result
            return result
        if client.now_ms() >= until_ms:
            return Outcome.UNKNOWN
        yield client.runtime.pause, (requests.PAUSE_S,)


def _ask_database(client: ClientState, commit: LocalCommit, until_ms: int) -> Flow[Outcome | None]:
    """None while it is out of reach or still at it."""
    try:
        future = client.runtime.ask(commit.resource, commit.token)
        result: Outcome | None = yield client.runtime.wait, (future, max(0, until_ms - client.now_ms()) / 1000)
        return result
    except Exception as error:
        logger.debug("cannot ask %s how a commit ended: %s", commit.resource.name, error)
        return None


def keep_unknown(client: ClientState, part: LocalTransaction) -> None:
    """A root's transaction has ended; if its end is not known, keep what it takes to ask."""
    if part.status is not Status.UNKNOWN:
        return
    ref = _only_here(client, part.refs)
    with client.lock:
        if ref is not None:
            row = client.participant.rows.get(ref.branch)
            result = row.outcome if row is not None and row.state is BranchState.ENDED else None
            token = row.token if row is not None else ""
            commit = LocalCommit(client.resources[ref.resource], ref.branch, token, result)
            requests.keep(client.local_commits, part.xid, commit)
        elif part.owner is not None:
            request = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs, part.register)
            requests.keep(client.unknown, part.xid, (part.owner.node, request))


def outcome(client: ClientState, xid: Xid, until_ms: int) -> Flow[Outcome]:
    """Learn how *xid* ended, from its database if this process committed it alone, else from its coordinator (rules 12, 21)."""
    with client.lock:
        commit = client.local_commits.get(xid)
        node, request = client.unknown.get(xid) or ("", OutcomeRequest(xid, _ANY_EPOCH, 0))
    if commit is not None:
        return (yield from _outcome_here(client, commit, until_ms))
    reply = yield from _ask_everywhere(client, node, request, until_ms)
    if reply is None:
        raise CoordinatorUnavailable(f"the coordinator did not say in time how transaction {xid} ended")
    if reply.outcome is not Outcome.UNKNOWN:
        with client.lock:
            client.unknown.pop(xid, None)
    return reply.outcome


def _ask_everywhere(
    client: ClientState, node: str, request: OutcomeRequest, until_ms: int
) -> Flow[OutcomeReply | None]:
    """Ask coordinator *node*; if that is not known (""), all that can be reached, until one knows."""
    with client.lock:
        known = [name for name, each in client.coordinators.items() if each.session is not None]
    reply = None
    for each in [node] if node else known or [""]:
        answer = yield from _ask_outcome(client, each, request, until_ms)
        if answer is None or answer.outcome is not Outcome.UNKNOWN:
            return answer
        reply = answer
    return reply
