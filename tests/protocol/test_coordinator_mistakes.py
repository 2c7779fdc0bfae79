"""Mistakes that the coordinator once made, each as the story in which it showed."""

from __future__ import annotations

import pytest

from tests.protocol.coordinator_kit import (
    BEGUN,
    CLIENT,
    EARLIER,
    EARLY,
    EPOCH,
    LIMITS,
    ONE,
    OTHER_CLIENT,
    TWO,
    Office,
    P,
    Q,
    acked,
    commit_request,
    committing,
    decision,
    inquiry,
    one_phase_done,
    outcome_request,
    ref,
    resolved,
    sent,
    xid,
)
from txrpc.errors import AbortCode
from txrpc.protocol.events import Limits
from txrpc.protocol.messages import Finish, OnePhaseResult, Outcome, Rollback
from txrpc.protocol.transaction import State

# ------------------------------------------------------------------------- what changed between Lookup and Looked


def test_two_clients_ask_at_once_for_a_commit_in_one_phase_of_an_earlier_epoch() -> None:
    """Both questions were in the log when the first answer began to ask the branch; the second one began it all again."""
    office = Office()
    (first,) = office.hear(CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    (second,) = office.hear(OTHER_CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    office.looked(first, None)
    office.looked(second, None)
    office.hear(P, resolved())
    assert office.outcomes(CLIENT) == [Outcome.COMMITTED]
    assert office.outcomes(OTHER_CLIENT) == [Outcome.COMMITTED]


@pytest.mark.parametrize("tick", [0, BEGUN])
def test_a_question_that_was_in_the_log_meanwhile_is_answered_by_what_is_true_now(tick: int) -> None:
    """The log's "no record" is older than the decision that has been made since."""
    office = Office()
    epoch = EPOCH if tick == 0 else EARLIER
    office.core.remembered.floor = 1
    (lookup,) = office.hear(OTHER_CLIENT, outcome_request(TWO, epoch=epoch, tick=tick)).look
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    office.looked(lookup, None)
    assert office.state() is State.COMMITTING
    assert not [m for _, m in office.all.send if isinstance(m, Rollback)]
    office.hear(P, acked(1))
    office.hear(P, acked(2))
    for client in (CLIENT, OTHER_CLIENT):
        assert office.outcomes(client) == [Outcome.COMMITTED]
    assert office.state() is State.COMMITTED


def test_an_inquiry_that_was_in_the_log_meanwhile_does_not_touch_another_list_of_branches() -> None:
    """Somebody asks for the commit of an XID that an earlier epoch has committed, with other branches."""
    office = Office()
    (lookup,) = office.hear(P, inquiry(1, epoch=EARLIER)).look
    office.hear(CLIENT, commit_request((ref(8), ref(9))))
    office.looked(lookup, decision())
    assert office.state() is State.PREPARING


# ------------------------------------------------------------------------------------------------- rule 6: forgetting


def test_a_branch_that_acknowledges_twice_counts_once() -> None:
    """Another process saw it in the database's list just before it ended, and asked just after."""
    office = Office(CLIENT, P, Q)
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    office.hear(P, acked(1))
    office.hear(Q, inquiry(1))
    office.hear(Q, acked(1, Finish.ALREADY))
    assert office.state() is State.COMMITTING
    assert office.all.done == []
    office.hear(P, acked(2))
    assert office.all.done == [xid()]
    assert office.leftovers() == ([], [], [])


def test_a_branch_that_shows_up_long_after_its_commit_is_committed() -> None:
    """Its database came back from a backup.  The record is still in the log, only memory has let go of it."""
    office = Office()
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    (record,) = office.all.append
    office.hear(P, acked(1))
    office.hear(P, acked(2))
    office.sleep(10 * LIMITS.max_timeout_ms)
    assert office.state() is State.ABSENT
    (lookup,) = office.hear(P, inquiry(1)).look
    assert sent(office.looked(lookup, record)) == ["11 Commit 1"]


def test_abort_is_not_presumed_for_what_began_to_be_decided_while_the_log_was_asked() -> None:
    office = Office()
    (lookup,) = office.hear(P, inquiry(1)).look
    office.hear(CLIENT, commit_request(EARLY))
    assert sent(office.looked(lookup, None)) == []
    office.logged()
    assert office.state() is State.COMMITTING


# ----------------------------------------------------------------------------------------- nobody waits for ever


def test_a_question_at_the_limit_is_answered() -> None:
    office = Office(limits=Limits(max_transactions=1, recovery_wait_ms=0))
    office.hear(CLIENT, commit_request(TWO, tx=2))
    (lookup,) = office.hear(CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    office.looked(lookup, None)
    (reply,) = office.replies()
    assert reply.outcome is Outcome.UNKNOWN
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.LIMIT_EXCEEDED


def test_whoever_asks_again_about_what_nobody_can_tell_hears_so_soon() -> None:
    """It took up to a minute, which is longer than clients are patient."""
    office = Office()
    office.hear(CLIENT, commit_request(ONE))
    office.hear(P, one_phase_done(OnePhaseResult.UNKNOWN))
    office.sleep(1_000)
    office.hear(OTHER_CLIENT, outcome_request(ONE))
    assert office.replies(OTHER_CLIENT) == []  # the truth may be on its way just now
    office.sleep(LIMITS.ack_wait_ms)
    assert office.outcomes(OTHER_CLIENT) == [Outcome.UNKNOWN]


def test_a_process_that_comes_back_is_asked_how_its_commit_ended() -> None:
    """Another one had been asked to look in the database, and cannot reach it."""
    office = Office(CLIENT, P, Q)
    office.hear(CLIENT, commit_request(ONE))
    office.hear(P, committing())
    assert sent(office.leave(P)) == ["1 Committing 1", "12 Resolve 1"]
    assert sent(office.join(P)) == ["11 Welcome", "11 Resolve 1"]
    office.hear(P, resolved())
    assert office.outcomes() == [Outcome.COMMITTED]
    assert office.leftovers() == ([], [], [])


# ------------------------------------------------------------------------------------------ nothing is left behind


def test_a_commit_in_one_phase_that_nobody_can_tell_about_leaves_nothing() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(ONE))
    office.hear(P, one_phase_done(OnePhaseResult.UNKNOWN))
    office.sleep(10 * LIMITS.max_timeout_ms)
    assert office.leftovers() == ([], [], [])
    office.leave(P)
    assert office.violations == []


def test_a_commit_in_one_phase_that_waited_for_its_resource_leaves_nothing() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(ONE))
    office.leave(P)
    office.sleep(10 * LIMITS.max_timeout_ms)
    assert office.leftovers() == ([], [], [])


def test_a_lost_process_with_two_branches_of_one_transaction_is_nobodys_mistake() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(TWO))
    office.leave(P)
    assert office.state() is State.ABORTED
    assert office.violations == []


# -------------------------------------------------------------------------------------------------------- forgeries


def test_a_time_that_has_not_come_does_not_start_an_old_transaction_again() -> None:
    """Its end has been forgotten, and the request pretends to be younger than the oldest thing remembered."""
    office = Office()
    office.hear(P, inquiry(1))
    office.looked(office.all.look[0], None)  # presumed aborted, and told so
    office.sleep(10 * LIMITS.max_timeout_ms)
    assert office.state() is State.ABSENT
    (lookup,) = office.hear(CLIENT, commit_request(EARLY, tick=office.core.tick + 1)).look
    office.looked(lookup, None)
    (reply,) = office.replies()
    assert reply.outcome is Outcome.UNKNOWN
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.PROTOCOL_VIOLATION
    assert office.all.append == []
