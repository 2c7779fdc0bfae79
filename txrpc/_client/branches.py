"""The branches of this process as its own code uses them: opened on first use, used by one call at a time, counted, given back.

`enter` and `leave` enclose one block of work on one branch.  `enter` is a flow, because it may wait for the branch's lock and for
a connection; everything else happens under the client's lock and does not block.
"""

from __future__ import annotations

from typing import Any

from txrpc._client import effects
from txrpc._client.coordinators import live
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.state import ClientState, OpenBranch
from txrpc._protocol.messages import BranchRef, Owner, Vote
from txrpc._protocol.outcomes import refusal
from txrpc._protocol.participant.branch import BranchInput, BranchState, Do, ParticipantBranch
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    LimitExceeded,
    Reason,
    ResourceUnavailable,
    TxrpcError,
    UsageError,
)
from txrpc.ids import BranchId, Epoch, Gid
from txrpc.resource import AsyncResource, Resource, Work

__all__ = ["NO_COORDINATOR", "call_ended", "enter", "failed", "leave", "vote_early"]

_MAX_BRANCHES = 10_000
_ENDED = Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended")
NO_COORDINATOR = Owner("none", Epoch.make(1, 0))
"""Owner of a transaction that began with no coordinator in reach: its one branch is never prepared, only committed in one phase."""


def enter(
    client: ClientState, part: LocalTransaction, resource: Resource | AsyncResource, joined: bool
) -> Flow[OpenBranch]:
    """Take the lock of *part*'s branch in *resource*, and open the branch if this is its first use; `leave` gives the lock back."""
    while True:
        part.check_usable(client.now_ms())
        if joined:
            _check_accepted(client, part, resource.name)
        branch = _find_or_open(client, part, resource)
        left_s = (part.deadline_ms - client.now_ms()) / 1000
        if not (yield branch.lock.acquire, (left_s,)):
            text = f"the transaction's deadline has passed while another of its calls used {resource.name}"
            part.set_doom(Reason(AbortCode.TIMED_OUT, text))
            part.check_usable(client.now_ms())
        if branch.gone:
            branch.lock.release()
            continue
        try:
            _count_user(client, branch, part)
        except TxrpcError:
            branch.lock.release()
            raise
        if branch.work is None:
            yield from _begin(client, branch, part)
        _note_use(client, branch, part, joined)
        return branch


def leave(client: ClientState, branch: OpenBranch) -> None:
    """Give the lock back; the last user of a branch that is rolling back lets that happen."""
    with client.lock:
        branch.row.users -= 1
        if not branch.row.users and branch.row.state is BranchState.ROLLING_BACK:
            _released(client, branch)
    branch.lock.release()


def failed(part: LocalTransaction, branch: OpenBranch, error: BaseException) -> TxrpcError | None:
    """Doom the transaction if the resource says that *error*, which leaves a block of work, is its own.

    Returns what to raise instead if *error* is only the consequence of the branch having been ended during the block.
    """
    reason: Reason | None = branch.resource.classify(error)
    if reason is None:
        return None
    row = branch.row
    if row.state is not BranchState.ACTIVE and row.doom is not None:
        part.set_doom(row.doom)
        return part.error(row.doom)
    row.doom = row.doom or reason
    part.set_doom(reason)
    return None


def call_ended(client: ClientState, part: LocalTransaction) -> None:
    """A joined call of *part* has ended: its branches have one completed call more (rule 9)."""
    with client.lock:
        for branch in part.own:
            row = client.participant.rows.get(branch)
            if row is not None:
                row.running -= 1
                row.calls += 1
                row.doom = row.doom or part.doom


def vote_early(client: ClientState, part: LocalTransaction, besides: str = "") -> Flow[None]:
    """Prepare what this process has of *part*'s transaction, in the caller's thread; the votes travel with what is said next.

    That is the reply to the last call here, or the root's own commit request.

    What wrote nothing and must be kept, and what another call has voted for, is left as it is; so is resource *besides*.
    """
    with client.lock:
        names = (name for name in client.resources if name != besides)
        found = (client.participant.state.find(part.xid, name) for name in names)
        active = [row for row in found if row is not None and row.state is BranchState.ACTIVE]
        waiting = [_begin_vote(client, row) for row in active]
    for row, _future, operations in waiting:
        for do in operations:
            yield client.runtime.operate_here, (do, client.branches.get(row.branch))
    for row, future, _operations in waiting:
        patience_s = max(0, part.deadline_ms - client.now_ms() + client.commit_timeout_ms) / 1000
        try:
            vote, reason = yield client.runtime.wait, (future, patience_s)
        except TimeoutError:
            text = f"PREPARE was not answered for {patience_s:.0f} s"
            vote, reason = Vote.ABORT, Reason(AbortCode.TIMED_OUT, text)
        if vote is None:
            continue  # it will be asked for
        if vote is Vote.ABORT:
            part.set_doom(refusal(row.gid.resource, reason))
        else:
            part.voted(_ref(client, row, vote))


def _begin_vote(client: ClientState, row: ParticipantBranch) -> tuple[ParticipantBranch, Any, list[Do]]:
    """Return a future of (vote, reason), and the operation that the caller must carry out for that, if there is one."""
    here: list[Do] = []
    future = client.early_votes[row.branch] = client.runtime.future()
    effects.apply(client, client.participant.step(BranchInput.VOTE_EARLY, row.branch, client.now_ms()), here)
    return row, future, here


def _ref(client: ClientState, row: ParticipantBranch, vote: Vote) -> BranchRef:
    gid = row.gid
    return BranchRef(row.branch, gid.resource, client.participant_id, 0, vote, row.token, row.calls, gid.register)


def _check_accepted(client: ClientState, part: LocalTransaction, name: str) -> None:
    """Raise `ResourceUnavailable` until a coordinator has seen which database *name* is (rule 17).

    A vote may travel with the reply, and would count before the coordinator could refuse the database.
    """
    known = live(client, "" if part.register is not None or part.owner is None else part.owner.node)
    if known is not None and known.heard < client.starting.ready_since(name):
        raise ResourceUnavailable(
            f"resource {name!r} of this process is ready, and its coordinator has not accepted it yet"
        )


def _find_or_open(client: ClientState, part: LocalTransaction, resource: Resource | AsyncResource) -> OpenBranch:
    name: str = resource.name
    if client.resources.get(name) is not resource:
        raise ConfigurationError(
            f"resource {name!r} is not one that this manager was connected with: connect(resources=[...])"
        )
    if trouble := client.starting.trouble(name):
        raise ResourceUnavailable(f"resource {name!r} of this process is not ready: {trouble}")
    with client.lock:
        row = client.participant.state.find(part.xid, name)
        if row is None:
            return _open(client, part, resource)
        branch = client.branches.get(row.branch)
        if row.state is not BranchState.ACTIVE or branch is None:
            raise part.error(row.doom or _ENDED)
        return branch


def _open(client: ClientState, part: LocalTransaction, resource: Resource | AsyncResource) -> OpenBranch:
    if client.participant.state.is_closed(part.xid):  # rule 10: a late call
        raise part.error(Reason(AbortCode.BRANCH_UNKNOWN, "the transaction has ended here"))
    if len(client.branches) >= _MAX_BRANCHES:
        raise LimitExceeded(f"this process has {_MAX_BRANCHES} open branches")
    if part.owner is None and part.refs:
        raise CoordinatorUnavailable(
            "the transaction began with no coordinator in reach, so it can use one resource of this process only"
        )
    owner = part.owner or NO_COORDINATOR
    node, epoch = (owner.node, owner.epoch) if part.register is None else ("", Epoch(0))
    branch_id, me = BranchId(client.entropy(8)), client.participant_id
    gid = Gid(client.group, node, epoch, part.xid, branch_id, me, resource.name, part.register)
    row = client.participant.open(gid, part.deadline_ms, owner.node)
    branch = OpenBranch(row, resource, client.runtime.branch_lock())
    client.branches[branch_id] = branch
    client.runtime.wake()
    return branch


def _begin(client: ClientState, branch: OpenBranch, part: LocalTransaction) -> Flow[None]:
    begun = False
    left_s = max(0.0, (part.deadline_ms - client.now_ms()) / 1000)
    try:
        _check_pool(client, branch, part)
        work: Work = yield branch.resource.begin, (part.read_only, left_s)
        with client.lock:
            branch.work = work
        begun = True
    except ResourceUnavailable as error:
        if client.now_ms() < part.deadline_ms:
            raise
        passed = Reason(AbortCode.TIMED_OUT, f"the transaction's deadline has passed: {error}")
        part.set_doom(passed)
        raise part.error(passed) from error
    finally:
        if not begun:
            _take_back(client, branch)
            branch.lock.release()
    if branch.row.state is not BranchState.ACTIVE:
        leave(client, branch)
        raise part.error(branch.row.doom or Reason(AbortCode.TIMED_OUT))


def _check_pool(client: ClientState, branch: OpenBranch, part: LocalTransaction) -> None:
    """Raise `UsageError` if all connections are held by transactions whose code waits for this one to end."""
    name, capacity = branch.resource.name, getattr(branch.resource, "capacity", None)
    if capacity is None or not part.around:
        return
    with client.lock:
        rows = [client.participant.state.find(xid, name) for xid in part.around]
        open_ = [client.branches.get(row.branch) for row in rows if row is not None]
    if sum(each is not None and each.work is not None for each in open_) >= capacity:
        raise UsageError(
            f"the transaction would wait for itself: every connection of resource {name!r} ({capacity}) is held by the "
            "transaction around it, which waits for its end (REQUIRES_NEW): give the pool one connection more for each such block"
        )


def _take_back(client: ClientState, branch: OpenBranch) -> None:
    """The resource could not begin: the branch never was."""
    with client.lock:
        branch.row.users -= 1
        branch.gone = True
        if branch.row.state is BranchState.ACTIVE:
            del client.branches[branch.row.branch]
            client.participant.discard(branch.row)
        else:
            _released(client, branch)


def _count_user(client: ClientState, branch: OpenBranch, part: LocalTransaction) -> None:
    """Raises `TransactionAborted` if the branch ended while the user waited for its lock."""
    with client.lock:
        if branch.row.state is not BranchState.ACTIVE:
            raise part.error(branch.row.doom or _ENDED)
        branch.row.users += 1


def _note_use(client: ClientState, branch: OpenBranch, part: LocalTransaction, joined: bool) -> None:
    """The work is there: from now on *part* lists the branch."""
    row = branch.row
    with client.lock:
        me, register = client.participant_id, row.gid.register
        if part.used(BranchRef(row.branch, row.gid.resource, me, int(joined), register=register)):
            row.running += joined


def _released(client: ClientState, branch: OpenBranch) -> None:
    effects.apply(client, client.participant.step(BranchInput.RELEASED, branch.row.branch, client.now_ms()))
