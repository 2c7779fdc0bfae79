"""Coordinators whose log is in etcd: real processes, a real cluster of three, real PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import txrpc
from tests.etcd import EtcdCluster
from tests.system.test_crashes import ends, transfer
from tests.system.test_takeover import owner_of
from tests.system.unavailability import measure
from tests.system.world import World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


@pytest.mark.parametrize(
    ("failpoint", "expected"),
    [
        pytest.param("coordinator.before_record=kill", "aborted", marks=pytest.mark.proof),
        ("coordinator.after_record=kill", "committed"),
    ],
)
def test_a_coordinator_dies_and_another_one_finishes_its_transactions(
    make_world: Make, connected: Connect, etcd: EtcdCluster, failpoint: str, expected: str, tmp_path: str
) -> None:
    """Rules 3, 5, 6, 12 and 13; and it takes them back when it has come again."""
    world = make_world(nodes=2, log=etcd.url(f"system/{expected}"), c1=failpoint)
    connected(world)
    assert transfer(world) == expected, world.evidence()
    ends(world, expected, expected)
    eventually(lambda: owner_of(world, "c1") == "c2", 30, world.evidence)
    world.coordinator.arm("")
    world.coordinator.start()
    eventually(lambda: owner_of(world, "c1") == "c1", 30, world.evidence)
    eventually(lambda: transfer(world, 0) == "committed", 30, world.evidence)


@pytest.mark.proof
def test_rule_7_a_coordinator_that_sleeps_through_its_takeover_records_nothing(
    make_world: Make, connected: Connect, etcd: EtcdCluster
) -> None:
    world = make_world(nodes=2, log=etcd.url("system/asleep"), c1="coordinator.before_record=stop")
    connected(world)
    assert transfer(world) == "aborted", world.evidence()
    eventually(lambda: owner_of(world, "c1") == "c2", 30, world.evidence)
    world.coordinator.arm("")
    world.coordinator.resume()
    world.coordinator.wait_for("back after a takeover")
    eventually(lambda: owner_of(world, "c1") == "c1", 30, world.evidence)
    ends(world, "aborted", "aborted")
    eventually(lambda: transfer(world) == "committed", 30, world.evidence)


@pytest.mark.proof
@pytest.mark.timeout(180)
def test_a_coordinator_and_the_leader_of_etcd_die_together(
    make_world: Make, connected: Connect, own_etcd: EtcdCluster
) -> None:
    """The next leader has every decision that any process was told."""
    world = make_world(nodes=2, log=own_etcd.url())
    manager = connected(world)
    manager._client.state.commit_timeout_ms = 40_000
    assert transfer(world, 0) == "committed", world.evidence()
    world.coordinator.arm("coordinator.after_record=kill")
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(transfer, world)
        world.coordinator.wait(30)
        own_etcd.leader().kill()
        assert told.result(60) == "committed", world.evidence()
    ends(world, "committed", "committed")
    eventually(lambda: owner_of(world, "c1") == "c2", 30, world.evidence)


@pytest.mark.proof
@pytest.mark.timeout(180)
def test_without_a_majority_of_etcd_nothing_is_decided_and_no_coordinator_takes_over(
    make_world: Make, connected: Connect, own_etcd: EtcdCluster
) -> None:
    """It says so, and goes on by itself when the majority is back."""
    world = make_world(nodes=2, log=own_etcd.url())
    connected(world)
    assert transfer(world, 0) == "committed", world.evidence()
    away = [own_etcd.members[name] for name in ("e1", "e2")]
    for member in away:
        member.suspend()
    eventually(lambda: not world.status()["log_healthy"], 30, world.evidence)
    assert transfer(world) == "aborted", world.evidence()
    for member in away:
        member.resume()
    eventually(lambda: world.status()["log_healthy"], 60, world.evidence)
    assert [each["holder"] for each in world.status()["nodes"]] == ["c1", "c2"]
    eventually(lambda: transfer(world) == "committed", 30, world.evidence)
    ends(world, "committed", "committed")


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.timeout(300)
def test_no_cent_is_lost_while_the_coordinator_that_clients_prefer_dies_again_and_again(
    make_world: Make, etcd: EtcdCluster
) -> None:
    assert len(measure(make_world(nodes=2, log=etcd.url("system/again")), kills=2)) == 8
