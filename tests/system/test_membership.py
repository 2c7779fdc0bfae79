"""Members of a group come and go while its transactions run: `txrpc group`, real processes, real PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import txrpc
from tests.system.test_crashes import ends, transfer
from tests.system.test_takeover import owner_of
from tests.system.world import START, World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


def group_command(world: World, by: int, *words: str) -> str:
    """What `txrpc group` prints, asked of that coordinator; its last words if it fails."""
    command = [sys.executable, "-m", "txrpc.cli", "group", *words, "--coordinator", world.coordinators[by].address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


def newcomer(world: World, node: str) -> str:
    """Start a coordinator that waits to become a member; returns it as `txrpc group` wants it named."""
    one = world.newcomer(node)
    one.wait_for("it waits until it is added")
    return f"{node}={one.address}"


@pytest.mark.proof
def test_a_dead_member_is_removed_and_another_one_added_and_no_transaction_is_lost(
    make_world: Make, connected: Connect
) -> None:
    """Rules 3, 5 and 7.  c1 has decided and is gone for good; the group goes on with two, and then with three again."""
    world = make_world(group=3, spare=1, c1="coordinator.after_record=kill")
    connected(world)
    assert transfer(world) == "committed", world.evidence()
    ends(world, "committed", "committed")
    eventually(lambda: not world.coordinator.running, 20, world.evidence)
    come = newcomer(world, "c4")
    assert "needs 3 of the members that stay" in group_command(world, 1, "add", come)
    said = group_command(world, 1, "replace", "c1", come)
    assert "view 3: read quorum 2, write quorum 2" in said, said + world.evidence()
    assert "left: c1" in said
    world.coordinators[3].wait_for("listening")
    for node in ("c1", "c2", "c3"):
        world.coordinators[3].wait_for(f'"disk admitted" log={node}', 30)
    world.coordinators[1].kill()
    eventually(lambda: transfer(world, 50) == "committed", 60, world.evidence)
    world.at_rest()
    assert world.total() == 2 * 20 * START
    eventually(lambda: owner_of(world, "c1", 2) in ("c3", "c4"), 20, world.evidence)


@pytest.mark.proof
def test_the_leader_is_removed_alive_ends_by_itself_and_the_others_finish_its_transactions(
    make_world: Make, connected: Connect
) -> None:
    world = make_world(group=3)
    connected(world)
    assert transfer(world) == "committed", world.evidence()
    said = group_command(world, 0, "remove", "c1")
    assert "view 2: read quorum 2, write quorum 2" in said, said + world.evidence()
    assert world.coordinator.wait(30) == 7, world.evidence()
    assert "removed from the group" in world.coordinator.text()
    eventually(lambda: owner_of(world, "c1") in ("c2", "c3"), 20, world.evidence)
    eventually(lambda: transfer(world, 50) == "committed", 20, world.evidence)
    world.at_rest()
    shown = group_command(world, 1, "show")
    assert "c1 " not in shown
    # Started again it is no member: it waits, and does nothing.
    world.coordinator.launch()
    world.coordinator.wait_for("it waits until it is added")
    assert world.coordinator.terminate() == 0


@pytest.mark.proof
def test_a_member_that_was_removed_while_it_slept_finishes_nobodys_branch(make_world: Make, connected: Connect) -> None:
    """Rule 7.  It wakes up with a decision in hand and the old addresses; what it decides now no quorum takes."""
    world = make_world(group=3, c1="coordinator.before_record=stop")
    connected(world)
    told = transfer(world)
    assert told == "aborted", world.evidence()
    said = group_command(world, 1, "remove", "c1")
    assert "view 2:" in said, said + world.evidence()
    world.coordinator.arm("")
    world.coordinator.resume()
    assert world.coordinator.wait(30) == 7, world.evidence()
    ends(world, told, "aborted")
    eventually(lambda: transfer(world, 50) == "committed", 20, world.evidence)
    world.at_rest()
    assert world.total() == 2 * 20 * START


def goes_on(world: World, told: list[str]) -> None:
    """Wait until some more transactions are committed."""
    before = told.count("committed")
    eventually(lambda: told.count("committed") > before + 3, 60, world.evidence)


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_all_members_are_replaced_one_after_the_other_under_load(make_world: Make, connected: Connect) -> None:
    """In the end no founder of the group is left, and every cent is where it belongs."""
    world = make_world(group=3, spare=3)
    connected(world)
    over = threading.Event()
    told: list[str] = []

    def load() -> None:
        while not over.is_set():
            told.append(transfer(world, 1))

    client = threading.Thread(target=load)
    client.start()
    try:
        for number, old in enumerate(("c1", "c2", "c3")):
            come = newcomer(world, f"c{number + 4}")
            said = group_command(world, 2, "replace", old, come)
            assert f"view {2 * number + 3}:" in said, said + world.evidence()
            assert world.coordinators[number].wait(30) == 7, world.evidence()
            new = world.coordinators[number + 3]
            new.wait_for("listening", 30)
            for node in ("c1", "c2", "c3"):
                new.wait_for(f'"disk admitted" log={node}', 30)
            goes_on(world, told)
    finally:
        over.set()
        client.join(60)
    assert set(told) <= {"committed", "aborted", "unknown", "unreachable"}
    world.at_rest()
    assert world.total() == 2 * 20 * START
    journals = world.journals()
    assert journals[0].keys() == journals[1].keys()
    nodes: dict[str, Any] = {each["node"]: each for each in world.status(world.coordinators[3])["nodes"]}
    assert {nodes[node]["holder"] for node in ("c1", "c2", "c3")} <= {"c4", "c5", "c6"}
