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
    CoordinatorHarness,
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
from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.messages import FinishResult, Outcome, Rollback
from txrpc.errors import AbortCode

# ------------------------------------------------------------------------- what changed between Lookup and Looked


def test_two_clients_ask_at_once_for_a_commit_in_one_phase_of_an_earlier_epoch() -> None:
    """Both questions were in the log when the first answer began to ask the branch; the second one began it all again."""
    harness = CoordinatorHarness()
    (first,) = harness.hear(CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    (second,) = harness.hear(OTHER_CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    harness.looked(first, None)
    harness.looked(second, None)
    harness.hear(P, resolved())
    assert harness.outcomes(CLIENT) == [Outcome.COMMITTED]
    assert harness.outcomes(OTHER_CLIENT) == [Outcome.COMMITTED]


@pytest.mark.parametrize("tick", [0, BEGUN])
def test_a_question_that_was_in_the_log_meanwhile_is_answered_by_what_is_true_now(tick: int) -> None:
    """The log's "no record" is older than the decision that has been made since."""
    harness = CoordinatorHarness()
    epoch = EPOCH if tick == 0 else EARLIER
    harness.core.state.remembered.floor = 1
    (lookup,) = harness.hear(OTHER_CLIENT, outcome_request(TWO, epoch=epoch, tick=tick)).look
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.looked(lookup, None)
    assert harness.state() is State.COMMITTING
    assert not [m for _, m in harness.all.send if isinstance(m, Rollback)]
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    for client in (CLIENT, OTHER_CLIENT):
        assert harness.outcomes(client) == [Outcome.COMMITTED]
    assert harness.state() is State.COMMITTED


def test_an_inquiry_that_was_in_the_log_meanwhile_does_not_touch_another_list_of_branches() -> None:
    """Somebody asks for the commit of an XID that an earlier epoch has committed, with other branches."""
    harness = CoordinatorHarness()
    (lookup,) = harness.hear(P, inquiry(1, epoch=EARLIER)).look
    harness.hear(CLIENT, commit_request((ref(8), ref(9))))
    harness.looked(lookup, decision())
    assert harness.state() is State.PREPARING


# ------------------------------------------------------------------------------------------------- rule 6: forgetting


def test_a_branch_that_acknowledges_twice_counts_once() -> None:
    """Another process saw it in the database's list just before it ended, and asked just after."""
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(Q, inquiry(1))
    harness.hear(Q, acked(1, FinishResult.ALREADY))
    assert harness.state() is State.COMMITTING
    assert harness.all.done == []
    harness.hear(P, acked(2))
    assert harness.all.done == [xid()]
    assert harness.leftovers() == ([], [], [])


def test_a_branch_that_shows_up_long_after_its_commit_is_committed() -> None:
    """Its database came back from a backup.  The record is still in the log, only memory has let go of it."""
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    (record,) = harness.all.append
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    harness.sleep(10 * LIMITS.max_timeout_ms)
    assert harness.state() is State.ABSENT
    (lookup,) = harness.hear(P, inquiry(1)).look
    assert sent(harness.looked(lookup, record)) == ["11 Commit 1"]


def test_abort_is_not_presumed_for_what_began_to_be_decided_while_the_log_was_asked() -> None:
    harness = CoordinatorHarness()
    (lookup,) = harness.hear(P, inquiry(1)).look
    harness.hear(CLIENT, commit_request(EARLY))
    assert sent(harness.looked(lookup, None)) == []
    harness.logged()
    assert harness.state() is State.COMMITTING


# ----------------------------------------------------------------------------------------- nobody waits for ever


def test_a_question_at_the_limit_is_answered() -> None:
    harness = CoordinatorHarness(limits=Limits(max_transactions=1, recovery_wait_ms=0))
    harness.hear(CLIENT, commit_request(TWO, tx=2))
    (lookup,) = harness.hear(CLIENT, outcome_request(ONE, epoch=EARLIER)).look
    harness.looked(lookup, None)
    (reply,) = harness.replies()
    assert reply.outcome is Outcome.UNKNOWN
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.LIMIT_EXCEEDED


def test_whoever_asks_again_about_what_nobody_can_tell_hears_so_soon() -> None:
    """It took up to a minute, which is longer than clients are patient."""
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(ONE))
    harness.hear(P, one_phase_done(Outcome.UNKNOWN))
    harness.sleep(1_000)
    harness.hear(OTHER_CLIENT, outcome_request(ONE))
    assert harness.replies(OTHER_CLIENT) == []  # the truth may be on its way just now
    harness.sleep(LIMITS.ack_wait_ms)
    assert harness.outcomes(OTHER_CLIENT) == [Outcome.UNKNOWN]


def test_a_process_that_comes_back_is_asked_how_its_commit_ended() -> None:
    """Another one had been asked to look in the database, and cannot reach it."""
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(ONE))
    harness.hear(P, committing())
    assert sent(harness.leave(P)) == ["1 OnePhaseToken", "12 Resolve 1"]
    assert sent(harness.join(P)) == ["11 Welcome", "11 Resolve 1"]
    harness.hear(P, resolved())
    assert harness.outcomes() == [Outcome.COMMITTED]
    assert harness.leftovers() == ([], [], [])


# ------------------------------------------------------------------------------------------ nothing is left behind


def test_a_commit_in_one_phase_that_nobody_can_tell_about_leaves_nothing() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(ONE))
    harness.hear(P, one_phase_done(Outcome.UNKNOWN))
    harness.sleep(10 * LIMITS.max_timeout_ms)
    assert harness.leftovers() == ([], [], [])
    harness.leave(P)
    assert harness.violations == []


def test_a_commit_in_one_phase_that_waited_for_its_resource_leaves_nothing() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(ONE))
    harness.leave(P)
    harness.sleep(10 * LIMITS.max_timeout_ms)
    assert harness.leftovers() == ([], [], [])


def test_a_lost_process_with_two_branches_of_one_transaction_is_nobodys_mistake() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(TWO))
    harness.leave(P)
    assert harness.state() is State.ABORTED
    assert harness.violations == []


# -------------------------------------------------------------------------------------------------------- forgeries


def test_a_time_that_has_not_come_does_not_start_an_old_transaction_again() -> None:
    """Its end has been forgotten, and the request pretends to be younger than the oldest thing remembered."""
    harness = CoordinatorHarness()
    harness.hear(P, inquiry(1))
    harness.looked(harness.all.look[0], None)  # presumed aborted, and told so
    harness.sleep(10 * LIMITS.max_timeout_ms)
    assert harness.state() is State.ABSENT
    (lookup,) = harness.hear(CLIENT, commit_request(EARLY, tick=harness.core.state.tick + 1)).look
    harness.looked(lookup, None)
    (reply,) = harness.replies()
    assert reply.outcome is Outcome.UNKNOWN
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.PROTOCOL_VIOLATION
    assert harness.all.append == []
