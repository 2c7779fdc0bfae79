"""What a transaction's handle is in both colours: the object that `txrpc._context.current` returns.

A handle is a part seen under a rule.  A nested scope is the same part under another rule (`under`), so handles are cheap
copies and whatever must be shared lives in the part.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Self

from txrpc._client.asking import reason_for
from txrpc._client.completion import cancel_calls
from txrpc._client.core import ManagerCore
from txrpc._client.local_transaction import LocalTransaction, OutgoingCall, Status
from txrpc._client.rollback_rules import RollbackRules, kinds_of
from txrpc._protocol.messages import CallReport, Outcome, RollbackRequest
from txrpc.errors import AbortCode, CoordinatorUnavailable, Reason, TxrpcError, UsageError
from txrpc.ids import Xid

__all__ = ["BaseHandle", "JoinedBase", "RootBase", "log_callback_error"]

logger = logging.getLogger("txrpc.client")


class BaseHandle:
    """A transaction as the code inside it sees it.  Safe to use from several threads or tasks."""

    joined = False

    def __init__(self, manager: ManagerCore, part: LocalTransaction, rule: RollbackRules) -> None:
        self._manager = manager
        self._part = part
        self._rule = rule

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.xid} {self.status.value}>"

    @property
    def xid(self) -> Xid:
        """The transaction's identifier."""
        return self._part.xid

    @property
    def status(self) -> Status:
        """How it stands, as this process sees it."""
        if self._part.status is Status.ACTIVE and self._part.doom is not None:
            return Status.ROLLBACK_ONLY
        return self._part.status

    @property
    def doom(self) -> Reason | None:
        """Why the transaction can only roll back, or None."""
        return self._part.doom

    @property
    def time_left_s(self) -> float:
        """Seconds until the deadline, 0 when it has passed."""
        return max(0, self._part.deadline_ms - self._manager.now_ms()) / 1000

    @property
    def ended(self) -> bool:
        """Whether it has begun to end here."""
        return self._part.status is not Status.ACTIVE

    def set_rollback_only(self, reason: Reason | str | None = None) -> None:
        """Doom the transaction: it can only roll back, everywhere.  The code may run on."""
        if not isinstance(reason, Reason):
            reason = Reason(AbortCode.REQUESTED, reason or "set_rollback_only() was called")
        self._part.set_doom(reason)

    def outgoing(self) -> OutgoingCall:
        """Register a call that is about to be sent.  See `txrpc._grpc.ports.Handle`."""
        now_ms = self._manager.now_ms()
        self._part.check_usable(now_ms)
        if self._part.owner is None:
            raise CoordinatorUnavailable(
                "the transaction began with no coordinator in reach, so it cannot leave this process: "
                "is the coordinator running at the address given to txrpc.connect()?"
            )
        return self._part.call_begins(self._rule, self._part.owner, now_ms)

    def under(self, rule: RollbackRules) -> Self:
        """The same transaction under another rule."""
        other = copy.copy(self)
        other._rule = rule
        return other

    def enters_first(self) -> bool:
        """Whether the scope that is being entered is the outermost one of a joined call."""
        return False

    def scope_failed(self, error: BaseException, entry: bool) -> None:
        """*error* leaves a nested scope; *entry*: the outermost one of a joined call, whose caller's rule has the last word."""
        kinds = kinds_of(error)
        rolls_back = self._rule.requires_rollback(kinds) if entry else self._rule.rolls_back(kinds)
        if rolls_back:
            self._part.set_doom(reason_for(error))


class JoinedBase(BaseHandle):
    """One incoming call's handle."""

    joined = True

    def __init__(self, manager: ManagerCore, part: LocalTransaction) -> None:
        super().__init__(manager, part, RollbackRules())
        # Shared by the copies that `under` makes.
        self._entered: list[bool] = []
        self._report: CallReport | None = None

    def enters_first(self) -> bool:
        """Whether the scope that is being entered is the outermost one."""
        self._entered.append(True)
        return len(self._entered) == 1

    def failed(self, error: BaseException) -> None:
        """The handler raised *error*; what that means is up to the caller's rule, which sees the status of the reply."""
        if isinstance(error, TxrpcError) and not isinstance(error, UsageError):
            reason = reason_for(error)
            if reason.code is not AbortCode.APPLICATION_ERROR:
                self._part.set_doom(reason)

    def _leave(self) -> CallReport:
        """Close the part and count the call; once."""
        if self._report is None:
            self._part.close(Status.COMMITTING)
            self._manager.left(self._part)
            self._report = self._part.report()
            if self._part.in_flight:
                self._abandon()
        return self._report

    def _abandon(self) -> None:
        """Calls of this handler are still running: its transaction can only roll back, and nobody will know their branches."""
        part = self._part
        cancel_calls(part)
        if part.owner is not None and part.doom is not None:
            request = RollbackRequest(
                part.xid, part.owner.epoch, part.begun_tick, part.refs, part.doom, everywhere=True
            )
            self._manager.tell(part.owner.node, request)


class RootBase(BaseHandle):
    """A root's handle: the only one that can end the transaction."""

    @property
    def pending(self) -> tuple[str, ...]:
        """After a commit: resources that have not acknowledged the decision yet (they will)."""
        return self._part.pending

    def after_completion(self, callback: Callable[[Outcome], Any]) -> None:
        """Call *callback* with the `Outcome` once the transaction has ended, in the order of registration.

        Its exceptions are logged and change nothing.  Raises `UsageError` if the transaction has ended already.
        """
        if self._part.status not in (Status.ACTIVE, Status.COMMITTING):
            raise UsageError(f"transaction {self.xid} has ended already: {self._part.status.value}")
        self._part.callbacks.append(callback)

    def _outcome(self) -> Outcome:
        return _OUTCOMES.get(self._part.status, Outcome.UNKNOWN)


_OUTCOMES = {Status.COMMITTED: Outcome.COMMITTED, Status.ROLLED_BACK: Outcome.ABORTED}


def log_callback_error(xid: Xid, error: Exception) -> None:
    """An after-completion callback raised."""
    logger.error("an after-completion callback of transaction %s failed", xid, exc_info=error)
