"""One block of work on one branch: taking the turn, opening the branch on first use, giving the turn back."""

from __future__ import annotations

from typing import Any, Protocol

from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._protocol.participant.branch import BranchState, ParticipantBranch
from txrpc.errors import AbortCode, Reason, TransactionAborted, aborted
from txrpc.resource import Work

__all__ = ["Branches", "OpenBranch", "enter", "failed", "leave"]


class OpenBranch:
    """What a process holds of one branch beside its row: the work, and whose turn it is."""

    __slots__ = ("gone", "resource", "row", "turn", "work")

    def __init__(self, row: ParticipantBranch, resource: Any, turn: Any) -> None:
        self.row = row
        self.resource = resource
        self.turn = turn
        """``acquire(timeout_s)``, which blocks or is awaited, and ``release()``; re-entered by the thread or task that has it."""
        self.work: Work = None
        self.gone = False
        """The resource could not begin: whoever waited for the turn starts again."""


class Branches(Protocol):
    """What using a branch needs from its manager; every method is atomic."""

    def now_ms(self) -> int:
        """Monotonic."""

    def slot(self, part: LocalTransaction, resource: Any) -> OpenBranch:
        """The slot of *part*'s transaction in *resource*, made if there is none.  Raises if the branch has ended."""

    def began(self, slot: OpenBranch, work: Work) -> None:
        """The resource has begun *work*."""

    def could_not_begin(self, slot: OpenBranch) -> None:
        """The resource did not begin: take the slot back."""

    def user_enters(self, slot: OpenBranch, part: LocalTransaction) -> None:
        """Count a user of the work; raises `TransactionAborted` if the branch ended while waiting for the turn."""

    def first_use(self, slot: OpenBranch, part: LocalTransaction, joined: bool) -> None:
        """The work is there: from now on *part* lists the branch."""

    def user_leaves(self, slot: OpenBranch) -> None:
        """Take the user back; the last one out of a branch that is rolling back lets that happen."""


def enter(manager: Branches, part: LocalTransaction, resource: Any, joined: bool) -> Flow[OpenBranch]:
    """Take the turn on the branch of *part* in *resource*; `leave` gives it back."""
    while True:
        part.check_usable(manager.now_ms())
        slot = manager.slot(part, resource)
        left_s = (part.deadline_ms - manager.now_ms()) / 1000
        if not (yield slot.turn.acquire, (left_s,)):
            text = f"another call of the transaction did not finish with {resource.name} in time"
            part.set_doom(Reason(AbortCode.TIMED_OUT, text))
            part.check_usable(manager.now_ms())
        if slot.gone:
            slot.turn.release()
            continue
        try:
            manager.user_enters(slot, part)
        except TransactionAborted:
            slot.turn.release()
            raise
        if slot.work is None:
            yield from _begin(manager, slot, part)
        manager.first_use(slot, part, joined)
        return slot


def _begin(manager: Branches, slot: OpenBranch, part: LocalTransaction) -> Flow[None]:
    begun = False
    left_s = max(0.0, (part.deadline_ms - manager.now_ms()) / 1000)
    try:
        manager.began(slot, (yield slot.resource.begin, (part.read_only, left_s)))
        begun = True
    finally:
        if not begun:
            manager.could_not_begin(slot)
            slot.turn.release()
    if slot.row.state is not BranchState.ACTIVE:
        leave(manager, slot)
        raise aborted(part.xid, slot.row.doom or Reason(AbortCode.TIMED_OUT))


def leave(manager: Branches, slot: OpenBranch) -> None:
    """Give the turn back."""
    manager.user_leaves(slot)
    slot.turn.release()


def failed(part: LocalTransaction, slot: OpenBranch, error: BaseException) -> TransactionAborted | None:
    """*error* leaves the block: doom the transaction if the resource calls it its own.

    Returns what to raise instead, when the error is only the echo of the branch having been ended under the block's feet.
    """
    reason: Reason | None = slot.resource.classify(error)
    if reason is None:
        return None
    row = slot.row
    if row.state is not BranchState.ACTIVE and row.doom is not None:
        part.set_doom(row.doom)
        return aborted(part.xid, row.doom)
    row.doom = row.doom or reason
    part.set_doom(reason)
    return None
