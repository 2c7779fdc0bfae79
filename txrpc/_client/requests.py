"""What a root asks of the coordinator, and of its own branches, when its transaction ends; and what it keeps to ask again."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

from txrpc._client import effects
from txrpc._client.coordinators import all_over
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.state import ClientState
from txrpc._protocol.deciding import Votes
from txrpc._protocol.messages import BranchRef, CommitRequest, Outcome, OutcomeReply, OutcomeRequest, Owner, Wait
from txrpc._protocol.participant.branch import BranchInput, BranchState, Deciding, Do
from txrpc.errors import AbortCode, ConfigurationError, CoordinatorUnavailable, LimitExceeded, Reason
from txrpc.ids import BranchId

__all__ = [
    "PAUSE_S",
    "Ended",
    "commit_here",
    "fail_all",
    "keep",
    "post",
    "replied",
    "rollback_here",
    "runs",
    "send_commit",
]

Ended = tuple[Outcome, Reason | None]

PAUSE_S = 0.05
"""Seconds between two tries to reach a coordinator that is away, or to learn how a commit has ended."""

_K = TypeVar("_K")
_V = TypeVar("_V")
_MAX_KEPT = 10_000


def post(client: ClientState, node: str, request: CommitRequest | OutcomeRequest) -> Any:
    """Send coordinator *node* a request, and return a future of its `OutcomeReply`, or of `Votes`.

    The future fails with `CoordinatorUnavailable` if the session ends.  Raises the same when there is none: nothing was sent.
    """
    with client.lock:
        token = client.tokens.get(request.xid)
        if token and isinstance(request, OutcomeRequest) and len(request.branches) == 1:
            request = replace(request, branches=(replace(request.branches[0], token=token),))
        future = client.runtime.future()
        effects.send(client, node, request)
        client.requests.setdefault((node, request.xid), []).append(future)
    return future


def replied(client: ClientState, node: str, reply: OutcomeReply | Votes) -> None:
    """Settle the futures that wait for *reply* of coordinator *node*.  Called under the lock."""
    if isinstance(reply, OutcomeReply) and reply.outcome is not Outcome.UNKNOWN:
        client.tokens.pop(reply.xid, None)
    if isinstance(reply, Votes) and reply.xid not in client.polling:
        return  # to a request of long ago
    for future in client.requests.pop((node, reply.xid), ()):
        client.runtime.settle(future, reply)


def fail_all(client: ClientState, node: str, text: str) -> None:
    """The session with coordinator *node* has ended: no request that was sent will be answered on it."""
    with client.lock:
        lost = [client.requests.pop(key) for key in list(client.requests) if key[0] == node]
    for futures in lost:
        for future in futures:
            error = CoordinatorUnavailable(f"the session with the coordinator broke: {text}")
            client.runtime.settle(future, error)


def commit_here(client: ClientState, part: LocalTransaction, ref: BranchRef, order: int | Deciding) -> Flow[Ended]:
    """Commit a branch of this process in one phase; *order*: the calls that its root saw, or how it decides the transaction."""
    operations: list[Do] = []
    future = _end_here(client, ref.branch, BranchInput.LOCAL_COMMIT, order, operations)
    for do in operations:
        yield client.runtime.operate_here, (do, client.branches.get(ref.branch))
    patience_s = max(0, part.deadline_ms - client.now_ms() + client.commit_timeout_ms) / 1000
    try:
        result, reason = yield client.runtime.wait, (future, patience_s)
    except TimeoutError:
        text = f"{ref.resource} has not answered COMMIT for {patience_s:.0f} s"
        return Outcome.UNKNOWN, Reason(AbortCode.RESOURCE_UNAVAILABLE, text)
    return result, reason


def send_commit(
    client: ClientState,
    part: LocalTransaction,
    refs: tuple[BranchRef, ...],
    wait: Wait,
    decider: BranchId | None = None,
) -> Flow[Any]:
    """Send the commit request to the owner, waiting for its session while there is time; or return why it was never sent.

    If a resource of another process decides, that gives the owner the right to have it decide, with branch *decider* if there is
    one.
    """
    owner = part.owner
    register = part.register if part.decides_in not in client.resources else None
    if owner is None:
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, "it began with no coordinator in reach")
    while True:
        left_ms = part.deadline_ms - client.now_ms()
        try:
            live: Owner = yield client.runtime.reconnect, (owner.node, max(0, left_ms) / 1000)
            if live != owner and part.register is None:
                text = f"it began under epoch {owner.epoch} of {owner.node}, which is in epoch {live.epoch} now"
                return Reason(AbortCode.COORDINATOR_RESTARTED, text)
            left_ms, epoch, tick = max(0, left_ms), owner.epoch, part.begun_tick
            if register is not None:
                # The right to decide is given to the epoch that is there now: no other one had it.
                epoch, tick = live.epoch, client.coordinators[live.node].tick
            request = CommitRequest(part.xid, epoch, tick, refs, left_ms, wait, register, decider)
            return post(client, owner.node, request)
        except CoordinatorUnavailable as error:
            if client.now_ms() >= part.deadline_ms or all_over(client):
                return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
            yield client.runtime.pause, (PAUSE_S,)
        except (ConfigurationError, LimitExceeded) as error:
            code = AbortCode.LIMIT_EXCEEDED if isinstance(error, LimitExceeded) else AbortCode.COORDINATOR_UNAVAILABLE
            return Reason(code, str(error))


def rollback_here(client: ClientState, ref: BranchRef, reason: Reason) -> Any:
    """Roll a branch of this process back; return a future of (outcome, reason)."""
    return _end_here(client, ref.branch, BranchInput.LOCAL_ROLLBACK, reason, None)


def _end_here(client: ClientState, branch: BranchId, kind: BranchInput, detail: Any, here: list[Do] | None) -> Any:
    with client.lock:
        future = client.local_ends.setdefault(branch, client.runtime.future())
        if branch not in client.participant.rows:
            del client.local_ends[branch]
            gone = Reason(AbortCode.TIMED_OUT, "the branch was rolled back long ago")
            client.runtime.settle(future, (Outcome.ABORTED, gone))
        effects.apply(client, client.participant.step(kind, branch, client.now_ms(), detail), here)
        return future


def runs(client: ClientState, branch: BranchId) -> bool:
    """Return whether a branch of this process has not ended."""
    with client.lock:
        row = client.participant.rows.get(branch)
        return row is not None and row.state is not BranchState.ENDED


def keep(kept: MutableMapping[_K, _V], key: _K, value: _V) -> None:
    """Keep *value*; the oldest go when there are too many."""
    while len(kept) >= _MAX_KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
