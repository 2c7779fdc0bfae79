"""The branches of this process as its own code uses them: opened on first use, counted, given back."""

from __future__ import annotations

from typing import Any

from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.state import ClientState
from txrpc._client.using import OpenBranch
from txrpc._protocol.messages import (
    BranchRef,
    Owner,
)
from txrpc._protocol.participant.branch import BranchInput, BranchState
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    LimitExceeded,
    Reason,
    ResourceUnavailable,
    aborted,
)
from txrpc.ids import BranchId, Epoch, Gid

__all__ = ["NOBODY", "Branches"]

_MAX_BRANCHES = 10_000
NOBODY = Owner("none", Epoch.make(1, 0))
"""Owner of a transaction that began with no coordinator in reach: its one branch is never prepared, only committed in one phase."""


class Branches(ClientState):
    """`txrpc._client.using.Branches` for both clients."""

    def slot(self, part: LocalTransaction, resource: Any) -> OpenBranch:
        """See `txrpc._client.using.Branches`."""
        name: str = resource.name
        known: Any = self.resources.get(name)
        if known is not resource:
            raise ConfigurationError(
                f"resource {name!r} is not one that this manager was connected with: connect(resources=[...])"
            )
        if trouble := self._starting.trouble(name):
            raise ResourceUnavailable(f"resource {name!r} of this process is not ready: {trouble}")
        with self._lock:
            row = self._table.state.find(part.xid, resource.name)
            if row is not None:
                slot = self._slots.get(row.branch)
                if row.state is not BranchState.ACTIVE or slot is None:
                    raise aborted(part.xid, row.doom or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))
                return slot
            return self._open(part, resource)

    def _open(self, part: LocalTransaction, resource: Any) -> OpenBranch:
        if self._table.state.is_closed(part.xid):
            raise aborted(part.xid, Reason(AbortCode.BRANCH_UNKNOWN, "the transaction has ended here"))
        if len(self._slots) >= _MAX_BRANCHES:
            raise LimitExceeded(f"this process has {_MAX_BRANCHES} open branches")
        owner = part.owner
        if owner is None:
            if part.refs:
                raise CoordinatorUnavailable(
                    "the transaction began with no coordinator in reach, so it can use one resource of this process only"
                )
            owner = NOBODY
        branch = BranchId(self.entropy(8))
        gid = Gid(self.group, owner.node, owner.epoch, part.xid, branch, self.participant_id, resource.name)
        slot = OpenBranch(self._table.open(gid, part.deadline_ms), resource, self._turn())
        self._slots[branch] = slot
        self._wake()
        return slot

    def began(self, slot: OpenBranch, work: Any) -> None:
        """See `txrpc._client.using.Branches`."""
        with self._lock:
            slot.work = work

    def could_not_begin(self, slot: OpenBranch) -> None:
        """See `txrpc._client.using.Branches`."""
        with self._lock:
            slot.row.users -= 1
            slot.gone = True
            if slot.row.state is BranchState.ACTIVE:
                del self._slots[slot.row.branch]
                self._table.discard(slot.row)
            else:
                self._apply(self._table.step(BranchInput.RELEASED, slot.row.branch, self.now_ms()))

    def user_enters(self, slot: OpenBranch, part: LocalTransaction) -> None:
        """See `txrpc._client.using.Branches`."""
        with self._lock:
            row = slot.row
            if row.state is not BranchState.ACTIVE:
                raise aborted(part.xid, row.doom or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))
            row.users += 1

    def first_use(self, slot: OpenBranch, part: LocalTransaction, joined: bool) -> None:
        """The work is there: from now on *part* lists the branch."""
        row = slot.row
        with self._lock:
            if part.used(BranchRef(row.branch, row.gid.resource, self.participant_id, int(joined))):
                row.running += joined

    def user_leaves(self, slot: OpenBranch) -> None:
        """See `txrpc._client.using.Branches`."""
        with self._lock:
            slot.row.users -= 1
            if not slot.row.users and slot.row.state is BranchState.ROLLING_BACK:
                self._apply(self._table.step(BranchInput.RELEASED, slot.row.branch, self.now_ms()))

    def left(self, part: LocalTransaction) -> None:
        """A joined call of *part* has ended: its branches have one completed call more (rule 9)."""
        with self._lock:
            for branch in part.own:
                row = self._table.rows.get(branch)
                if row is not None:
                    row.running -= 1
                    row.calls += 1
                    row.doom = row.doom or part.doom
