"""A group whose members come and go while its logs are written: real gRPC, real disks, in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.log.group import RunningGroup
from tests.log.test_contract import decision
from tests.waiting import eventually
from txrpc._decision_log.port import DecisionLog, LogError
from txrpc._group.changes import Change
from txrpc._group.members import changed, founders
from txrpc._group.shared import SHARED
from txrpc._protocol.quorum.acceptor import Outdated, Prepare
from txrpc._protocol.quorum.commands import ChangeView
from txrpc._protocol.takeover import LEFT
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import Epoch

ONE, TWO, THREE = (decision(Epoch.make(1, 1), 1_000 + number) for number in range(3))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[RunningGroup]:
    made = RunningGroup(tmp_path)
    yield made
    made.close()


def opened(group: RunningGroup, by: str, node: str = "") -> DecisionLog:
    log = group.running[by].make_log()
    log.open(node or by, 1, by)
    return log


def all_open(group: RunningGroup) -> dict[str, DecisionLog]:
    group.start()
    return {name: opened(group, name) for name in group.running}


def tended(logs: dict[str, DecisionLog]) -> bool:
    """What a coordinator does twice a second; True."""
    for log in logs.values():
        log.bind({}, {})
    return True


def change(group: RunningGroup, logs: dict[str, DecisionLog], by: str, what: Change) -> Any:
    """Make a change while the coordinators of *logs* go on."""
    over = threading.Event()

    def tend() -> None:
        while not over.wait(0.05):
            tended(logs)

    thread = threading.Thread(target=tend)
    thread.start()
    try:
        return group.running[by].changes.make(what)
    finally:
        over.set()
        thread.join()


def votes(group: RunningGroup, name: str, *logs: str) -> bool:
    return all(group.running[name]._acceptor.votes(log) for log in (*logs, SHARED))


def let_in(group: RunningGroup, logs: dict[str, DecisionLog], name: str, *nodes: str) -> None:
    """Wait until the disk of that member counts in the logs of those; its own coordinator sees to it, as any does."""
    if name not in logs:
        logs[name] = opened(group, name)
    eventually(lambda: tended(logs) and votes(group, name, *nodes), 20)


def test_a_member_is_added_while_decisions_are_recorded_and_counts_when_it_has_the_logs(group: RunningGroup) -> None:
    logs = all_open(group)
    assert logs["c1"].record([ONE]) == 1
    address = group.newcomer("c4")
    view = change(group, logs, "c1", Change({"c4": address}))
    assert (view.number, view.names, view.quorums.writes) == (2, ("c1", "c2", "c3", "c4"), 3)
    assert group.joining["c4"].result(30)
    eventually(lambda: all(each.view == view for each in group.running.values()), 20)
    assert logs["c1"].record([TWO]) == 2
    let_in(group, logs, "c4", "c1", "c2", "c3")
    group.stop("c1")
    late = opened(group, "c4", "c1")
    assert late.outcome(ONE.xid) == ONE
    assert late.outcome(TWO.xid) == TWO
    assert late.record([THREE]) == 3


def test_a_change_whose_end_was_not_waited_for_is_finished_by_asking_for_it_again(group: RunningGroup) -> None:
    """It was refused as made already, though not every log had moved, so that its end could not be waited for."""
    logs = all_open(group)
    asked = Change({"c4": group.newcomer("c4")})
    with patch("txrpc._group.changes._MOVE_S", 0.5), pytest.raises(LogError, match="is still under way"):
        group.running["c1"].changes.make(asked)  # no log is tended meanwhile
    assert change(group, logs, "c1", asked).number == 2
    assert not group.running["c1"].changes.unmoved(group.running["c1"].view)
    with pytest.raises(ConfigurationError, match="'c4' is a member of the group already"):
        change(group, logs, "c1", asked)


def test_a_member_is_removed_and_its_log_is_run_by_another_one(group: RunningGroup) -> None:
    logs = all_open(group)
    assert logs["c3"].record([ONE]) == 1
    view = change(group, logs, "c1", Change(go=["c3"]))
    assert (view.names, view.former, view.quorums.writes) == (("c1", "c2"), {"c3"}, 2)
    rows = {}
    for name in ("c1", "c2"):
        group.running[name].heartbeats.join(name, "bank", 1)
        rows[name] = {row.node: row for row in group.beat(name)}
    assert rows["c1"]["c3"].beat == rows["c2"]["c3"].beat == LEFT
    late = opened(group, "c1", "c3")
    assert late.outcome(ONE.xid) == ONE
    assert late.record([TWO]) == 2
    # One that goes on all the same has no say, and hears of it.
    eventually(lambda: group.running["c3"].was_removed, 20)
    with pytest.raises(Fenced):
        logs["c3"].record([THREE])
    # Nor does it take its node back from the one that runs it, or another one's.
    for node in ("c3", "c2"):
        with pytest.raises(ConfigurationError, match="c3 was removed from the group"):
            group.running["c3"].make_log().open(node, 2)


def test_a_dead_member_is_replaced_first_removed_and_then_added(group: RunningGroup) -> None:
    logs = all_open(group)
    assert logs["c1"].record([ONE]) == 1
    group.stop("c3")
    del logs["c3"]
    address = group.newcomer("c4")
    with pytest.raises(ConfigurationError, match="needs 3 of the members that stay"):
        change(group, logs, "c1", Change({"c4": address}))
    logs["c3"] = opened(group, "c2", "c3")  # a takeover
    assert change(group, logs, "c1", Change(go=["c3"])).number == 2
    view = change(group, logs, "c2", Change({"c4": address}))
    assert (view.number, view.names, view.former) == (3, ("c1", "c2", "c4"), {"c3"})
    assert group.joining["c4"].result(30)
    let_in(group, logs, "c4", "c1", "c2", "c3")
    group.stop("c1")
    late = opened(group, "c4", "c1")
    assert late.outcome(ONE.xid) == ONE
    assert late.record([TWO]) == 2


def test_a_member_that_was_away_hears_of_the_change_when_it_is_back(group: RunningGroup) -> None:
    logs = all_open(group)
    address = group.newcomer("c4")
    change(group, logs, "c1", Change({"c4": address}))
    assert group.joining["c4"].result(30)
    let_in(group, logs, "c4", "c1", "c2", "c3", "c4")
    group.stop("c3")
    del logs["c3"]
    logs["c3"] = opened(group, "c4", "c3")
    view = change(group, logs, "c1", Change(go=["c2"]))
    assert group.start("c3") == [True]
    eventually(lambda: group.running["c3"].view == view, 20)
    assert opened(group, "c3").record([ONE]) == 1


def test_a_lost_disk_hears_who_the_members_are_whatever_its_options_say(group: RunningGroup) -> None:
    logs = all_open(group)
    view = change(group, logs, "c1", Change({"c4": group.newcomer("c4")}))
    assert group.joining["c4"].result(30)
    let_in(group, logs, "c4", "c1", "c2", "c3")
    group.stop("c2")
    for file in group.path("c2").parent.glob("c2.db*"):
        file.unlink()
    logs["c2"] = opened(group, "c3", "c2")
    assert group.start("c2") == [True]
    assert group.running["c2"].view == view
    logs["c2"] = opened(group, "c2")
    let_in(group, logs, "c2", "c1", "c2", "c3")


def test_an_acceptor_that_was_restarted_answers_in_no_view_earlier_than_before(group: RunningGroup) -> None:
    logs = all_open(group)
    change(group, logs, "c1", Change(reads=3))
    group.stop("c2")
    group.start("c2")
    acceptor = group.running["c2"]._acceptor
    later = Epoch.make(9, 9)
    said = [acceptor.ask(log, Prepare(later, view=1)).result() for log in ("c1", "c2", "c3", SHARED)]
    assert [each.view for each in said if isinstance(each, Outdated)] == [2, 2, 2, 2]


def test_a_removed_member_waits_until_it_is_added_again_and_its_disk_is_given_everything_anew(
    group: RunningGroup,
) -> None:
    logs = all_open(group)
    change(group, logs, "c1", Change(go=["c3"]))
    eventually(lambda: group.running["c3"].was_removed, 20)
    group.stop("c3")
    del logs["c3"]
    assert group.start("c3", timeout_s=1.0) == [False]
    logs["c3"] = opened(group, "c1", "c3")
    assert logs["c3"].record([ONE]) == 1
    joined = group.joins("c3")
    view = change(group, logs, "c2", Change({"c3": group.addresses["c3"]}))
    assert (view.number, view.former) == (3, frozenset())
    assert joined.result(30)
    assert group.running["c3"]._acceptor.standing.incarnation > 1
    logs["c3"] = opened(group, "c3")
    let_in(group, logs, "c3", "c1", "c2", "c3")


def test_one_that_was_removed_while_it_was_down_opens_nothing_when_it_is_started(group: RunningGroup) -> None:
    logs = all_open(group)
    group.stop("c3")
    logs["c3"] = opened(group, "c1", "c3")
    change(group, logs, "c2", Change(go=["c3"]))
    assert group.start("c3", timeout_s=1.0) == [False]
    assert group.running["c3"].was_removed
    assert logs["c3"].record([ONE]) == 1


def test_a_change_that_was_decided_and_not_told_is_found_by_the_others(group: RunningGroup) -> None:
    """Its maker dies between the decision and the first message that says so."""
    logs = all_open(group)
    first = group.running["c1"]
    following = changed(first.view, {"c1": "127.0.0.1:1"})
    with patch.object(type(first._peers), "adopt"):
        first._shared._say(lambda _: ChangeView(following))
    group.stop("c1")
    del logs["c1"]
    logs["c1"] = opened(group, "c2", "c1")
    eventually(lambda: tended(logs) and group.running["c2"].view == following, 20)


def test_a_group_of_which_no_founder_is_left_lets_a_member_in_whose_log_is_new(group: RunningGroup) -> None:
    """No disk is the first of its member's any more: a log that is younger begins with those that counted at that time."""
    logs = all_open(group)
    for old, new in (("c1", "c4"), ("c2", "c5"), ("c3", "c6")):
        change(group, logs, "c3" if new != "c6" else "c4", Change({new: group.newcomer(new)}, [old]))
        assert group.joining[new].result(30)
        group.stop(old)
        logs[new] = opened(group, new)
        logs[old] = opened(group, new, old)
        let_in(group, logs, new, *logs)
    assert group.running["c6"].view.names == ("c4", "c5", "c6")
    assert logs["c6"].record([ONE]) == 1
    group.stop("c4")
    late = opened(group, "c5", "c6")
    assert late.outcome(ONE.xid) == ONE


def test_two_changes_at_once_are_made_one_after_the_other_or_one_is_refused(group: RunningGroup) -> None:
    logs = all_open(group)
    addresses = {name: group.newcomer(name) for name in ("c4", "c5")}
    ended: dict[str, Any] = {}

    def make(by: str, name: str) -> None:
        try:
            ended[name] = group.running[by].changes.make(Change({name: addresses[name]}))
        except Exception as error:
            ended[name] = error

    threads = [threading.Thread(target=make, args=pair) for pair in (("c1", "c4"), ("c2", "c5"))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        tended(logs)
    made = {name for name, end in ended.items() if not isinstance(end, Exception)}
    assert made, ended
    eventually(lambda: tended(logs) and len({group.running[name].view.number for name in ("c1", "c2", "c3")}) == 1, 20)
    assert made <= set(group.running["c1"].view.names)


def test_another_address_of_a_member_is_a_change_like_any_other(group: RunningGroup) -> None:
    logs = all_open(group)
    group.stop("c3")
    logs["c3"] = opened(group, "c2", "c3")
    moved = group.newcomer("c3")
    view = change(group, logs, "c1", Change({"c3": moved}))
    assert view.addresses["c3"] == moved
    assert group.joining["c3"].result(30)
    assert opened(group, "c3").record([ONE]) == 1


# ------------------------------------------------------------------------------------------------------ bad input


FOUNDERS = founders("c1=h:1,c2=h:2,c3=h:3")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (Change({"c3": "h:3"}), "'c3' is a member of the group already, at h:3"),
        (Change({"c4": "h:3"}), "another member has the address h:3"),
        (Change(), "nothing would change"),
        (Change(go=["c9"]), "'c9' is no member of the group: they are c1, c2, c3"),
        (Change(go=["c1", "c2", "c3"]), "the last member cannot be removed"),
        (Change(go=["c1", "c2"]), "change one member at a time"),
        (Change({"c4": "h:4"}, ["c1"]), "change one member at a time"),
        (Change({"c4": "h:4"}, reads=1, writes=3), "together they must be more than 4"),
        (Change({"c4": "h:4"}, reads=1, writes=4), "change one member at a time, and quorums in small steps"),
        (Change({"c4": "h:4"}, writes=9), "are not possible with 4 acceptors"),
    ],
)
def test_a_change_that_is_not_possible_is_refused(what: Change, says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        changed(FOUNDERS, what.come, what.go, what.reads, what.writes)
    assert says in str(refused.value)


def test_one_that_never_comes_up_is_not_added(group: RunningGroup) -> None:
    logs = all_open(group)
    with pytest.raises(ConfigurationError, match=r"no coordinator of the group answers at 127\.0\.0\.1:1: no answer"):
        change(group, logs, "c1", Change({"c4": "127.0.0.1:1"}))
    assert group.running["c1"].view.number == 1
    assert logs["c1"].record([ONE]) == 1


def test_one_of_another_group_is_not_added(group: RunningGroup, tmp_path: Path) -> None:
    logs = all_open(group)
    (tmp_path / "other").mkdir()
    other = RunningGroup(tmp_path / "other")
    try:
        other.start()
        with pytest.raises(ConfigurationError, match="another group of the same name"):
            change(group, logs, "c1", Change({"c4": other.addresses["c1"]}))
    finally:
        other.close()


def test_nothing_is_removed_that_would_leave_no_quorum(group: RunningGroup) -> None:
    logs = all_open(group)
    group.stop("c3")
    del logs["c3"]
    logs["c3"] = opened(group, "c1", "c3")
    with pytest.raises(ConfigurationError, match="needs 2 of the members that stay"):
        change(group, logs, "c1", Change(go=["c2"]))
    assert logs["c1"].record([ONE]) == 1
