"""What a transaction costs its coordinator, in messages and records: the design's table, line by line."""

from __future__ import annotations

from typing import Any

import pytest

from tests.protocol.coordinator_kit import (
    CLIENT,
    TWO,
    Office,
    P,
    Q,
    R,
    acked,
    commit_request,
    one_phase_done,
    ref,
    rollback_request,
    sent,
    voted,
    xid,
)
from txrpc.protocol.messages import (
    BranchRef,
    Outcome,
    Vote,
)

PROCESSES = (P, Q, R)


def many(n: int, vote: Vote | None = None) -> tuple[BranchRef, ...]:
    return tuple(ref(number, "accounts", PROCESSES[number % 3], vote) for number in range(1, n + 1))


class Counter:
    """Messages by kind of session and records, both ways."""

    def __init__(self) -> None:
        self.office = Office(CLIENT, *PROCESSES)
        self.office.all.send.clear()
        self.heard = {"client": 0, "participant": 0}

    def hear(self, session: int, message: Any) -> None:
        self.heard["client" if session == CLIENT else "participant"] += 1
        self.office.hear(session, message)

    def answer(self, n: int, make: Any) -> None:
        for number in range(1, n + 1):
            self.hear(PROCESSES[number % 3], make(number))

    @property
    def costs(self) -> tuple[int, int, int]:
        """Client messages, participant messages, records."""
        sent = [session for session, _ in self.office.all.send]
        clients = sent.count(CLIENT)
        return (
            self.heard["client"] + clients,
            self.heard["participant"] + len(sent) - clients,
            len(self.office.all.append),
        )


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_read_only_transaction_costs_2_and_2n_messages_and_no_record(n: int) -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(n)))
    counter.answer(n, lambda number: voted(number, Vote.READ_ONLY))
    assert counter.office.outcomes() == [Outcome.COMMITTED]
    assert counter.costs == (2, 2 * n, 0)
    assert counter.office.all.done == []


def test_one_branch_elsewhere_costs_2_and_2_messages_and_no_record() -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(1)))
    counter.hear(PROCESSES[1], one_phase_done())
    assert counter.office.outcomes() == [Outcome.COMMITTED]
    assert counter.costs == (2, 2, 0)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_two_phases_cost_2_and_4n_messages_and_one_record(n: int) -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(n)))
    counter.answer(n, voted)
    counter.office.logged()
    counter.answer(n, acked)
    assert counter.office.outcomes() == [Outcome.COMMITTED]
    assert counter.costs == (2, 4 * n, 1)
    assert counter.office.all.done == [xid()]


@pytest.mark.parametrize("n", [1, 2, 10])
def test_early_votes_cost_2_and_2n_messages_and_one_record(n: int) -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(n, Vote.PREPARED)))
    counter.office.logged()
    counter.answer(n, acked)
    assert counter.office.outcomes() == [Outcome.COMMITTED]
    assert counter.costs == (2, 2 * n, 1)


def test_early_votes_of_readers_cost_the_participants_nothing() -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(3, Vote.READ_ONLY)))
    assert counter.office.outcomes() == [Outcome.COMMITTED]
    assert counter.costs == (2, 0, 0)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_rollback_costs_2_and_n_messages_and_no_record(n: int) -> None:
    counter = Counter()
    counter.hear(CLIENT, rollback_request(many(n)))
    assert counter.office.outcomes() == [Outcome.ABORTED]
    assert counter.costs == (2, n, 0)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_abort_by_the_first_vote_costs_at_most_three_messages_a_branch_and_no_record(n: int) -> None:
    counter = Counter()
    counter.hear(CLIENT, commit_request(many(n)))
    counter.hear(PROCESSES[1], voted(1, Vote.ABORT))
    assert counter.office.outcomes() == [Outcome.ABORTED]
    # Prepare to each; one vote; Rollback to all but the one that voted to abort.
    assert counter.costs == (2, n + 1 + (n - 1), 0)


def test_an_early_abort_or_a_process_that_is_gone_aborts_without_a_prepare() -> None:
    for refs in ((ref(1, vote=Vote.ABORT), ref(2, "audit")), (ref(2, "audit"), ref(3, "stock", R))):
        office = Office()
        assert sent(office.hear(CLIENT, commit_request(refs)))[0] == "11 Rollback 2"
        assert office.outcomes() == [Outcome.ABORTED]


def test_readers_have_no_part_in_the_record_and_the_second_phase() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(TWO))
    office.hear(P, voted(1, Vote.READ_ONLY))
    (record,) = office.hear(P, voted(2)).append
    assert [branch.branch for branch in record.branches] == [TWO[1].branch]
    assert sent(office.logged()) == ["11 Commit 2"]
