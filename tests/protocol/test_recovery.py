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
    Office,
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
from txrpc.errors import AbortCode
from txrpc.ids import Gid
from txrpc.protocol.events import Forgot
from txrpc.protocol.messages import Commit, Inquiry, Outcome, Rollback, Vote
from txrpc.protocol.records import Decision
from txrpc.protocol.recovery import ANSWERS, UP_TO_THE_LOG, Answer, Knowledge, age_of


def asked(office: Office, session: int, message: Inquiry, record: Decision | None = None) -> list[str]:
    """What the branch is told in the end, whether the log had to be asked or not."""
    out = office.hear(session, message)
    told = sent(out)
    for lookup in out.look:
        told += sent(office.looked(lookup, record))
    return told


def _awaited(office: Office) -> list[str]:
    return asked(office, P, inquiry(1, left_ms=1_000))


def _awaited_by_its_own(office: Office) -> list[str]:
    return asked(office, Q, inquiry(1))


def _overdue(office: Office) -> list[str]:
    return asked(office, P, inquiry(1))


def _overdue_and_gone(office: Office) -> list[str]:
    office.leave(P)
    return asked(office, Q, inquiry(1))


def _aborted(office: Office) -> list[str]:
    office.hear(CLIENT, rollback_request(()))
    return asked(office, P, inquiry(1))


def _preparing(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(TWO))
    return asked(office, P, inquiry(1))


def _recording(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(EARLY))
    return asked(office, P, inquiry(1))


def _one_phase(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(ONE))
    return asked(office, P, inquiry(1))


def _committing(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    return asked(office, Q, inquiry(1))


def _committing_not_listed(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    return asked(office, P, inquiry(9))


def _committing_read_only(office: Office) -> list[str]:
    office.hear(CLIENT, commit_request(TWO))
    office.hear(P, voted(1, Vote.READ_ONLY))
    office.hear(P, voted(2))
    office.logged()
    return asked(office, P, inquiry(1))


def _finished(office: Office, branch: int, record: Decision | None) -> list[str]:
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    office.hear(P, acked(1))
    office.hear(P, acked(2))
    return asked(office, P, inquiry(branch), record)


def _pending_of_an_earlier_epoch(_: Office) -> list[str]:
    office = Office(CLIENT, pending=(decision(EARLY),))
    office.join(Q)  # hears of accounts at once; P's word is taken when it comes
    return asked(office, Q, inquiry(1, epoch=EARLIER))


def _older_than_the_log(office: Office) -> list[str]:
    office.step(Forgot(CLOCK))
    return asked(office, P, inquiry(1, epoch=EARLIER))


STORIES: dict[str, tuple[Knowledge, list[str], Callable[[Office], list[str]]]] = {
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
    real = Office().core.__class__._answer

    def spy(core: object, session: int, gid: Gid, knowledge: Knowledge, token: str = "") -> None:
        known.append(knowledge)
        real(core, session, gid, knowledge, token)  # type: ignore[arg-type]

    monkeypatch.setattr("txrpc.protocol.coordinator.Coordinator._answer", spy)
    office = Office(CLIENT, P, Q)
    assert story(office) == told
    assert known == [knowledge]
    assert office.violations == []


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
    office = Office()
    assert _overdue(office) == ["11 Rollback 1"]
    office.hear(CLIENT, commit_request(EARLY))
    (reply,) = office.replies()
    assert (reply.outcome, reply.reason and reply.reason.code) == (Outcome.ABORTED, AbortCode.PRESUMED)
    assert office.all.append == []


def test_what_is_told_to_a_foreign_process_names_the_branch_as_its_database_knows_it() -> None:
    office = Office(CLIENT, P, Q, pending=(decision(EARLY, tx=3),))
    office.join(P + 100)
    commits = [m for _, m in office.all.send if isinstance(m, Commit)]
    assert {m.gid for m in commits} >= {gid(1, tx=3, epoch=EARLIER), gid(2, tx=3, resource="audit", epoch=EARLIER)}
    assert {m.token for m in commits} == {"t1", "t2"}


def test_a_strange_epoch_is_said_to_the_operator_and_ends_nothing() -> None:
    office = Office()
    out = office.hear(P, inquiry(1, epoch=STRANGE))
    (note,) = out.notes
    assert (note.level, note.event) == ("error", "branch of a strange epoch")
    assert note.fields["xid"] == xid()
    office.hear(CLIENT, outcome_request(epoch=STRANGE))
    assert not [m for _, m in office.looked(office.all.look[-1], None).send if isinstance(m, Rollback)]
    assert office.replies()[-1].outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("field", [{"group": "shop"}, {"node": "c2"}])
def test_a_branch_of_another_coordinator_is_none_of_our_business(field: dict[str, str]) -> None:
    office = Office()
    mine = gid(1)
    values = {name: getattr(mine, name) for name in Gid.__slots__} | field
    out = office.hear(P, Inquiry(Gid(**values)))
    assert sent(out) == []
    assert out.look == []
    assert office.violations == ["asks about a branch of another coordinator"]


def test_rule_15_who_does_not_have_the_resource_cannot_take_a_commit_away_from_who_has() -> None:
    """A commit that was told to somebody who cannot carry it out would wait for that one's acknowledgement for ever."""
    office = Office()
    office.hear(CLIENT, commit_request(EARLY))
    office.logged()
    assert sent(office.hear(CLIENT, inquiry(1))) == []
    assert office.violations == ["asks about a branch in a resource that it does not have"]
    office.hear(P, acked(1))
    office.hear(P, acked(2))
    assert office.outcomes() == [Outcome.COMMITTED]


def test_pending_decisions_wait_for_their_resources_and_are_marked_done_once() -> None:
    office = Office(CLIENT, pending=(decision(EARLY), decision((EARLY[0],), tx=2)))
    assert office.core.deciding == 0
    assert sent(office.join(Q)) == ["12 Welcome", "12 Commit 1", "12 Commit 1"]
    office.hear(Q, acked(1))
    office.hear(Q, acked(1, tx=2))
    assert office.all.done == [xid(2)]
    assert sent(office.join(P)) == ["11 Welcome", "11 Commit 2"]
    office.hear(P, acked(2))
    assert office.all.done == [xid(2), xid(1)]
    assert office.leftovers() == ([], [], [])
    office.sleep(20 * LIMITS.max_timeout_ms)
    assert office.all.done == [xid(2), xid(1)]
