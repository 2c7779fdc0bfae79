"""The transaction objects that users see: what is the same in synchronous and in asyncio programs.

A nested block has the same object as the block around it; what a block says about errors is in the context beside it.
"""

from __future__ import annotations

import asyncio
import logging
import threading

from txrpc._client import branches, deciding_call, effects
from txrpc._client.completion import cancel_calls
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import Hook, LocalTransaction, OutgoingCall, Status, TransactionEvent
from txrpc._client.reasons import reason_of
from txrpc._client.rollback_rules import RollbackRules, kinds_of
from txrpc._client.state import ClientState
from txrpc._context import current, current_decides, current_is_final, current_reads_only, current_rules
from txrpc._protocol.messages import CallReport, Outcome, RollbackRequest, TransactionContext
from txrpc.errors import AbortCode, CoordinatorUnavailable, Reason, TxrpcError, UsageError
from txrpc.ids import Xid

__all__ = ["JoinedTransactionBase", "RootTransactionBase", "Transaction", "log_hook_error"]

logger = logging.getLogger("txrpc.client")


def _running() -> object:
    """Return the task that runs, or the number of the thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return threading.get_ident()


class Transaction:
    """A transaction as the code inside it sees it.  Safe to use from several threads or tasks.

    Only the object of its root can end it: see `RootTransaction`.
    """

    joined = False

    def __init__(self, client: ClientState, part: LocalTransaction, rules: RollbackRules) -> None:
        self._client = client
        self._part = part
        self._rules = rules
        self._home = _running()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.xid} {self.status.value}>"

    @property
    def xid(self) -> Xid:
        """The transaction's identifier."""
        return self._part.xid

    @property
    def status(self) -> Status:
        """Return how it stands, as this process sees it."""
        if self._part.status is Status.ACTIVE and self._part.doom is not None:
            return Status.ROLLBACK_ONLY
        return self._part.status

    @property
    def read_only(self) -> bool:
        """True if the running code may only read: its transaction, its call or a block around it is ``read_only``."""
        mine = current() is self and current_reads_only()
        return mine or self._part.read_only or self._part.call_reads_only

    @property
    def doom(self) -> Reason | None:
        """Return why the transaction can only roll back, or None."""
        return self._part.doom

    @property
    def time_left_s(self) -> float:
        """Seconds until the deadline, 0 when it has passed."""
        return max(0, self._part.deadline_ms - self._client.now_ms()) / 1000

    @property
    def ended(self) -> bool:
        """Return whether it has begun to end here."""
        return self._part.status is not Status.ACTIVE

    def _began_inside(self, outer: Transaction) -> None:
        """Note that this transaction, one of its own (`REQUIRES_NEW`), began inside *outer*.

        The code of *outer* waits for its end if both are one thread's or task's; otherwise nothing is known of that.
        """
        if self._home == outer._home:
            self._part.around = (outer._part.xid, *outer._part.around)

    def set_rollback_only(self, reason: Reason | str | None = None) -> None:
        """Doom the transaction: it can only roll back, everywhere.  The code may run on."""
        if not isinstance(reason, Reason):
            reason = Reason(AbortCode.REQUESTED, reason or "set_rollback_only() was called")
        self._part.set_doom(reason)

    def before_commit(self, hook: Hook) -> None:
        """Call *hook* when commit is asked for, inside the transaction: it may use resources and make calls.

        What it raises rolls the transaction back, and leaves `commit` or the block.  Hooks run in the order of registration, also
        those that a hook registers; none of them if the transaction can only roll back.  A hook takes a `TransactionEvent`; in
        an asyncio program it may be a coroutine function.

        Raises `UsageError` if the transaction is ending, and in a service method that joined it: only its root commits.
        """
        self._check_root("before_commit")
        if self._part.status is not Status.ACTIVE:
            raise UsageError(f"transaction {self.xid} is ending already: {self._part.status.value}")
        self._part.hooks.before_commit.append(hook)

    def after_commit(self, hook: Hook) -> None:
        """Call *hook* once the transaction has committed: see `after_completion`."""
        self._register("after_commit", Outcome.COMMITTED, hook)

    def after_rollback(self, hook: Hook) -> None:
        """Call *hook* once the transaction has rolled back: see `after_completion`."""
        self._register("after_rollback", Outcome.ABORTED, hook)

    def after_completion(self, hook: Hook) -> None:
        """Call *hook* once the transaction has ended, also if its outcome is not known, in the order of registration.

        It takes a `TransactionEvent`, and runs outside of any transaction, in the thread or task that ended this one.  What it
        raises is logged and changes nothing.  It does not run if the process dies: what must happen belongs into the transaction.

        Raises `UsageError` if the transaction has ended already, and in a service method that joined it: only its root learns
        how it ends.
        """
        self._register("after_completion", None, hook)

    def _register(self, name: str, outcome: Outcome | None, hook: Hook) -> None:
        self._check_root(name)
        if self._part.status not in (Status.ACTIVE, Status.COMMITTING):
            raise UsageError(f"transaction {self.xid} has ended already: {self._part.status.value}")
        self._part.hooks.after.append((outcome, hook))

    def _check_root(self, name: str) -> None:
        if self.joined:
            raise UsageError(f"only the root of a transaction ends it, and learns how it ended: call {name}() there")

    def outgoing(self) -> OutgoingCall:
        """Register a call that is about to be sent.  See `txrpc._grpc.ports.Handle`."""
        now_ms = self._client.now_ms()
        self._part.check_usable(now_ms)
        if self._part.owner is None:
            raise CoordinatorUnavailable(
                "the transaction began with no coordinator in reach, so it cannot leave this process: "
                "is the coordinator running at the address given to txrpc.connect()?"
            )
        rules, final = current_rules() or self._rules, current_is_final()
        if current_decides():
            return deciding_call.begin(self._part, rules, self._part.owner, now_ms, self.joined)
        return self._part.call_begins(rules, self._part.owner, now_ms, self.read_only, final)

    def enters_first(self) -> bool:
        """Return whether the scope that is being entered is the outermost one of a joined call."""
        return False

    def scope_failed(self, error: BaseException, rules: RollbackRules, entry: bool) -> None:
        """*error* leaves a nested block with those *rules*; *entry*: the outermost one of a joined call, whose caller decides."""
        kinds = kinds_of(error)
        if rules.requires_rollback(kinds) if entry else rules.rolls_back(kinds):
            self._part.set_doom(reason_of(error))


class JoinedTransactionBase(Transaction):
    """One incoming call's handle."""

    joined = True

    def __init__(self, client: ClientState, part: LocalTransaction, context: TransactionContext) -> None:
        super().__init__(client, part, RollbackRules())
        self._entered = False
        self._failed = False
        self._report: CallReport | None = None
        self.final = context.final
        """Whether the transaction calls this process no more, as the caller or the method says."""
        self._decide = context.decide

    def enters_first(self) -> bool:
        """Return whether the scope that is being entered is the outermost one."""
        first, self._entered = not self._entered, True
        return first

    def failed(self, error: BaseException) -> None:
        """The handler raised *error*; what that means is up to the caller's rule, which sees the status of the reply."""
        self._failed = True
        if isinstance(error, TxrpcError) and not isinstance(error, UsageError):
            reason = reason_of(error)
            if reason.code is not AbortCode.APPLICATION_ERROR:
                self._part.set_doom(reason)

    def _call_ended(self) -> Flow[None]:
        """Close the part and count the call; then the branches of this process vote, or decide, if that is asked for now."""
        self._part.close(Status.COMMITTING)
        branches.call_ended(self._client, self._part)
        if self._failed or self._part.doom is not None:
            return
        if self._decide is not None:
            yield from deciding_call.decide(self._client, self._part, self._decide)
        elif self.final:
            yield from branches.vote_early(self._client, self._part)

    def _leave(self) -> CallReport:
        """Say what the reply carries home."""
        self._report = self._part.report()
        if self._part.in_flight:
            self._abandon()
        return self._report

    def _abandon(self) -> None:
        """Calls of this handler are still running: its transaction can only roll back, and their branches will not be reported."""
        part = self._part
        cancel_calls(part)
        if part.owner is not None and part.doom is not None:
            request = RollbackRequest(
                part.xid, part.owner.epoch, part.begun_tick, part.refs, part.doom, everywhere=True
            )
            effects.tell(self._client, part.owner.node, request)


class RootTransactionBase(Transaction):
    """A root's handle: the only one that can end the transaction."""

    @property
    def pending(self) -> tuple[str, ...]:
        """After a commit: resources that have not acknowledged the decision yet (they will)."""
        return self._part.pending

    def _event(self) -> TransactionEvent:
        outcome = _OUTCOMES.get(self._part.status, Outcome.UNKNOWN)
        reason = None if outcome is Outcome.COMMITTED else self._part.doom
        return TransactionEvent(self.xid, outcome, reason, self._part.pending)


_OUTCOMES = {Status.COMMITTED: Outcome.COMMITTED, Status.ROLLED_BACK: Outcome.ABORTED}


def log_hook_error(xid: Xid, error: Exception) -> None:
    """Log that a hook raised after the end, where it can change nothing."""
    logger.error("a hook failed after the end of transaction %s", xid, exc_info=error)
