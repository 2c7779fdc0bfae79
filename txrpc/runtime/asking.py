"""What a root asks of the coordinator, and of its own branches, when its transaction ends."""

from __future__ import annotations

from typing import Any

from txrpc.errors import (
    AbortCode,
    CoordinatorUnavailable,
    Reason,
    TxrpcError,
)
from txrpc.flows.part import Part, Status
from txrpc.ids import Epoch, Xid
from txrpc.protocol.branch import BranchInput
from txrpc.protocol.messages import (
    BranchRef,
    OnePhaseResult,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
)
from txrpc.runtime.state import ManagerState

__all__ = ["Asking", "reason_for"]

_MAX_UNKNOWN = 10_000
_ANY_EPOCH = Epoch(0)
"""In a question about a transaction that this process knows nothing of but its XID."""


class Asking(ManagerState):
    """`txrpc.flows.ending.Ending` for both colours, but for what waits."""

    def post(self, message: Any) -> Any:
        """See `txrpc.flows.ending.Ending`."""
        with self._lock:
            future = self._future()
            self._send(message)
            self._asking.setdefault(message.xid, []).append(future)
        return future

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


def reason_for(error: BaseException) -> Reason:
    """The reason of a txrpc error that carries one; else that the application failed."""
    reason = getattr(error, "reason", None)
    if isinstance(error, TxrpcError) and isinstance(reason, Reason):
        return reason
    if isinstance(error, CoordinatorUnavailable):
        return Reason(AbortCode.COORDINATOR_UNAVAILABLE, str(error))
    return Reason(AbortCode.APPLICATION_ERROR, f"{type(error).__name__}: {error}"[:300])
