"""A group of coordinators with a disk each: members die, are frozen, lose their disks, and nothing is lost or blocked.

Real processes and real PostgreSQL, as in `test_takeover`; but there is no log that all of them reach.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import txrpc
from tests.system.test_crashes import ends, transfer
from tests.system.test_takeover import DEATHS, dead, owner_of
from tests.system.unavailability import measure, transferring
from tests.system.world import START, World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


@pytest.mark.parametrize(("failpoint", "expected"), DEATHS)
def test_a_member_dies_for_good_and_another_one_finishes_its_transactions(
    make_world: Make, connected: Connect, failpoint: str, expected: str
) -> None:
    """Rules 3, 5, 6, 12 and 13: what a quorum has on its disks is decided, and the client hears it from a member that is left."""
    world = make_world(group=3, c1=failpoint)
    connected(world)
    assert transfer(world) == expected, world.evidence()
    ends(world, expected, expected)
    dead(world)
    eventually(lambda: owner_of(world, "c1") in ("c2", "c3"), 20, world.evidence)
    assert transfer(world, 50) == "committed", world.evidence()
    world.at_rest()


@pytest.mark.proof
def test_a_frozen_member_is_taken_over_and_comes_back_when_it_wakes_up(make_world: Make, connected: Connect) -> None:
    """Rules 7 and 12: it goes on with what it had in hand, and no quorum takes that any more."""
    world = make_world(group=3, c1="coordinator.before_record=stop")
    connected(world)
    told = transfer(world)
    assert told == "aborted", world.evidence()
    eventually(lambda: owner_of(world, "c1") in ("c2", "c3"), 20, world.evidence)
    world.coordinator.arm("")
    world.coordinator.resume()
    world.coordinator.wait_for("back after a takeover")
    eventually(lambda: owner_of(world, "c1") == "c1", 20, world.evidence)
    ends(world, told, "aborted")
    # Each process finds its session with that coordinator again in its own time.
    eventually(lambda: transfer(world) == "committed", 20, world.evidence)


@pytest.mark.proof
def test_all_members_are_killed_at_once_and_a_decision_is_carried_out_when_they_are_back(
    make_world: Make, connected: Connect
) -> None:
    """Rules 3 and 4: what was decided is on their disks, each of which was synced before it said so."""
    world = make_world(group=3, c1="coordinator.after_record=kill")
    connected(world)
    told: list[str] = []
    client = threading.Thread(target=lambda: told.append(transfer(world)))
    client.start()
    world.coordinator.wait(30)
    for one in world.coordinators[1:]:
        one.kill()
    world.coordinator.arm("")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: one.start(), world.coordinators))
    client.join(60)
    assert told == ["committed"], world.evidence()
    ends(world, "committed", "committed")


@pytest.mark.proof
def test_without_a_quorum_nothing_is_decided_and_it_goes_on_by_itself(make_world: Make, connected: Connect) -> None:
    world = make_world(group=3)
    connected(world)
    assert transfer(world) == "committed"
    for one in world.coordinators[1:]:
        one.kill()
    assert transfer(world) in ("aborted", "unknown", "unreachable"), world.evidence()
    world.coordinators[2].start()
    eventually(lambda: transfer(world) == "committed", 60, world.evidence)
    world.at_rest()
    assert world.total() == 2 * 20 * START


@pytest.mark.proof
def test_two_of_five_members_die_at_once_and_the_others_go_on(make_world: Make, connected: Connect) -> None:
    world = make_world(group=5)
    connected(world)
    assert transfer(world) == "committed", world.evidence()
    for one in world.coordinators[:2]:
        one.kill()
    eventually(lambda: transfer(world, 50) == "committed", 60, world.evidence)
    for node in ("c1", "c2"):
        eventually(lambda of=node: owner_of(world, of, 2) in ("c3", "c4", "c5"), 20, world.evidence)  # type: ignore[misc]
    world.at_rest()
    assert world.total() == 2 * 20 * START


@pytest.mark.proof
def test_a_member_that_has_lost_its_disk_is_given_a_new_one_and_counts_again(
    make_world: Make, connected: Connect
) -> None:
    """V7.  c3 comes with nothing, c2 dies: what was decided before is with c3 by then, and decisions go on."""
    world = make_world(group=3)
    connected(world)
    assert transfer(world) == "committed"
    assert world.coordinators[2].terminate() == 0
    for file in world.folder.glob("c3.db*"):
        file.unlink()
    assert transfer(world, 50) == "committed", world.evidence()
    world.coordinators[2].start()
    world.coordinators[2].wait_for("joined with an empty or older disk")

    for node in ("c1", "c2", "c3"):
        world.coordinators[2].wait_for(f'"disk admitted" log={node}', 30)
    world.coordinators[1].kill()
    eventually(lambda: transfer(world, 10) == "committed", 60, world.evidence)
    world.at_rest()
    assert world.total() == 2 * 20 * START


@pytest.mark.proof
def test_a_log_that_is_longer_than_a_session_s_message_may_be_is_given_to_a_new_disk(
    make_world: Make, connected: Connect
) -> None:
    world = make_world(["--max-message-bytes", "16384"], group=3)
    connected(world)
    world.coordinators[2].kill()
    for file in world.folder.glob("c3.db*"):
        file.unlink()
    for _ in range(150):
        assert transfer(world, 1) == "committed", world.evidence()
    world.coordinators[2].start()
    world.coordinators[2].wait_for('"disk admitted" log=c1 position=150', 30)


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_no_cent_is_lost_while_each_member_is_killed_in_turn(make_world: Make) -> None:
    waits = measure(make_world(group=3), kills=6)
    assert len(waits) == 24


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_no_cent_is_lost_and_nothing_is_blocked_while_each_member_sleeps_in_turn(make_world: Make) -> None:
    world = make_world(group=3)
    with transferring(world, 3) as customers:
        for number, victim in enumerate(world.coordinators):
            eventually(lambda: all(len(each.commits) >= 3 for each in customers), 60, world.evidence)
            victim.suspend()
            for customer in customers:
                customer.commits.clear()
            eventually(lambda: all(each.commits for each in customers), 60, world.evidence)
            of, by = victim.name, (number + 1) % 3
            eventually(lambda of=of, by=by: owner_of(world, of, by) != of, 60, world.evidence)  # type: ignore[misc]
            victim.resume()
            eventually(lambda of=of, by=by: owner_of(world, of, by) == of, 60, world.evidence)  # type: ignore[misc]
            for customer in customers:
                customer.commits.clear()


CLOCK = """
import time
right = time.time_ns
time.time_ns = lambda: right() + {off_s} * 1_000_000_000
"""
"""What txrpc reads; gRPC's deadlines are counted by time.time()."""


@pytest.mark.proof
@pytest.mark.timeout(180)
@pytest.mark.parametrize("off_s", [86_400, pytest.param(-86_400, marks=pytest.mark.long)])
def test_a_clock_that_is_a_day_off(make_world: Make, connected: Connect, tmp_path: Path, off_s: int) -> None:
    """Of one member; its log is then run by another one, whose clock is right, and by itself again with the right one."""
    world = make_world(group=3)
    connected(world)
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(off_s=off_s))
    first = world.coordinator
    right = dict(first.environment)
    first.kill()
    first.environment["PYTHONPATH"] = f"{tmp_path}:{right.get('PYTHONPATH', '')}"
    first.start()
    eventually(lambda: owner_of(world, "c1") == "c1", 30, world.evidence)
    eventually(lambda: transfer(world, 0) == "committed" and world.status()["committed"] > 0, 30, world.evidence)
    first.arm("coordinator.after_record=kill")
    assert transfer(world) == "committed", world.evidence()
    ends(world, "committed", "committed")
    dead(world)
    eventually(lambda: owner_of(world, "c1") != "c1", 30, world.evidence)
    assert transfer(world, 0) == "committed", world.evidence()
    first.environment = right
    first.arm("")
    first.start()
    eventually(lambda: owner_of(world, "c1") == "c1", 30, world.evidence)
    eventually(lambda: transfer(world, 0) == "committed", 30, world.evidence)
    world.at_rest()
