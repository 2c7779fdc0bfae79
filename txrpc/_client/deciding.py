"""How a root commits a transaction that one of its own resources decides.

How to think of it
    The right to decide is the root's, and stays there.  It sees to it that all other branches have voted: what was told in
    advance that its call was the last has, branches of this process are asked here, and for the others a coordinator collects the
    votes.  Then the deciding resource commits its own work together with the decision, in one transaction of its database.

    If the resource is another process's, and no last call was told to decide (`txrpc._client.deciding_call`), the root gives the
    right to decide to its coordinator, with the commit request: that collects the votes, and has the resource decide, once.

    Until that begins the root may abort without a write.  From then on only the register says how the transaction ends, and
    what it has said is true whatever becomes of this process: the second phase is driven by any coordinator.
"""

from __future__ import annotations

import logging

from txrpc._client import branches, requests
from txrpc._client.coordinators import live
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.reasons import reason_of
from txrpc._client.requests import Ended
from txrpc._client.state import ClientState
from txrpc._protocol.deciding import Votes
from txrpc._protocol.messages import BranchRef, Outcome, OutcomeReply, OutcomeRequest, Vote, Wait
from txrpc._protocol.participant.branch import Deciding
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, CoordinatorUnavailable, LimitExceeded, Reason, TxrpcError
from txrpc.ids import BranchId

__all__ = ["commit", "elsewhere", "join", "second_phase"]

logger = logging.getLogger("txrpc.client")


def _mine(client: ClientState, part: LocalTransaction) -> BranchRef | None:
    me, name = client.participant_id, part.decides_in
    return next((ref for ref in part.refs if (ref.participant, ref.resource) == (me, name)), None)


def elsewhere(part: LocalTransaction) -> BranchId | None:
    """Return the branch of another process that decides, with its work; None if its resource was not used, or has voted."""
    return next((ref.branch for ref in part.refs if ref.resource == part.decides_in and ref.vote is None), None)


def join(client: ClientState, part: LocalTransaction) -> Flow[None]:
    """Open the branch that decides, if there is none: its work is then the decision alone."""
    if not part.refs or part.doom is not None or _mine(client, part) is not None:
        return
    try:
        branch = yield from branches.enter(client, part, client.resources[part.decides_in], False)
        branches.leave(client, branch)
    except TxrpcError as error:
        part.set_doom(reason_of(error))


def commit(client: ClientState, part: LocalTransaction, wait: Wait) -> Flow[Ended | Reason]:
    """Commit, and return what is true then; or the reason why the root gives up, with nothing decided."""
    yield from branches.vote_early(client, part, besides=part.decides_in)
    reason, mine = part.doom or part.miscounted(), _mine(client, part)
    if reason is not None or mine is None:
        return reason or Reason(AbortCode.UNSPECIFIED, "the deciding branch is gone")
    prepared = yield from _all_voted(client, part, mine)
    if isinstance(prepared, Reason):
        return prepared
    # Alone it needs no row.  With others it always has one, because a question about them would claim it.
    order = Deciding(mine.calls, prepared) if len(part.refs) > 1 else mine.calls
    outcome, reason = yield from requests.commit_here(client, part, mine, order)
    if outcome is Outcome.ABORTED:
        return reason or Reason(AbortCode.UNSPECIFIED)
    if outcome is Outcome.COMMITTED:
        part.pending = tuple(sorted({each.resource for each in prepared}))
        if prepared and wait is Wait.ACKNOWLEDGED:
            yield from second_phase(client, part)
    return outcome, reason


def _all_voted(
    client: ClientState, part: LocalTransaction, mine: BranchRef
) -> Flow[tuple[PreparedBranch, ...] | Reason]:
    """Return the branches that must be told; have those asked that have not voted."""
    others = tuple(ref for ref in part.refs if ref.branch != mine.branch and ref.vote is not Vote.READ_ONLY)
    if all(ref.vote is Vote.PREPARED for ref in others):
        return tuple(ref.prepared for ref in others)
    client.polling.add(part.xid)
    try:
        return (yield from _poll(client, part, others))
    finally:
        client.polling.discard(part.xid)


def _poll(
    client: ClientState, part: LocalTransaction, others: tuple[BranchRef, ...]
) -> Flow[tuple[PreparedBranch, ...] | Reason]:
    """Have a coordinator collect the votes."""
    future = yield from requests.send_commit(client, part, others, Wait.DECISION)
    if isinstance(future, Reason):
        return future
    try:
        left_s = max(0, part.deadline_ms - client.now_ms()) / 1000
        reply: Votes | OutcomeReply = yield client.runtime.wait, (future, left_s)
    except TimeoutError:
        return Reason(AbortCode.TIMED_OUT, "the coordinator has not told the votes before the transaction's deadline")
    except CoordinatorUnavailable as error:
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
    if isinstance(reply, Votes):
        return reply.branches
    return reply.reason or Reason(AbortCode.UNSPECIFIED, "the coordinator has not collected the votes")


def second_phase(client: ClientState, part: LocalTransaction) -> Flow[None]:
    """Wait until every branch has committed, as far as that can be waited for: the outcome is certain."""
    known = live(client, "")
    if known is None:
        return
    request = OutcomeRequest(part.xid, known.owner.epoch, part.begun_tick, part.refs, part.register)
    try:
        future = requests.post(client, known.owner.node, request)
        reply: OutcomeReply = yield client.runtime.wait, (future, client.commit_timeout_ms / 1000)
    except (TimeoutError, CoordinatorUnavailable, LimitExceeded) as error:
        logger.debug("the second phase of %s goes on: %s", part.xid, error)
        return
    if reply.outcome is Outcome.COMMITTED:
        part.pending, part.heuristic = reply.pending, reply.heuristic
