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
    Office,
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
from txrpc.errors import AbortCode, ConfigurationError
from txrpc.protocol.coordinator import Coordinator
from txrpc.protocol.events import Drain, Limits, LogHealth, Looked
from txrpc.protocol.messages import (
    Acked,
    CommitRequest,
    Finish,
    Outcome,
    OutcomeRequest,
    RollbackRequest,
    Tick,
    Vote,
    Wait,
    Welcome,
)
from txrpc.protocol.transaction import State


def code(office: Office, session: int = CLIENT) -> AbortCode:
    reason = office.replies(session)[-1].reason
    assert reason is not None
    return reason.code


def refusal(request: CommitRequest, limits: Limits = LIMITS) -> AbortCode:
    office = Office(limits=limits)
    office.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    office.hear(CLIENT, request)
    assert office.outcomes() == [Outcome.ABORTED]
    assert office.state(2) is State.PREPARING, "nothing else suffers"
    return code(office)


def test_at_a_limit_a_request_is_refused_with_its_name() -> None:
    assert refusal(commit_request(), Limits(max_transactions=1)) is AbortCode.LIMIT_EXCEEDED
    three = (*TWO, ref(3))
    assert refusal(commit_request(three), Limits(max_branches=2)) is AbortCode.LIMIT_EXCEEDED
    assert refusal(commit_request((ref(1), ref(1)))) is AbortCode.PROTOCOL_VIOLATION
    assert refusal(dataclasses.replace(commit_request(), time_left_ms=0)) is AbortCode.TIMED_OUT


def test_sessions_are_limited_and_a_process_may_always_come_back() -> None:
    office = Office(CLIENT, P, limits=Limits(max_sessions=2))
    assert effects(office.join(Q)) == ["close 12 limit", "note session refused"]
    assert effects(office.join(P + 100)) == ["111 Welcome", "close 11 replaced"]


def test_no_time_left_is_longer_than_the_longest() -> None:
    office = Office()
    office.hear(CLIENT, dataclasses.replace(commit_request(), time_left_ms=2**31))
    office.sleep(LIMITS.max_timeout_ms)
    assert code(office) is AbortCode.TIMED_OUT


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="max_branches is 0"):
        Limits(max_branches=0)


def test_while_the_log_is_in_trouble_commits_are_refused_and_readers_are_not_hurt() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(TWO))
    office.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    office.step(LogHealth(False))
    for tx, vote in ((1, Vote.READ_ONLY), (2, Vote.PREPARED)):
        for number in (1, 2):
            office.hear(P, voted(number, vote, tx=tx))
    assert office.outcomes() == [Outcome.COMMITTED]
    (reply,) = office.replies(OTHER_CLIENT, tx=2)
    assert str(reply.reason) == "log unavailable: the decision log does not answer"
    office.hear(CLIENT, commit_request(TWO, tx=3))
    assert [r.outcome for r in office.replies(tx=3)] == [Outcome.ABORTED]
    office.step(LogHealth(True))
    office.hear(CLIENT, commit_request(TWO, tx=4))
    assert office.state(4) is State.PREPARING


def test_a_draining_coordinator_finishes_what_it_decides_and_begins_nothing() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(TWO))
    office.step(Drain())
    assert office.core.deciding == 1
    office.hear(OTHER_CLIENT, commit_request(TWO, tx=2))
    (reply,) = office.replies(OTHER_CLIENT, tx=2)
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.SHUTTING_DOWN
    office.hear(P, voted(1))
    office.hear(P, voted(2))
    office.logged()
    assert office.core.deciding == 0


def test_the_clients_commit_waits_for_acknowledgements_but_not_for_ever() -> None:
    office = Office()
    office.hear(CLIENT, commit_request(EARLY))
    office.hear(OTHER_CLIENT, commit_request(EARLY, wait=Wait.DECISION))
    assert sent(office.logged())[-1] == "2 reply COMMITTED pending accounts pending audit"
    office.hear(P, acked(1))
    assert sent(office.sleep(LIMITS.ack_wait_ms - 1)) == []
    assert sent(office.sleep(1)) == ["1 reply COMMITTED pending audit"]
    assert sent(office.hear(P, acked(2))) == []
    assert office.all.done == [xid()]


def test_a_transaction_without_branches_commits_at_once() -> None:
    office = Office()
    assert effects(office.hear(CLIENT, commit_request(()))) == ["1 reply COMMITTED"]


def test_sessions_are_told_the_time() -> None:
    office = Office(CLIENT)
    (welcome,) = [m for _, m in office.all.send if isinstance(m, Welcome)]
    assert (welcome.owner, welcome.tick) == (OWNER, BEGUN)
    office.sleep(3 * LIMITS.tick_ms)
    ticks = [m.tick for _, m in office.all.send if isinstance(m, Tick)]
    assert ticks == [BEGUN + 5, BEGUN + 10, BEGUN + 15]
    office.leave(CLIENT)
    assert office.core.next_wakeup_ms() is None


def test_time_never_runs_backwards() -> None:
    office = Office()
    office.now_ms += 10_000
    office.step(Drain())
    office.now_ms -= 20_000
    office.step(Drain())
    assert office.core.tick == BEGUN + 10


def test_answers_to_sessions_that_are_gone_are_dropped() -> None:
    office = Office()
    (lookup,) = office.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
    office.leave(CLIENT)
    assert effects(office.step(Looked(lookup, None))) == []
    office.hear(OTHER_CLIENT, commit_request(EARLY))
    office.leave(OTHER_CLIENT)
    assert sent(office.logged()) == ["11 Commit 1", "11 Commit 2"]


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
        office = Office()
        for lookup in office.hear(CLIENT, request).look:
            office.looked(lookup, None)
        assert len(office.replies()) == 1
        assert office.replies(OTHER_CLIENT) == []


def test_the_process_of_a_participant_id_is_its_last_session() -> None:
    office = Office()
    office.join(P + 100)
    assert sent(office.hear(CLIENT, commit_request(TWO))) == ["111 Prepare 1", "111 Prepare 2"]
    office.leave(P)  # the end of the replaced stream
    assert office.state() is State.PREPARING
    owner = office.core.directory.owner(participant(P))
    assert owner is not None
    assert owner.session == P + 100


def test_an_acknowledgement_of_an_unknown_transaction_is_worth_a_word_only_if_it_was_ended_by_hand() -> None:
    office = Office()
    assert effects(office.hear(P, acked(1))) == []
    assert effects(office.hear(P, Acked(xid(), ONE[0].branch, Finish.HEURISTIC))) == ["note heuristic outcome"]
    assert isinstance(office.core, Coordinator)
