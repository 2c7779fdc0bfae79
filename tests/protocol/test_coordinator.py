"""The rules that a coordinator keeps, one sentence of the design a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.protocol.coordinator_kit import (
    BEGUN,
    CLIENT,
    CLOCK,
    EARLIER,
    EARLY,
    EPOCH,
    FULL,
    LEFT_MS,
    LIMITS,
    ONE,
    OTHER_CLIENT,
    OWNER,
    STRANGE,
    TWO,
    CoordinatorHarness,
    P,
    Q,
    acked,
    commit_request,
    committing,
    decision,
    effects,
    hello,
    inquiry,
    one_phase_done,
    outcome_request,
    ref,
    resolved,
    rollback_request,
    sent,
    voted,
    xid,
)
from txrpc._protocol.coordinator.events import Forgot, NotLogged, Received
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.messages import (
    Commit,
    FinishResult,
    OnePhaseToken,
    Outcome,
    OutcomeReply,
    Owner,
    Resolve,
    Rollback,
    Vote,
    Wait,
)


def committed(harness: CoordinatorHarness) -> CoordinatorHarness:
    """Two branches, from the request to the last acknowledgement."""
    harness.hear(CLIENT, commit_request(TWO))
    harness.hear(P, voted(1))
    harness.hear(P, voted(2))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    return harness


def test_rule_2_validity_every_branch_that_the_root_saw_must_vote() -> None:
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request((*TWO, ref(3, process=Q))))
    harness.hear(P, voted(1))
    harness.hear(P, voted(1))
    harness.hear(P, voted(2))
    harness.hear(P, voted(3))  # not its own to vote on
    assert harness.all.append == []
    harness.hear(Q, voted(3))
    assert len(harness.all.append) == 1


def test_rule_3_nobody_hears_committed_before_the_decision_is_durable() -> None:
    harness = CoordinatorHarness(CLIENT, OTHER_CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(EARLY, wait=Wait.DECISION))
    for client in (CLIENT, OTHER_CLIENT):
        harness.hear(client, commit_request(EARLY, wait=Wait.DECISION))
    harness.hear(OTHER_CLIENT, outcome_request(EARLY))
    harness.hear(P, inquiry(1))
    harness.hear(Q, inquiry(1))
    harness.hear(P, acked(1))
    harness.leave(P)
    harness.join(P)
    harness.sleep(20 * LIMITS.max_timeout_ms)
    assert not [m for _, m in harness.all.send if isinstance(m, Commit | OutcomeReply | Rollback)]
    assert harness.state() is State.RECORDING
    out = harness.logged()
    assert sorted(sent(out)) == [
        "1 reply COMMITTED pending accounts pending audit",
        "11 Commit 1",
        "11 Commit 2",
    ]


def test_rule_3_what_is_certainly_not_in_the_log_is_aborted() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    assert sent(harness.step(NotLogged((xid(),), FULL))) == [
        "11 Rollback 1",
        "11 Rollback 2",
        "1 reply ABORTED LOG_UNAVAILABLE",
    ]
    harness.hear(CLIENT, commit_request(EARLY))
    assert harness.outcomes() == [Outcome.ABORTED, Outcome.ABORTED]
    assert len(harness.all.append) == 1


def test_rule_5_having_presumed_abort_the_commit_is_refused_for_as_long_as_it_can_come() -> None:
    """Told to a branch, or to somebody who asked; whether it is still remembered or below the floor by then."""
    for late_ms in (0, LIMITS.max_timeout_ms, 20 * LIMITS.max_timeout_ms):
        for ask in (inquiry(1), outcome_request(EARLY)):
            harness = CoordinatorHarness()
            for lookup in harness.hear(P, ask).look:
                harness.looked(lookup, None)
            harness.sleep(late_ms)
            for lookup in harness.hear(CLIENT, commit_request(EARLY)).look:
                harness.looked(lookup, None)
            assert harness.outcomes() == [Outcome.ABORTED], late_ms
            assert harness.all.append == []


def test_rule_5_a_commit_request_of_an_earlier_epoch_is_refused_and_its_branches_are_let_go() -> None:
    harness = CoordinatorHarness()
    (lookup,) = harness.hear(CLIENT, commit_request(EARLY, epoch=EARLIER)).look
    assert sent(harness.looked(lookup, None)) == [
        "11 Rollback 1",
        "11 Rollback 2",
        "1 reply ABORTED COORDINATOR_RESTARTED",
    ]


def test_rule_6_the_record_goes_only_after_every_prepared_branch_has_acknowledged() -> None:
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(P, acked(1))
    harness.hear(Q, acked(2))  # was not asked
    harness.leave(P)
    harness.hear(P, acked(2))  # the tail of a session that is gone
    harness.join(P)
    harness.hear(P, acked(1))
    assert harness.all.done == []
    harness.hear(P, acked(2))
    assert harness.all.done == [xid()]


def test_rule_6_a_branch_whose_resource_is_away_keeps_the_record_as_long_as_it_takes() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.leave(P)
    harness.sleep(100 * LIMITS.max_timeout_ms)
    assert harness.state() is State.COMMITTING
    (pending,) = harness.replies()
    assert pending.pending == ("accounts", "audit")
    troubles = {b.trouble for b in harness.core.state.transactions[xid()].branches.values()}
    assert troubles == {f"no process with resource {name} is connected" for name in ("accounts", "audit")}
    assert sent(harness.join(P)) == ["11 Welcome", "11 Commit 1", "11 Commit 2"]


def test_rule_7_a_process_that_has_seen_an_epoch_which_this_log_never_had_is_sent_away() -> None:
    harness = CoordinatorHarness(CLIENT)
    out = harness.join(P, seen=Owner("c1", STRANGE))
    assert effects(out) == ["close 11 strange_log", "note session refused"]
    for seen in (None, OWNER, Owner("c1", EARLIER), Owner("c2", STRANGE)):
        assert sent(harness.join(P, seen=seen))[-1] == "11 Welcome"
        harness.leave(P)


def test_rule_7_what_began_under_a_strange_epoch_is_never_ended_by_presumption() -> None:
    for ask in (commit_request(EARLY, epoch=STRANGE), outcome_request(EARLY, epoch=STRANGE)):
        harness = CoordinatorHarness()
        (lookup,) = harness.hear(CLIENT, ask).look
        assert sent(harness.looked(lookup, None)) == ["1 reply UNKNOWN UNSPECIFIED"]
        assert harness.state() is State.ABSENT


def test_rule_10_messages_about_what_has_ended_change_nothing() -> None:
    harness = committed(CoordinatorHarness())
    before = len(harness.all.send)
    for message in (voted(1, Vote.ABORT), one_phase_done(Outcome.ABORTED), committing(), acked(1), resolved()):
        harness.hear(P, message)
    assert len(harness.all.send) == before
    assert harness.state() is State.COMMITTED
    assert harness.all.done == [xid()]
    assert harness.violations == []


def test_rule_12_asking_again_starts_nothing_and_everybody_hears_the_same() -> None:
    harness = CoordinatorHarness()
    for _ in range(3):
        for client in (CLIENT, OTHER_CLIENT):
            harness.hear(client, commit_request(TWO))
            harness.hear(client, outcome_request(TWO))
    harness.hear(P, voted(1))
    harness.hear(P, voted(2))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    assert len(harness.all.append) == 1
    assert [w for w in sent(harness.all) if "Prepare" in w] == ["11 Prepare 1", "11 Prepare 2"]
    for client in (CLIENT, OTHER_CLIENT):
        assert harness.outcomes(client) == [Outcome.COMMITTED]
        harness.hear(client, commit_request(TWO))
        assert harness.outcomes(client) == [Outcome.COMMITTED] * 2


@pytest.mark.parametrize("epoch", [EPOCH, EARLIER])
def test_rule_12_the_log_answers_what_memory_has_let_go_of(epoch: Any) -> None:
    harness = committed(CoordinatorHarness())
    harness.sleep(20 * LIMITS.max_timeout_ms)
    (lookup,) = harness.hear(OTHER_CLIENT, outcome_request(TWO, epoch=epoch)).look
    harness.looked(lookup, decision(EARLY))
    assert harness.outcomes(OTHER_CLIENT) == [Outcome.COMMITTED]


def test_rule_12_after_the_retention_time_unknown_is_said_and_not_a_guess() -> None:
    """The record may have been deleted: its absence proves nothing any more."""
    for forgotten_ms, expected in ((CLOCK - 1, Outcome.ABORTED), (CLOCK, Outcome.UNKNOWN)):
        harness = CoordinatorHarness(forgotten_ms=forgotten_ms)
        (lookup,) = harness.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
        harness.looked(lookup, None)
        assert harness.outcomes() == [expected]
    harness = CoordinatorHarness()
    (lookup,) = harness.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
    harness.step(Forgot(CLOCK))  # while the log was being asked
    harness.looked(lookup, None)
    assert harness.outcomes() == [Outcome.UNKNOWN]


def test_rule_13_the_reason_of_an_abort_is_the_reason_of_the_branch() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(TWO))
    harness.hear(P, voted(2, Vote.ABORT))
    (reply,) = harness.replies()
    assert str(reply.reason) == "cannot prepare: audit: the database refused"


def test_rule_13_a_commit_in_one_phase_is_unknown_only_while_nobody_can_tell() -> None:
    harness = CoordinatorHarness(CLIENT, OTHER_CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(ONE))
    harness.leave(P)  # before it could say under which token it commits
    harness.sleep(LEFT_MS + LIMITS.ack_wait_ms)
    assert harness.outcomes() == [Outcome.UNKNOWN]
    assert "outcome unknown" in [note.event for note in harness.all.notes]
    harness.hear(OTHER_CLIENT, outcome_request(ONE))
    assert sent(harness.join(P)) == ["11 Welcome", "11 Resolve 1"]  # it had not died
    harness.hear(P, resolved())
    assert harness.outcomes(OTHER_CLIENT) == [Outcome.COMMITTED]


def test_rule_13_the_token_lets_another_process_ask_the_database() -> None:
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(ONE))
    harness.hear(P, committing())
    (waiter, token), (session, resolve) = harness.leave(P).send
    assert (waiter, token) == (CLIENT, OnePhaseToken(xid(), "t1"))
    assert (session, resolve) == (Q, Resolve(xid(), ONE[0].branch, "accounts", "t1"))
    harness.hear(Q, resolved(Outcome.ABORTED))
    assert harness.outcomes() == [Outcome.ABORTED]


def test_rule_21_a_local_commit_is_never_presumed() -> None:
    """F1: the root of a transaction whose only branch is its own commits without the coordinator, which must not guess."""
    harness = CoordinatorHarness(CLIENT, P)
    assert sent(harness.hear(P, outcome_request(ONE))) == ["11 Resolve 1"]
    harness.hear(P, resolved(Outcome.COMMITTED))
    assert harness.outcomes(P) == [Outcome.COMMITTED]
    # One that is elsewhere can only have been committed by this coordinator, which was never asked to.
    assert sent(CoordinatorHarness(CLIENT, P).hear(CLIENT, outcome_request(ONE))) == [
        "11 Rollback 1",
        "1 reply ABORTED PRESUMED",
    ]


def test_rule_12_giving_up_is_held_against_the_log_like_a_question() -> None:
    """F17: a committed transaction was called aborted to who gave it up after a restart, and to all who asked after that."""
    harness = CoordinatorHarness()
    out = harness.hear(CLIENT, rollback_request(TWO, epoch=EARLIER))
    assert sent(out) == []
    (lookup,) = out.look
    assert sent(harness.looked(lookup, decision())) == ["1 reply COMMITTED"]
    for epoch, tick in ((EARLIER, BEGUN), (EPOCH, BEGUN)):
        harness = CoordinatorHarness()
        harness.core.state.remembered.floor = BEGUN + 1
        (lookup,) = harness.hear(CLIENT, rollback_request(TWO, epoch=epoch, tick=tick)).look
        rolled_back = ["11 Rollback 1", "11 Rollback 2", "1 reply ABORTED REQUESTED"]
        assert sent(harness.looked(lookup, None)) == rolled_back


def test_rule_14_a_commit_in_one_phase_that_waits_says_for_what() -> None:
    """Without a token only its own process can be asked; with one, any process with the resource."""
    for token, expected in ((False, "had not said which transaction"), (True, "no process with resource accounts is")):
        harness = CoordinatorHarness(CLIENT, P)
        harness.hear(CLIENT, commit_request(ONE))
        if token:
            harness.hear(P, committing())
        harness.leave(P)
        (branch,) = harness.core.state.transactions[xid()].branches.values()
        assert expected in branch.trouble


def test_rule_13_a_branch_ended_by_hand_is_said_counted_and_noted() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.hear(P, acked(1, FinishResult.HEURISTIC))
    harness.hear(P, acked(2))
    (reply,) = harness.replies()
    assert reply.outcome is Outcome.COMMITTED
    assert reply.heuristic == "accounts was rolled back by hand although the decision was to commit"
    assert harness.core.state.heuristic == 1
    assert [note.event for note in harness.all.notes] == ["heuristic outcome"]


FORGED: dict[str, Callable[[], Any]] = {
    "another's branch": lambda: voted(2, Vote.ABORT),
    "a branch nobody listed": lambda: voted(9, Vote.ABORT),
    "a transaction nobody began": lambda: voted(1, Vote.ABORT, tx=9),
    "an acknowledgement instead of a vote": lambda: acked(1),
    "an end instead of a vote": lambda: one_phase_done(Outcome.ABORTED),
    "a heuristic end of nothing": lambda: acked(1, FinishResult.HEURISTIC, tx=9),
    "an inquiry about another's branch": lambda: inquiry(2),
    "an inquiry about a branch nobody listed": lambda: inquiry(9),
    "a second greeting": lambda: hello(Q),
    "a commit request for another's": lambda: commit_request((ref(9),)),
}


@pytest.mark.parametrize("name", FORGED)
def test_rule_15_what_somebody_else_says_does_not_end_a_transaction(name: str) -> None:
    harness = CoordinatorHarness(CLIENT, P, Q)
    harness.hear(CLIENT, commit_request(TWO))
    harness.hear(Q, FORGED[name]())
    assert harness.state() is State.PREPARING
    assert list(harness.core.state.transactions[xid()].branches) == [branch.branch for branch in TWO]
    harness.hear(P, voted(1))
    harness.hear(P, voted(2))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    assert harness.outcomes() == [Outcome.COMMITTED]


def test_rule_15_a_second_greeting_of_somebody_else_ends_the_session_and_only_that() -> None:
    harness = CoordinatorHarness(CLIENT, P, Q)
    out = harness.hear(Q, hello(P))
    assert [(session, farewell.code) for session, farewell in out.close] == [(Q, "protocol")]
    assert sorted(harness.core.state.directory.sessions) == [CLIENT, P]
    assert effects(harness.hear(Q, voted(1))) == []


def test_rule_15_what_is_for_another_coordinator_changes_nothing_and_a_root_is_told() -> None:
    """An item names its node: an XID of another coordinator's must not be presumed aborted here."""
    harness = CoordinatorHarness(CLIENT, P)
    out = harness.step(Received(CLIENT, "c2", commit_request(TWO)))
    assert sent(out) == [f"{CLIENT} reply UNKNOWN UNSPECIFIED"]
    assert [note.event for note in out.notes] == ["protocol violation"]
    assert effects(harness.step(Received(P, "c2", inquiry(1)))) == ["violation"]
    assert not harness.core.state.transactions
    assert effects(harness.hear(CLIENT, commit_request(TWO))) == [f"{P} Prepare 1", f"{P} Prepare 2"]
    assert effects(harness.step(Received(P, "c2", voted(1)))) == ["violation"]
    assert all(branch.vote is None for branch in harness.core.state.transactions[xid()].branches.values())


REFUSED_HELLOS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "protocol": ({"protocol": 99}, "protocol_version", False),
    "group": ({"group": "shop"}, "group", False),
    "another database": ({"identity": "db-2"}, "resource_conflict", True),
}


@pytest.mark.parametrize("name", REFUSED_HELLOS)
def test_rule_15_who_does_not_belong_here_is_told_why(name: str) -> None:
    changes, expected, retry = REFUSED_HELLOS[name]
    harness = CoordinatorHarness(CLIENT)
    harness.join(Q, identity="db-1")
    ((session, farewell),) = harness.join(P, **changes).close
    assert (session, farewell.code, farewell.retry) == (P, expected, retry)
    assert P not in harness.core.state.directory.sessions
