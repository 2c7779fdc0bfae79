"""What a coordinator refuses, how it shuts down, what the time does, and who is answered."""

from __future__ import annotations

import dataclasses

import pytest

from tests.protocol.coordinator_kit import (
    BEGUN,
    CLIENT,
    EARLIER,
    EARLY,
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
    effects,
    outcome_request,
    participant,
    ref,
    rollback_request,
    sent,
    voted,
    xid,
)
from txrpc._protocol.coordinator.events import Drain, Limits, LogHealth, Looked
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.messages import (
    Acked,
    CommitRequest,
    FinishResult,
    Outcome,
    OutcomeRequest,
    RollbackRequest,
    Tick,
    Vote,
    Wait,
    Welcome,
)
from txrpc.errors import AbortCode, ConfigurationError


def code(harness: CoordinatorHarness, session: int = CLIENT) -> AbortCode:
    reason = harness.replies(session)[-1].reason
    assert reason is not None
    return reason.code


def refusal(request: CommitRequest, limits: Limits = LIMITS) -> AbortCode:
    harness = CoordinatorHarness(limits=limits)
    harness.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    harness.hear(CLIENT, request)
    assert harness.outcomes() == [Outcome.ABORTED]
    assert harness.state(2) is State.PREPARING, "nothing else suffers"
    return code(harness)


def test_at_a_limit_a_request_is_refused_with_its_name() -> None:
    assert refusal(commit_request(), Limits(max_transactions=1)) is AbortCode.LIMIT_EXCEEDED
    three = (*TWO, ref(3))
    assert refusal(commit_request(three), Limits(max_branches=2)) is AbortCode.LIMIT_EXCEEDED
    assert refusal(commit_request((ref(1), ref(1)))) is AbortCode.PROTOCOL_VIOLATION
    assert refusal(dataclasses.replace(commit_request(), time_left_ms=0)) is AbortCode.TIMED_OUT


def test_sessions_are_limited_and_a_process_may_always_come_back() -> None:
    harness = CoordinatorHarness(CLIENT, P, limits=Limits(max_sessions=2))
    assert effects(harness.join(Q)) == ["close 12 limit", "note session refused"]
    assert effects(harness.join(P + 100)) == ["111 Welcome", "close 11 replaced"]


def test_no_time_left_is_longer_than_the_longest() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, dataclasses.replace(commit_request(), time_left_ms=2**31))
    harness.sleep(LIMITS.max_timeout_ms)
    assert code(harness) is AbortCode.TIMED_OUT


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="max_branches is 0"):
        Limits(max_branches=0)


def test_while_the_log_is_in_trouble_commits_are_refused_and_readers_are_not_hurt() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(TWO))
    harness.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    harness.step(LogHealth(False))
    for tx, vote in ((1, Vote.READ_ONLY), (2, Vote.PREPARED)):
        for number in (1, 2):
            harness.hear(P, voted(number, vote, tx=tx))
    assert harness.outcomes() == [Outcome.COMMITTED]
    (reply,) = harness.replies(OTHER_CLIENT, tx=2)
    assert str(reply.reason) == "log unavailable: the decision log does not answer"
    harness.hear(CLIENT, commit_request(TWO, tx=3))
    assert [r.outcome for r in harness.replies(tx=3)] == [Outcome.ABORTED]
    harness.step(LogHealth(True))
    harness.hear(CLIENT, commit_request(TWO, tx=4))
    assert harness.state(4) is State.PREPARING


def test_a_draining_coordinator_finishes_what_it_decides_and_begins_nothing() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(TWO))
    harness.step(Drain())
    assert harness.core.deciding == 1
    harness.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    (reply,) = harness.replies(OTHER_CLIENT, tx=2)
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.SHUTTING_DOWN
    harness.hear(P, voted(1))
    harness.hear(P, voted(2))
    assert sent(harness.logged())[-1] == "1 reply COMMITTED pending accounts pending audit", "it does not see the rest"
    assert harness.core.deciding == 0
    assert sent(harness.hear(OTHER_CLIENT, outcome_request()))[-1] == "2 reply COMMITTED pending accounts pending audit"


def test_the_clients_commit_waits_for_acknowledgements_but_not_for_ever() -> None:
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    harness.hear(OTHER_CLIENT, commit_request(EARLY, wait=Wait.DECISION))
    assert sent(harness.logged())[-1] == "2 reply COMMITTED pending accounts pending audit"
    harness.hear(P, acked(1))
    assert sent(harness.sleep(LIMITS.ack_wait_ms - 1)) == []
    assert sent(harness.sleep(1)) == ["1 reply COMMITTED pending audit"]
    assert sent(harness.hear(P, acked(2))) == []
    assert harness.all.done == [xid()]


def test_a_transaction_without_branches_commits_at_once() -> None:
    harness = CoordinatorHarness()
    assert effects(harness.hear(CLIENT, commit_request(()))) == ["1 reply COMMITTED"]


def test_sessions_are_told_the_time() -> None:
    harness = CoordinatorHarness(CLIENT)
    (welcome,) = [m for _, m in harness.all.send if isinstance(m, Welcome)]
    assert (welcome.owner, welcome.tick) == (OWNER, BEGUN)
    harness.sleep(3 * LIMITS.tick_ms)
    ticks = [m.tick for _, m in harness.all.send if isinstance(m, Tick)]
    assert ticks == [BEGUN + 5, BEGUN + 10, BEGUN + 15]
    harness.leave(CLIENT)
    assert harness.core.next_wakeup_ms() is None


def test_time_never_runs_backwards() -> None:
    harness = CoordinatorHarness()
    harness.now_ms += 10_000
    harness.step(Drain())
    harness.now_ms -= 20_000
    harness.step(Drain())
    assert harness.core.state.tick == BEGUN + 10


def test_answers_to_sessions_that_are_gone_are_dropped() -> None:
    harness = CoordinatorHarness()
    (lookup,) = harness.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
    harness.leave(CLIENT)
    assert effects(harness.step(Looked(lookup, None))) == []
    harness.hear(OTHER_CLIENT, commit_request(EARLY))
    harness.leave(OTHER_CLIENT)
    assert sent(harness.logged()) == ["11 Commit 1", "11 Commit 2"]


def test_every_request_is_answered_to_who_asked() -> None:
    """One answer each, whatever is asked of a transaction that nobody knows."""
    requests: list[CommitRequest | RollbackRequest | OutcomeRequest] = [
        commit_request(()),
        rollback_request(()),
        outcome_request(()),
        commit_request((), epoch=EARLIER),
        outcome_request((), epoch=STRANGE),
    ]
    for request in requests:
        harness = CoordinatorHarness()
        for lookup in harness.hear(CLIENT, request).look:
            harness.looked(lookup, None)
        assert len(harness.replies()) == 1
        assert harness.replies(OTHER_CLIENT) == []


def test_the_process_of_a_participant_id_is_its_last_session() -> None:
    harness = CoordinatorHarness()
    harness.join(P + 100)
    assert sent(harness.hear(CLIENT, commit_request(TWO))) == ["111 Prepare 1", "111 Prepare 2"]
    harness.leave(P)  # the end of the replaced stream
    assert harness.state() is State.PREPARING
    owner = harness.core.state.directory.owner(participant(P))
    assert owner is not None
    assert owner.session == P + 100


def test_an_acknowledgement_of_an_unknown_transaction_is_worth_a_word_only_if_it_was_ended_by_hand() -> None:
    harness = CoordinatorHarness()
    assert effects(harness.hear(P, acked(1))) == []
    assert effects(harness.hear(P, Acked(xid(), ONE[0].branch, FinishResult.HEURISTIC))) == ["note heuristic outcome"]
    assert isinstance(harness.core, Coordinator)
