"""What every decision log must do (design, section 6), over every implementation."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from tests.log.conftest import Place, keep_at_most
from txrpc._decision_log.port import Decision, DecisionLog, Heartbeats, NotRecorded, PreparedBranch, RecordUncertain
from txrpc._group.log import GroupLog
from txrpc._protocol.messages import FinishResult
from txrpc._protocol.records import Incident
from txrpc._protocol.takeover import LEFT
from txrpc.errors import Fenced
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid

Open = Callable[[], DecisionLog]


def decision(epoch: Epoch, decided_ms: int = 1_000, branches: int = 2) -> Decision:
    prepared = tuple(
        PreparedBranch(BranchId(os.urandom(8)), ParticipantId(os.urandom(8)), f"bank-{i}", str(700 + i))
        for i in range(branches)
    )
    return Decision(Xid.make(decided_ms, os.urandom(10)), epoch, decided_ms, prepared)


def test_a_new_log_opens_epoch_one_with_nothing_pending(open_log: Open) -> None:
    opened = open_log().open("c1", 77)
    assert opened.epoch == Epoch.make(1, 77)
    assert opened.lineage == {}
    assert opened.pending == ()
    assert (opened.forgotten_ms, opened.clock_ms) == (0, 0)


def test_what_was_recorded_is_found_again_by_the_next_epoch(open_log: Open) -> None:
    first = open_log()
    epoch = first.open("c1", 1).epoch
    decisions = [decision(epoch, 1_000), decision(epoch, 3_000, branches=5), decision(epoch, 2_000, branches=1)]
    first.record(decisions)
    assert list(first.pending()) == sorted(first.pending(), key=lambda d: d.decided_ms)
    opened = open_log().open("c1", 2)
    assert opened.epoch == Epoch.make(2, 2)
    assert opened.lineage == {epoch: 3}
    assert opened.position == 3
    assert set(opened.pending) == set(decisions)
    assert opened.clock_ms == 3_000


def test_outcome_finds_a_record_done_or_not(open_log: Open) -> None:
    log = open_log()
    epoch = log.open("c1", 1).epoch
    one = decision(epoch)
    log.record([one])
    assert log.outcome(one.xid) == one
    log.done([one.xid], 2_000)
    assert log.outcome(one.xid) == one
    assert list(log.pending()) == []
    assert log.outcome(Xid(bytes(16))) is None


def test_recording_the_same_decision_again_is_fine(open_log: Open) -> None:
    log = open_log()
    one = decision(log.open("c1", 1).epoch)
    log.record([one])
    log.record([one, decision(one.epoch)])
    assert len(log.pending()) == 2


def test_a_decision_never_changes(open_log: Open) -> None:
    log = open_log()
    one = decision(log.open("c1", 1).epoch)
    other = decision(one.epoch)
    log.record([one])
    with pytest.raises(AssertionError):
        log.record([other, Decision(one.xid, one.epoch, one.decided_ms, one.branches[:1])])
    with pytest.raises(AssertionError):
        log.record([other, Decision(one.xid, one.epoch, one.decided_ms + 1, one.branches)])
    assert log.outcome(one.xid) == one
    assert log.outcome(other.xid) is None


def test_an_empty_batch_only_asks_whether_it_works(open_log: Open) -> None:
    log = open_log()
    log.open("c1", 1)
    log.record([])
    assert list(log.pending()) == []


def test_nodes_do_not_see_each_other(open_log: Open) -> None:
    first, second = open_log(), open_log()
    one = decision(first.open("c1", 1).epoch)
    second.open("c2", 1)
    first.record([one])
    assert list(second.pending()) == []
    assert second.outcome(one.xid) is None
    first.record([decision(one.epoch)])


def test_forget_deletes_old_done_records_in_batches_and_remembers_until_when(open_log: Open) -> None:
    log = open_log()
    epoch = log.open("c1", 1).epoch
    decisions = [decision(epoch, i) for i in range(1, 8)]
    log.record(decisions)
    log.done([d.xid for d in decisions[:5]], 100)
    log.done([decisions[5].xid], 900)
    assert log.forget(101, 3) == 3
    assert log.forget(101, 3) == 2
    assert log.forget(101, 3) == 0
    assert log.outcome(decisions[5].xid) == decisions[5]
    assert list(log.pending()) == [decisions[6]]
    opened = open_log().open("c1", 2)
    assert opened.forgotten_ms == 101
    assert opened.clock_ms >= 101


@pytest.mark.parametrize("place", ["memory", "etcd", "group"], indirect=True)
def test_rule_12_a_log_that_is_too_full_says_so_before_it_forgets(
    open_log: Open, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is deleted before the retention time only after the coordinator has heard of it."""
    keep_at_most(3, place, monkeypatch)
    log = open_log()
    epoch = log.open("c1", 1).epoch
    decisions = [decision(epoch, i) for i in range(1, 7)]
    log.record(decisions)
    for each in decisions[:3]:
        log.done([each.xid], 100 + each.decided_ms)
    assert log.overflow_ms() == 0
    for each in decisions[3:5]:
        log.done([each.xid], 100 + each.decided_ms)
    assert log.overflow_ms() == 103
    assert log.forget(50, 1_000) == 0
    assert log.forget(103, 1_000) == 2
    assert log.overflow_ms() == 0
    assert open_log().open("c1", 2).forgotten_ms == 103


def test_rule_7_every_write_of_an_earlier_epoch_is_fenced(open_log: Open) -> None:
    old, new = open_log(), open_log()
    epoch = old.open("c1", 1).epoch
    one = decision(epoch)
    old.record([one])
    new.open("c1", 2)
    for write in (
        lambda: old.record([decision(epoch)]),
        lambda: old.record([]),
        lambda: old.done([one.xid], 5),
        lambda: old.forget(10, 10),
    ):
        with pytest.raises(Fenced, match=r"2\.00000002"):
            write()
    assert list(new.pending()) == [one]
    new.record([decision(epoch)])


def test_rule_7_after_open_has_returned_no_earlier_epoch_records(open_log: Open) -> None:
    """Two programs hammer one log: nothing that the first recorded after the second had opened may be there.

    What was under way may be there, though its program hears of the fence: a quorum cannot say that nothing was written.
    """
    old, new = open_log(), open_log()
    epoch = old.open("c1", 1).epoch
    recorded: list[Xid] = []
    under_way: list[Xid] = []
    opened = threading.Event()
    errors: list[str] = []

    def hammer() -> None:
        for _ in range(2_000):
            late = opened.is_set()
            one = decision(epoch)
            try:
                old.record([one])
            except Fenced:
                if isinstance(old, GroupLog):
                    under_way.append(one.xid)
                return
            except (NotRecorded, RecordUncertain) as error:
                errors.append(str(error))
                return
            if late:
                errors.append("recorded after open had returned")
                return
            recorded.append(one.xid)

    thread = threading.Thread(target=hammer)
    thread.start()
    while len(recorded) < 5 and thread.is_alive():
        time.sleep(0.001)
    found = {d.xid for d in new.open("c1", 2).pending}
    opened.set()
    thread.join(60)
    assert errors == []
    assert {d.xid for d in new.pending()} == found
    assert set(recorded) <= found <= {*recorded, *under_way}


def test_rule_18_the_position_grows_with_every_batch_and_is_that_of_the_whole_history(open_log: Open) -> None:
    log = open_log()
    first = log.open("c1", 1)
    assert first.position == 0
    batch = [decision(first.epoch), decision(first.epoch)]
    assert log.record(batch) == 2
    assert log.record([]) == 2
    assert log.record(batch) >= 2  # the same again may raise it
    assert log.record([decision(first.epoch)]) >= 3
    log.done([batch[0].xid], 2_000)
    log.forget(3_000, 10)
    second = open_log()
    opened = second.open("c1", 2)
    assert opened.position >= 3
    assert opened.lineage == {first.epoch: opened.position}
    reached = second.record([decision(opened.epoch)])
    assert reached == opened.position + 1
    assert open_log().open("c1", 3).lineage == {first.epoch: opened.position, opened.epoch: reached}


def test_rule_16_incidents_are_kept_until_they_are_closed(open_log: Open) -> None:
    log = open_log()
    log.open("c1", 1)
    one, other = (
        Incident(Xid(os.urandom(16)), BranchId(os.urandom(8)), f"bank-{n}", finish, 1_000 + n)
        for n, finish in enumerate((FinishResult.NOT_HERE, FinishResult.HEURISTIC))
    )
    log.report([one, other])
    lost = Incident(one.xid, one.branch, one.resource, FinishResult.LOST, 2_000)
    log.report([lost])
    log.report([])
    again = open_log()
    assert again.open("c1", 2).incidents == (other, lost)
    again.close_incidents([(other.xid, other.branch), (other.xid, one.branch)], 3_000)
    assert open_log().open("c1", 3).incidents == (lost,)
    assert open_log().open("c2", 1).incidents == ()
    with pytest.raises(Fenced):
        log.report([one])
    with pytest.raises(Fenced):
        log.close_incidents([(one.xid, one.branch)], 3_000)


def test_an_incident_that_comes_back_after_it_was_closed_is_open_again(open_log: Open) -> None:
    log = open_log()
    log.open("c1", 1)
    lost = Incident(Xid(os.urandom(16)), BranchId(os.urandom(8)), "bank", FinishResult.LOST, 1_000)
    log.report([lost])
    log.close_incidents([(lost.xid, lost.branch)], 2_000)
    log.report([lost])
    assert open_log().open("c1", 2).incidents == (lost,)


def test_rule_17_names_are_bound_to_databases_for_all_nodes(open_log: Open) -> None:
    log = open_log()
    assert log.open("c1", 1).identities == {}
    assert log.bind({"bank-a": "7/1", "bank-b": "7/2"}, {}) == {"bank-a": "7/1", "bank-b": "7/2"}
    log.bind({}, {"bank-b": "8/2"})
    other = open_log()
    assert other.open("c2", 1).identities == {"bank-a": "7/1", "bank-b": "8/2"}
    assert other.bind({}, {"bank-a": ""}) == {"bank-a": "", "bank-b": "8/2"}
    assert open_log().open("c1", 2).identities == {"bank-b": "8/2"}
    with pytest.raises(Fenced):
        log.bind({"bank-a": "9/9"}, {})


def test_rule_17_the_first_node_that_sees_a_name_is_right_until_an_operator_says_otherwise(open_log: Open) -> None:
    first, second = open_log(), open_log()
    first.open("c1", 1)
    second.open("c2", 1)
    first.bind({"bank": "7/1"}, {})
    assert second.bind({"bank": "8/2", "shop": "8/3"}, {}) == {"bank": "7/1", "shop": "8/3"}
    assert first.bind({}, {"bank": ""}) == {"bank": "", "shop": "8/3"}
    assert second.bind({"bank": "8/2"}, {}) == {"bank": "8/2", "shop": "8/3"}


# --------------------------------------------------------------------------------------------------------- takeovers


def test_rule_7_a_takeover_fences_as_the_node_s_own_process_does(open_log: Open) -> None:
    own, other = open_log(), open_log()
    epoch = own.open("c1", 1).epoch
    one = decision(epoch)
    own.record([one])
    opened = other.open("c1", 2, "c2", epoch)
    assert opened.epoch.number == 2
    assert opened.pending == (one,)
    with pytest.raises(Fenced):
        own.record([decision(epoch)])
    other.done([one.xid], 5_000)


def test_a_takeover_that_comes_too_late_changes_nothing(open_log: Open) -> None:
    """Its node is back, or another one was faster."""
    own, late = open_log(), open_log()
    before = own.open("c1", 1).epoch
    again = open_log()
    epoch = again.open("c1", 2).epoch
    with pytest.raises(Fenced, match="not in epoch 1"):
        late.open("c1", 3, "c2", before)
    again.record([decision(epoch)])
    with pytest.raises(Fenced):
        late.open("c9", 3, "c2", before)


def shown(beats: Heartbeats) -> dict[str, tuple[int, str, bool]]:
    return {row.node: (row.epoch.number, row.holder, row.beat == LEFT) for row in beats.beat()}


@pytest.mark.parametrize("place", ["memory", "sqlite", "postgresql", "etcd"], indirect=True)
def test_nodes_of_a_group_see_each_other(open_log: Open, open_beats: Callable[[], Heartbeats]) -> None:
    epochs = {node: open_log().open(node, 1).epoch for node in ("c1", "c2", "c3")}
    first, second, stranger = (open_beats() for _ in range(3))
    first.join("c1", "bank", 10)
    second.join("c2", "bank", 20)
    stranger.join("c3", "elsewhere", 5)
    assert shown(first) == {"c1": (1, "c1", False), "c2": (1, "c2", False)}
    assert [row.started_ms for row in second.beat()] == [10, 20]
    open_log().open("c2", 2, "c1", epochs["c2"])
    assert shown(first)["c2"] == (2, "c1", False)
    second.leave()
    assert shown(first)["c2"] == (2, "c1", True)
    first.withdraw("c2")
    assert shown(first) == {"c1": (1, "c1", False)}


@pytest.mark.parametrize("place", ["memory", "sqlite", "postgresql", "etcd"], indirect=True)
def test_a_heartbeat_changes_as_long_as_another_node_reads_it(
    open_log: Open, open_beats: Callable[[], Heartbeats]
) -> None:
    for node in ("c1", "c2"):
        open_log().open(node, 1)
    first, second = open_beats(), open_beats()
    first.join("c1", "bank", 10)
    second.join("c2", "bank", 20)
    seen = set()
    for _ in range(5):
        first.beat()
        seen.add(next(row.beat for row in second.beat() if row.node == "c1"))
    assert len(seen) == 5
