"""What a root asks of the coordinator, and of its own branches, when its transaction ends; and what it keeps to ask again."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

from txrpc._client import effects
from txrpc._client.state import ClientState
from txrpc._protocol.messages import BranchRef, CommitRequest, Outcome, OutcomeReply, OutcomeRequest
from txrpc._protocol.participant.branch import BranchInput, BranchState, Do
from txrpc.errors import AbortCode, CoordinatorUnavailable, Reason
from txrpc.ids import BranchId

__all__ = ["commit_here", "fail_all", "keep", "post", "replied", "rollback_here", "runs"]

_K = TypeVar("_K")
_V = TypeVar("_V")
_MAX_KEPT = 10_000


def post(client: ClientState, node: str, request: CommitRequest | OutcomeRequest) -> Any:
    """Send coordinator *node* a request, and return a future of its `OutcomeReply`.

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


def replied(client: ClientState, node: str, reply: OutcomeReply) -> None:
    """Settle the futures that wait for *reply* of coordinator *node*.  Called under the lock."""
    if reply.outcome is not Outcome.UNKNOWN:
        client.tokens.pop(reply.xid, None)
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


def commit_here(client: ClientState, ref: BranchRef) -> tuple[Any, list[Do]]:
    """Begin to commit a branch of this process in one phase.

    Returns a future of (outcome, reason), and the operation that the caller must carry out for that, if there is one.
    """
    here: list[Do] = []
    return _end_here(client, ref.branch, BranchInput.LOCAL_COMMIT, ref.calls, here), here


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
