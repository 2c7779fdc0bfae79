"""Rule 5 at the participant: what began under an earlier epoch of its coordinator can never be committed, and lets go."""

from __future__ import annotations

from txrpc._protocol.messages import Owner, Prepare, Vote, Voted
from txrpc._protocol.participant.branch import BranchInput, BranchState, Operation, ParticipantBranch
from txrpc._protocol.participant.machine import Participant
from txrpc.errors import AbortCode
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid

OLD, NEW = Owner("c1", Epoch.make(1, 7)), Owner("c1", Epoch.make(2, 8))


def gid(number: int, owner: Owner = OLD) -> Gid:
    xid, branch = Xid.make(number, bytes(10)), BranchId(number.to_bytes(8, "big"))
    return Gid("default", owner.node, owner.epoch, xid, branch, ParticipantId(bytes(8)), "bank")


def called(table: Participant, number: int, owner: Owner = OLD) -> ParticipantBranch:
    """A branch that one call has used."""
    row = table.open(gid(number, owner), 30_000)
    row.calls = 1
    return row


def test_unprepared_branches_of_an_earlier_epoch_roll_back_at_once_and_vote_abort() -> None:
    table = Participant(lambda: 0.5)
    row = called(table, 1)
    effects = table.coordinator_is(NEW, 1_000)
    assert [do.operation for do in effects.do] == [Operation.ROLLBACK]
    assert row.doom is not None
    assert row.doom.code is AbortCode.COORDINATOR_RESTARTED
    (vote,) = table.received(Prepare(row.xid, row.branch, 1), 1_001).send
    assert isinstance(vote, Voted)
    assert vote.vote is Vote.ABORT
    assert table.state.is_closed(row.xid)


def test_a_call_that_is_using_the_work_is_interrupted() -> None:
    table = Participant(lambda: 0.5)
    row = table.open(gid(1), 30_000)
    row.running = row.users = 1
    assert [do.operation for do in table.coordinator_is(NEW, 1_000).do] == [Operation.INTERRUPT]


def test_what_belongs_to_the_present_epoch_or_another_node_stays() -> None:
    table = Participant(lambda: 0.5)
    rows = [called(table, 1, NEW), called(table, 2, Owner("c2", Epoch.make(1, 1)))]
    assert table.coordinator_is(NEW, 1_000).do == []
    assert {row.state for row in rows} == {BranchState.ACTIVE}


def test_the_roots_own_branch_stays_because_it_needs_no_coordinator() -> None:
    table = Participant(lambda: 0.5)
    row = table.open(gid(1), 30_000)
    assert table.coordinator_is(NEW, 1_000).do == []
    assert [do.operation for do in table.step(BranchInput.LOCAL_COMMIT, row.branch, 1_001, 0).do] == [
        Operation.COMMIT_ONE_PHASE
    ]


def test_a_branch_that_is_voting_or_prepared_is_not_touched() -> None:
    table = Participant(lambda: 0.5)
    row = called(table, 1)
    table.received(Prepare(row.xid, row.branch, 1), 500)
    assert table.coordinator_is(NEW, 1_000).do == []
    table.step(BranchInput.PREPARED, row.branch, 1_001, "5")
    assert table.coordinator_is(NEW, 1_002).do == []
    assert row.state is BranchState.PREPARED
