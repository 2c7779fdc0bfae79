"""Rules 17 and 18 at the door: one name is one database, and a log that has lost decisions decides nothing."""

from __future__ import annotations

import pytest

from tests.protocol.coordinator_kit import (
    CLIENT,
    CLOCK,
    EARLIER,
    EARLY,
    EPOCH,
    OWNER,
    STRANGE,
    TWO,
    CoordinatorHarness,
    P,
    Q,
    R,
    commit_request,
    decision,
    effects,
    hello,
    inquiry,
    outcome_request,
)
from txrpc._protocol.coordinator.admission import is_behind, refuse_resources
from txrpc._protocol.coordinator.events import Bound, Limits, Logged, Output, Rebind
from txrpc._protocol.messages import Commit, Hello, Outcome, OutcomeReply, Owner, ResourceInfo, Rollback, Tick, Welcome
from txrpc.ids import Epoch


def announcing(*resources: tuple[str, str]) -> Hello:
    return hello(CLIENT, resources=tuple(ResourceInfo(name, "test", identity) for name, identity in resources))


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ((("accounts", "db-1"),), ""),
        ((("accounts", ""),), ""),
        ((("stock", "db-9"),), ""),
        ((("stock", ""), ("shelf", "")), ""),
        ((("accounts", "db-2"),), "resource 'accounts' is database db-2 in process process 1, and was db-1 until now"),
        ((("stock", "db-1"),), "resource 'stock' of process process 1 is database db-1, which is known as 'accounts'"),
        (
            (("stock", "db-9"), ("shelf", "db-9")),
            "'shelf' of process process 1 is database db-9, which is known as 'stock'",
        ),
    ],
)
def test_rule_17_one_name_means_one_database_and_one_database_has_one_name(
    resources: tuple[tuple[str, str], ...], says: str
) -> None:
    """F6, G6.  What has no identity cannot be told apart, and is let in (F15)."""
    refusal = refuse_resources(announcing(*resources), {"accounts": "db-1"})
    assert (refusal is not None) == bool(says)
    if refusal is not None:
        assert refusal.text.startswith(says) or says in refusal.text
        assert refusal.retry


def test_rule_17_a_name_is_bound_when_it_is_first_seen_and_stays_bound_when_its_process_has_gone() -> None:
    harness = CoordinatorHarness(CLIENT)
    assert harness.join(P, identity="db-1").close != []  # two names of one database
    out = harness.step_hello(R, ResourceInfo("stock", "test", "db-7"))
    assert out.bind == {"stock": "db-7"}
    assert harness.step_hello(R + 100, ResourceInfo("stock", "test", "db-7")).bind == {}
    harness.leave(R)
    harness.leave(R + 100)
    (refused,) = harness.step_hello(Q, ResourceInfo("stock", "test", "db-8")).close
    assert refused[1].code == "resource_conflict"
    assert "txrpc rebind stock db-8" in refused[1].text


def test_rule_17_an_operator_rebinds_and_whoever_means_the_old_one_leaves() -> None:
    harness = CoordinatorHarness(CLIENT)
    harness.step_hello(R, ResourceInfo("stock", "test", "db-7"))
    out = harness.step(Rebind("stock", "db-8"))
    assert out.rebind == {"stock": "db-8"}
    assert [(session, farewell.code) for session, farewell in out.close] == [(R, "rebound")]
    assert harness.step_hello(R + 100, ResourceInfo("stock", "test", "db-7")).close != []
    assert harness.step_hello(Q, ResourceInfo("stock", "test", "db-8")).close == []
    assert harness.step(Rebind("stock")).rebind == {"stock": ""}
    assert harness.step_hello(R + 200, ResourceInfo("stock", "test", "db-7")).bind == {"stock": "db-7"}


def test_rule_17_what_another_coordinator_has_bound_in_the_same_log_holds_here_too() -> None:
    """It was bound here as well, in the same moment, and the other one was faster."""
    harness = CoordinatorHarness(CLIENT)
    harness.step_hello(R, ResourceInfo("stock", "test", "db-7"))
    harness.step_hello(Q, ResourceInfo("stock", "test", ""))
    out = harness.step(Bound({"stock": "db-8", "other": "db-9"}))
    assert [(session, farewell.code) for session, farewell in out.close] == [(R, "rebound")]
    assert (out.bind, out.rebind) == ({}, {})
    assert harness.core.state.identities == {"stock": "db-8", "other": "db-9"}
    assert harness.step(Bound({"stock": "db-8", "other": "db-9"})) == Output()
    assert harness.step(Bound({"other": ""})).rebind == {}
    assert harness.step_hello(Q, ResourceInfo("other", "test", "db-5")).bind == {"other": "db-5"}


# ------------------------------------------------------------------------------------------------------ rule 18


@pytest.mark.parametrize(
    ("seen", "position", "behind"),
    [
        (None, 0, False),
        (None, 99, False),
        (Owner("c1", EARLIER), 40, False),
        (Owner("c1", EARLIER), 41, True),
        (Owner("c2", EARLIER), 41, False),  # another node's log
        (OWNER, 99, False),  # the epoch of now: such a process is mistaken, and ends nobody's coordinator
        (Owner("c1", STRANGE), 99, False),  # refused as a stranger
    ],
)
def test_rule_18_a_process_that_has_seen_more_than_the_log_proves_it_behind(
    seen: Owner | None, position: int, behind: bool
) -> None:
    assert bool(is_behind(hello(CLIENT, seen=seen, position=position), OWNER, {EARLIER: 40})) == behind


def test_rule_18_a_log_that_is_behind_welcomes_nobody_who_knows_and_says_so() -> None:
    harness = CoordinatorHarness(CLIENT, ends={EARLIER: 40})
    out = harness.join(P, seen=Owner("c1", EARLIER), position=41)
    assert "has seen position 41" in out.behind
    assert [farewell.code for _, farewell in out.close] == ["log_behind"]
    assert out.send == []


def test_rule_18_whoever_is_spoken_to_hears_the_position() -> None:
    harness = CoordinatorHarness(CLIENT, P, ends={EARLIER: 40})
    assert {m.position for _, m in harness.all.send if isinstance(m, Welcome)} == {40}
    harness.hear(CLIENT, commit_request(EARLY))
    out = harness.step(Logged((commit_request(EARLY).xid,), 43))
    assert {m.position for _, m in out.send if isinstance(m, Commit)} == {43}
    harness.sleep(10_000)
    assert {m.position for _, m in harness.all.send if isinstance(m, Tick)} == {43}
    harness.hear(CLIENT, outcome_request())
    assert {m.position for _, m in harness.all.send if isinstance(m, OutcomeReply)} == {43}


WAITS = Limits(max_timeout_ms=60_000, ack_wait_ms=5_000, recovery_wait_ms=2_000)


def test_rule_18_nothing_is_presumed_about_an_earlier_epoch_until_others_could_have_objected() -> None:
    """F2: a restored log has no record, and the process that knows of it may connect after the one that asks."""
    harness = CoordinatorHarness(CLIENT, P, limits=WAITS)
    (look,) = harness.hear(P, inquiry(1, epoch=EARLIER)).look
    assert harness.looked(look, None).send == []
    (asked,) = harness.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
    assert harness.looked(asked, None).send == []
    assert harness.sleep(1_999) == []
    assert harness.all.look == [look, asked]
    harness.sleep(1)
    for again in harness.all.look[2:]:
        harness.looked(again, None)
    kinds = [type(message) for _, message in harness.all.send if isinstance(message, Rollback | OutcomeReply)]
    assert sorted(kind.__name__ for kind in kinds) == ["OutcomeReply", "Rollback", "Rollback", "Rollback"]


def test_what_is_on_record_is_told_at_once() -> None:
    harness = CoordinatorHarness(CLIENT, P, limits=WAITS)
    (asked,) = harness.hear(CLIENT, outcome_request(TWO, epoch=EARLIER)).look
    harness.looked(asked, decision())
    assert harness.outcomes() == [Outcome.COMMITTED]


@pytest.mark.parametrize("epoch", [EARLIER, EPOCH])
def test_a_branch_that_was_prepared_before_the_last_record_was_deleted_is_left_alone(epoch: Epoch) -> None:
    """Its database was restored, perhaps: its siblings may have committed long ago, and their record may be gone."""
    harness = CoordinatorHarness(CLIENT, P, forgotten_ms=CLOCK - 500)
    (look,) = harness.hear(P, inquiry(1, epoch=epoch)).look  # prepared for 1,000 ms
    out = harness.looked(look, None)
    assert out.send == []
    assert [note.event for note in out.notes] == ["branch older than the log"]
    assert [report.text for report in harness.core.state.reports.shown(harness.now_ms)] == [
        "prepared, and this log cannot know its decision: nothing is done about it here"
    ]
    younger = CoordinatorHarness(CLIENT, P, forgotten_ms=CLOCK - 1_001)
    (look,) = younger.hear(P, inquiry(1, epoch=epoch)).look
    assert [type(message) for _, message in younger.looked(look, None).send] == [Rollback]


# ----------------------------------------------------------------------------- resources that are not ready yet (G7)

AWAY = (ResourceInfo("accounts", "test", "", "its database is out of reach"), ResourceInfo("audit", "test", "db-2"))


def test_rule_14_what_is_decided_waits_for_a_resource_that_is_not_ready_and_goes_to_it_when_it_is() -> None:
    harness = CoordinatorHarness(CLIENT, pending=(decision(),))
    assert effects(harness.join(P, resources=AWAY)) == [f"{P} Welcome", f"{P} Commit 2"], "only what it can finish"
    assert effects(harness.hear(P, hello(P, resources=(ResourceInfo("accounts", "test", "db-1"), AWAY[1])))) == [
        f"{P} Commit 1"
    ]


def test_rule_17_a_resource_that_becomes_ready_is_bound_to_its_database_and_held_against_the_log() -> None:
    harness = CoordinatorHarness(CLIENT)
    harness.join(P, resources=AWAY)
    assert harness.core.state.identities == {"audit": "db-2"}
    out = harness.hear(P, hello(P, resources=(ResourceInfo("accounts", "test", "db-1"), AWAY[1])))
    assert out.bind == {"accounts": "db-1"}
    harness.join(Q, resources=AWAY[:1])
    ((session, farewell),) = harness.hear(Q, hello(Q, resources=(ResourceInfo("accounts", "test", "db-9"),))).close
    assert (session, farewell.code, farewell.retry) == (Q, "resource_conflict", True)
    assert sorted(harness.core.state.directory.sessions) == [CLIENT, P]


def test_a_resource_that_is_not_ready_any_more_is_not_given_away_again() -> None:
    harness = CoordinatorHarness(CLIENT, pending=(decision(),))
    harness.join(P, resources=AWAY)
    assert not harness.core.state.directory.has("accounts")
    assert harness.core.state.directory.has("audit")
    harness.leave(P)
    assert not harness.core.state.directory.has("audit")
