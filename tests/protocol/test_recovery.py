"""What a prepared branch that asks is told: everything that a coordinator can know, reached through the door."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.protocol.coordinator_kit import (
    CLIENT,
    CLOCK,
    EARLIER,
    EARLY,
    EPOCH,
    LIMITS,
    ONE,
    STRANGE,
    TWO,
    CoordinatorHarness,
    P,
    Q,
    acked,
    commit_request,
    decision,
    gid,
    inquiry,
    outcome_request,
    rollback_request,
    sent,
    voted,
    xid,
)
from txrpc._protocol.coordinator import recovery
from txrpc._protocol.coordinator.events import Forgot
from txrpc._protocol.coordinator.knowledge import ANSWERS, UP_TO_THE_LOG, Answer, Knowledge, age_of
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.messages import Commit, Inquiry, Outcome, Rollback, Vote
from txrpc._protocol.records import Decision
from txrpc.errors import AbortCode
from txrpc.ids import Gid


def asked(harness: CoordinatorHarness, session: int, message: Inquiry, record: Decision | None = None) -> list[str]:
    """What the branch is told in the end, whether the log had to be asked or not."""
    out = harness.hear(session, message)
    told = sent(out)
    for lookup in out.look:
        told += sent(harness.looked(lookup, record))
    return told


def _awaited(harness: CoordinatorHarness) -> list[str]:
    return asked(harness, P, inquiry(1, left_ms=1_000))


def _awaited_by_its_own(harness: CoordinatorHarness) -> list[str]:
    return asked(harness, Q, inquiry(1))


def _overdue(harness: CoordinatorHarness) -> list[str]:
    return asked(harness, P, inquiry(1))


def _overdue_and_gone(harness: CoordinatorHarness) -> list[str]:
    harness.leave(P)
    return asked(harness, Q, inquiry(1))


def _aborted(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, rollback_request(()))
    return asked(harness, P, inquiry(1))


def _preparing(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(TWO))
    return asked(harness, P, inquiry(1))


def _recording(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(EARLY))
    return asked(harness, P, inquiry(1))


def _one_phase(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(ONE))
    return asked(harness, P, inquiry(1))


def _committing(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    return asked(harness, Q, inquiry(1))


def _committing_not_listed(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    return asked(harness, P, inquiry(9))


def _committing_read_only(harness: CoordinatorHarness) -> list[str]:
    harness.hear(CLIENT, commit_request(TWO))
    harness.hear(P, voted(1, Vote.READ_ONLY))
    harness.hear(P, voted(2))
    harness.logged()
    return asked(harness, P, inquiry(1))


def _finished(harness: CoordinatorHarness, branch: int, record: Decision | None) -> list[str]:
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    return asked(harness, P, inquiry(branch), record)


def _pending_of_an_earlier_epoch(_: CoordinatorHarness) -> list[str]:
    harness = CoordinatorHarness(CLIENT, pending=(decision(EARLY),))
    harness.join(Q)  # hears of accounts at once; P's word is taken when it comes
    return asked(harness, Q, inquiry(1, epoch=EARLIER))


def _older_than_the_log(harness: CoordinatorHarness) -> list[str]:
    harness.step(Forgot(CLOCK))
    return asked(harness, P, inquiry(1, epoch=EARLIER))


STORIES: dict[str, tuple[Knowledge, list[str], Callable[[CoordinatorHarness], list[str]]]] = {
    "its root may still ask": (Knowledge.AWAITED, [], _awaited),
    "its own process is there to ask": (Knowledge.AWAITED, [], _awaited_by_its_own),
    "nobody will ask any more": (Knowledge.OVERDUE, ["11 Rollback 1"], _overdue),
    "its process is gone": (Knowledge.OVERDUE, ["12 Rollback 1"], _overdue_and_gone),
    "given up": (Knowledge.ABORTED, ["11 Rollback 1"], _aborted),
    "votes are missing": (Knowledge.BEING_DECIDED, [], _preparing),
    "being recorded": (Knowledge.BEING_DECIDED, [], _recording),
    "being committed in one phase": (Knowledge.BEING_DECIDED, [], _one_phase),
    "decided": (Knowledge.COMMITTED, ["12 Commit 1"], _committing),
    "decided without it": (Knowledge.NOT_IN_RECORD, ["11 Rollback 9"], _committing_not_listed),
    "decided, it had only read": (Knowledge.NOT_IN_RECORD, ["11 Rollback 1"], _committing_read_only),
    "finished": (Knowledge.COMMITTED, ["11 Commit 1"], lambda o: _finished(o, 1, decision())),
    "finished without it": (Knowledge.NOT_IN_RECORD, ["11 Rollback 9"], lambda o: _finished(o, 9, decision())),
    "finished without a record": (Knowledge.NOT_IN_RECORD, ["11 Rollback 9"], lambda o: _finished(o, 9, None)),
    "pending from an earlier epoch": (Knowledge.COMMITTED, ["12 Commit 1"], _pending_of_an_earlier_epoch),
    "done under an earlier epoch": (
        Knowledge.COMMITTED,
        ["11 Commit 1"],
        lambda o: asked(o, P, inquiry(1, epoch=EARLIER), decision()),
    ),
    "done under an earlier epoch, without it": (
        Knowledge.NOT_IN_RECORD,
        ["11 Rollback 9"],
        lambda o: asked(o, P, inquiry(9, epoch=EARLIER), decision()),
    ),
    "of an earlier epoch": (Knowledge.EARLIER, ["11 Rollback 1"], lambda o: asked(o, P, inquiry(1, epoch=EARLIER))),
    "older than what was forgotten": (Knowledge.FORGOTTEN, [], _older_than_the_log),
    "of a strange epoch": (Knowledge.STRANGE, [], lambda o: asked(o, P, inquiry(1, epoch=STRANGE))),
}


@pytest.mark.parametrize("name", STORIES)
def test_what_a_branch_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge, told, story = STORIES[name]
    known: list[Knowledge] = []
    real = recovery._answer

    def spy(state: CoordinatorState, session: int, message: Inquiry, knowledge: Knowledge, token: str = "") -> None:
        known.append(knowledge)
        real(state, session, message, knowledge, token)

    monkeypatch.setattr(recovery, "_answer", spy)
    harness = CoordinatorHarness(CLIENT, P, Q)
    assert story(harness) == told
    assert known == [knowledge]
    assert harness.violations == []


def test_everything_that_can_be_known_has_an_answer_and_a_story() -> None:
    assert set(ANSWERS) == set(Knowledge) == {knowledge for knowledge, _, _ in STORIES.values()}
    for knowledge, told, _ in STORIES.values():
        word = told[0].split()[1] if told else None
        assert (
            word
            == {
                Answer.COMMIT: "Commit",
                Answer.ROLL_BACK: "Rollback",
                Answer.PRESUME: "Rollback",
                Answer.WAIT: None,
                Answer.REFUSE: None,
            }[ANSWERS[knowledge]]
        )


def test_every_rollback_without_a_memory_and_every_commit_without_a_row_is_proved_by_the_log() -> None:
    """All but ABORTED and NOT_IN_RECORD, which come from a memory or a record themselves."""
    ends = {knowledge for knowledge, answer in ANSWERS.items() if answer not in (Answer.WAIT, Answer.REFUSE)}
    assert ends - UP_TO_THE_LOG == {Knowledge.ABORTED, Knowledge.NOT_IN_RECORD}


def test_the_age_of_epochs() -> None:
    lineage = frozenset({EARLIER, EPOCH})
    assert age_of(EPOCH, EPOCH, lineage) is Knowledge.OVERDUE
    assert age_of(EARLIER, EPOCH, lineage) is Knowledge.EARLIER
    assert age_of(STRANGE, EPOCH, lineage) is Knowledge.STRANGE


def test_a_presumed_abort_is_remembered_and_the_commit_refused() -> None:
    harness = CoordinatorHarness()
    assert _overdue(harness) == ["11 Rollback 1"]
    harness.hear(CLIENT, commit_request(EARLY))
    (reply,) = harness.replies()
    assert (reply.outcome, reply.reason and reply.reason.code) == (Outcome.ABORTED, AbortCode.PRESUMED)
    assert harness.all.append == []


def test_what_is_told_to_a_foreign_process_names_the_branch_as_its_database_knows_it() -> None:
    harness = CoordinatorHarness(CLIENT, P, Q, pending=(decision(EARLY, tx=3),))
    harness.join(P + 100)
    commits = [m for _, m in harness.all.send if isinstance(m, Commit)]
    assert {m.gid for m in commits} >= {gid(1, tx=3, epoch=EARLIER), gid(2, tx=3, resource="audit", epoch=EARLIER)}
    assert {m.token for m in commits} == {"t1", "t2"}


def test_a_strange_epoch_is_said_to_the_operator_and_ends_nothing() -> None:
    harness = CoordinatorHarness()
    out = harness.hear(P, inquiry(1, epoch=STRANGE))
    (note,) = out.notes
    assert (note.level, note.event) == ("error", "branch of a strange epoch")
    assert note.fields["xid"] == xid()
    harness.hear(CLIENT, outcome_request(epoch=STRANGE))
    assert not [m for _, m in harness.looked(harness.all.look[-1], None).send if isinstance(m, Rollback)]
    assert harness.replies()[-1].outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("field", [{"group": "shop"}, {"node": "c2"}])
def test_a_branch_of_another_coordinator_is_none_of_our_business(field: dict[str, str]) -> None:
    harness = CoordinatorHarness()
    mine = gid(1)
    values = {name: getattr(mine, name) for name in Gid.__slots__} | field
    out = harness.hear(P, Inquiry(Gid(**values)))
    assert sent(out) == []
    assert out.look == []
    assert harness.violations == ["asks about a branch of another coordinator"]


def test_rule_15_who_does_not_have_the_resource_cannot_take_a_commit_away_from_who_has() -> None:
    """A commit that was told to somebody who cannot carry it out would wait for that one's acknowledgement for ever."""
    harness = CoordinatorHarness()
    harness.hear(CLIENT, commit_request(EARLY))
    harness.logged()
    assert sent(harness.hear(CLIENT, inquiry(1))) == []
    assert harness.violations == ["asks about a branch in a resource that it does not have"]
    harness.hear(P, acked(1))
    harness.hear(P, acked(2))
    assert harness.outcomes() == [Outcome.COMMITTED]


def test_pending_decisions_wait_for_their_resources_and_are_marked_done_once() -> None:
    harness = CoordinatorHarness(CLIENT, pending=(decision(EARLY), decision((EARLY[0],), tx=2)))
    assert harness.core.deciding == 0
    assert sent(harness.join(Q)) == ["12 Welcome", "12 Commit 1", "12 Commit 1"]
    harness.hear(Q, acked(1))
    harness.hear(Q, acked(1, tx=2))
    assert harness.all.done == [xid(2)]
    assert sent(harness.join(P)) == ["11 Welcome", "11 Commit 2"]
    harness.hear(P, acked(2))
    assert harness.all.done == [xid(2), xid(1)]
    assert harness.leftovers() == ([], [], [])
    harness.sleep(20 * LIMITS.max_timeout_ms)
    assert harness.all.done == [xid(2), xid(1)]
