"""What a root asks of the coordinator, and of its own branches, when its transaction ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from txrpc._client import completion
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction, Status
from txrpc._client.state import ClientState
from txrpc._protocol.messages import (
    BranchRef,
    Outcome,
    OutcomeRequest,
)
from txrpc._protocol.participant.branch import BranchInput, BranchState
from txrpc.errors import (
    AbortCode,
    CoordinatorUnavailable,
    Reason,
    TxrpcError,
)
from txrpc.ids import BranchId, Epoch, Xid

__all__ = ["Asking", "keep", "reason_for"]

_MAX_UNKNOWN = 10_000
_ANY_EPOCH = Epoch(0)
"""In a question about a transaction that this process knows nothing of but its XID."""


class Asking(ClientState):
    """`txrpc._client.completion.Ending` but for what waits, which a client adds."""

    ask: Callable[..., Any]
    wait: Callable[[Any, float], Any]
    pause: Callable[[float], Any]
    reconnect: Callable[[float], Any]

    def post(self, node: str, message: Any) -> Any:
        """See `txrpc._client.completion.Ending`."""
        with self._lock:
            token = self._tokens.get(message.xid)
            if token and isinstance(message, OutcomeRequest) and len(message.branches) == 1:
                message = replace(message, branches=(replace(message.branches[0], token=token),))
            future = self._future()
            self._send(node, message)
            self._asking.setdefault(message.xid, []).append(future)
        return future

    def end_here(self, ref: BranchRef, reason: Reason | None) -> Any:
        """See `txrpc._client.completion.Ending`."""
        kind = BranchInput.LOCAL_COMMIT if reason is None else BranchInput.LOCAL_ROLLBACK
        detail = ref.calls if reason is None else reason
        branch = ref.branch
        with self._lock:
            future = self._ending.setdefault(branch, self._future())
            if branch not in self._table.rows:
                del self._ending[branch]
                gone = Reason(AbortCode.TIMED_OUT, "the branch was rolled back long ago")
                self._settle(future, (Outcome.ABORTED, gone))
            self._apply(self._table.step(kind, branch, self.now_ms(), detail))
            return future

    def runs(self, branch: BranchId) -> bool:
        """See `txrpc._client.completion.Ending`."""
        with self._lock:
            row = self._table.rows.get(branch)
            return row is not None and row.state is not BranchState.ENDED

    def ended(self, part: LocalTransaction) -> None:
        """A root's transaction has ended; if its end is not known, keep what it takes to ask."""
        if part.status is not Status.UNKNOWN:
            return
        ref = completion.only_here(self, part.refs)
        with self._lock:
            if ref is not None:
                row = self._table.rows.get(ref.branch)
                result = row.outcome if row is not None and row.state is BranchState.ENDED else None
                token = row.token if row is not None else ""
                keep(
                    self._local,
                    part.xid,
                    completion.LocalCommit(self.resources[ref.resource], ref.branch, token, result),
                )
            elif part.owner is not None:
                keep(
                    self._unknown,
                    part.xid,
                    (part.owner.node, OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs)),
                )

    def outcome_flow(self, xid: Xid, until_ms: int) -> Flow[Outcome]:
        """`Client.outcome` and `AsyncClient.outcome`."""
        with self._lock:
            commit = self._local.get(xid)
            node, request = self._unknown.get(xid) or ("", OutcomeRequest(xid, _ANY_EPOCH, 0))
        if commit is not None:
            outcome = yield from completion.outcome_here(self, commit, until_ms)
            return outcome
        reply = yield from completion.ask_outcome(self, node, request, until_ms)
        if reply is None:
            raise CoordinatorUnavailable(f"the coordinator did not say in time how transaction {xid} ended")
        if reply.outcome is not Outcome.UNKNOWN:
            with self._lock:
                self._unknown.pop(xid, None)
        return reply.outcome


def keep(kept: dict[Xid, Any], xid: Xid, what: Any) -> None:
    """Keep *what*, and let the oldest go if there is too much."""
    while len(kept) >= _MAX_UNKNOWN:
        del kept[next(iter(kept))]
    kept[xid] = what


def reason_for(error: BaseException) -> Reason:
    """The reason of a txrpc error that carries one; else that the application failed."""
    reason = getattr(error, "reason", None)
    if isinstance(error, TxrpcError) and isinstance(reason, Reason):
        return reason
    if isinstance(error, CoordinatorUnavailable):
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
    return Reason(AbortCode.APPLICATION_ERROR, f"{type(error).__name__}: {error}"[:300])
