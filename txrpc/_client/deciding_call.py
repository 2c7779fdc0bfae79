"""The last call of a transaction, which decides it: what the root and the called service do about it.

How to think of it
    The root has every vote but one.  With its last call it gives away what it has decided with until then: the right to say how
    the transaction ends.  The service commits that call's work together with the decision, in one transaction of its database,
    before it replies.  If the reply does not say so, or does not come, only the register knows, and is asked: it is claimed.
"""

from __future__ import annotations

from txrpc._client import requests
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction, OutgoingCall
from txrpc._client.rollback_rules import RollbackRules
from txrpc._client.state import ClientState
from txrpc._protocol.messages import BranchRef, Outcome, Owner, Vote
from txrpc._protocol.participant.branch import Deciding
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason, UsageError

__all__ = ["begin", "decide"]


def begin(part: LocalTransaction, rule: RollbackRules, owner: Owner, now_ms: int, joined: bool) -> OutgoingCall:
    """Register the call.  Raises `UsageError` if it is too early, or not for this code to make it."""
    refs = part.refs
    missing = sorted({ref.resource for ref in refs if ref.vote is None})
    if joined:
        raise UsageError(
            "final_call(decides=True) is for the root of a transaction: only it knows that no call follows"
        )
    if not part.decides_in:
        raise UsageError(
            "final_call(decides=True) needs a transaction(decide_in=...) with the resource of the service that decides"
        )
    if any(ref.resource == part.decides_in for ref in refs):
        raise UsageError(f"the call that decides must be the only one to {part.decides_in} in its transaction")
    if missing:
        raise UsageError(
            f"{', '.join(missing)} cannot have voted before the call that decides: make the calls before it in final_call(), and "
            "let a resource of this process itself decide where one is used"
        )
    if part.hooks.before_commit:
        raise UsageError("a before_commit hook would run after the call that decides, when no work can follow")
    if part.calls_out:
        raise UsageError("a call of the transaction has not returned yet: the one that decides is its last")
    if (reason := part.miscounted()) is not None:
        part.set_doom(reason)
        part.check_usable(now_ms)
    prepared = tuple(ref.prepared for ref in refs if ref.vote is Vote.PREPARED)
    return part.call_begins(rule, owner, now_ms, decide=prepared)


def decide(client: ClientState, part: LocalTransaction, others: tuple[PreparedBranch, ...]) -> Flow[None]:
    """The call has ended well: commit what it has done here, with the decision.  *others*: the branches that are prepared.

    Whatever else comes of it is a doomed transaction, and no decision: the root has that claimed.
    """
    mine = _only_branch(client, part)
    if mine is None:
        text = "the call that was to decide has not used the database that decides, or not that alone"
        part.set_doom(Reason(AbortCode.PROTOCOL_VIOLATION, text))
        return
    # One call, which is this one: work of another that ran meanwhile is not what the root has seen (rule 9).
    outcome, reason = yield from requests.commit_here(client, part, mine, Deciding(1, others))
    if outcome is Outcome.COMMITTED:
        part.committed_there = True
    else:
        part.set_doom(reason or Reason(AbortCode.UNSPECIFIED, "the database that decides has not committed"))


def _only_branch(client: ClientState, part: LocalTransaction) -> BranchRef | None:
    refs, register = part.refs, part.register
    if len(refs) != 1 or refs[0].participant != client.participant_id or register is None:
        return None
    known = client.starting.register(refs[0].resource)
    return refs[0] if known is not None and known.table == register.table else None
