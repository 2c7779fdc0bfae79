"""Coordinators on one log: one dies, is frozen or leaves, and another one finishes what it has begun.

Real processes and real PostgreSQL, as in `test_crashes`; but here the dead one stays dead.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

import txrpc
import txrpc.aio
from examples.bank import bank_pb2, bank_pb2_grpc
from tests.postgres import Server
from tests.system.test_crashes import ends, transfer
from tests.system.unavailability import measure
from tests.system.world import World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]

DEATHS = [
    pytest.param("coordinator.before_prepare=kill", "aborted", marks=pytest.mark.proof),
    ("coordinator.before_record=kill", "aborted"),
    ("coordinator.after_record=kill", "committed"),
    pytest.param("coordinator.before_commit=kill@2", "committed", marks=pytest.mark.proof),
    pytest.param("coordinator.before_outcome_reply=kill", "committed", marks=pytest.mark.proof),
    pytest.param("coordinator.before_done=kill", "committed", marks=pytest.mark.proof),
]


def owner_of(world: World, node: str, by: int = 1) -> str:
    """The node that runs that node's coordinator, as c2 sees it, or another one (c1 is 0)."""
    shown = {each["node"]: each for each in world.status(world.coordinators[by])["nodes"]}
    return str(shown[node]["holder"]) if node in shown else ""


def dead(world: World) -> None:
    """The first coordinator is, or soon: its last points are reached when the client has heard the outcome already."""
    eventually(lambda: not world.coordinator.running, 20, world.evidence)


@pytest.mark.parametrize(("failpoint", "expected"), DEATHS)
def test_a_coordinator_dies_for_good_and_another_one_finishes_its_transactions(
    make_world: Make, connected: Connect, failpoint: str, expected: str
) -> None:
    """Rules 3, 5, 6, 12 and 13: the decision is what is durable, and the client hears it from the coordinator that is left."""
    world = make_world(nodes=2, c1=failpoint)
    connected(world)
    assert transfer(world) == expected, world.evidence()
    ends(world, expected, expected)
    dead(world)
    eventually(lambda: owner_of(world, "c1") == "c2", 20, world.evidence)
    (guest,) = world.status(world.coordinators[1])["taken_over"]
    assert (guest["owner"]["node"], guest["in_doubt"], guest["open"]) == ("c1", 0, 0)


@pytest.mark.proof
@pytest.mark.parametrize(("failpoint", "expected"), [DEATHS[1], DEATHS[2]])
async def test_the_same_for_an_asyncio_client(make_world: Make, failpoint: str, expected: str) -> None:
    world = make_world(nodes=2, c1=failpoint)
    told = "committed"
    async with await txrpc.aio.connect(world.addresses, process="aio"):
        channels = [
            grpc.aio.insecure_channel(service.address, interceptors=txrpc.aio.client_interceptors())
            for service in world.services.values()
        ]
        banks = [bank_pb2_grpc.AccountsStub(channel) for channel in channels]
        amount = bank_pb2.Amount(account="0000", cents=100)
        try:
            async with txrpc.aio.transaction(timeout=15):
                await banks[0].Withdraw(amount)
                await banks[1].Deposit(amount)
        except txrpc.TransactionAborted:
            told = "aborted"
        for channel in channels:
            await channel.close(None)
    ends(world, told, expected)
    dead(world)


def test_the_log_may_be_postgresql_and_the_next_transaction_does_not_wait_for_the_takeover(
    make_world: Make, connected: Connect, servers: dict[str, Server]
) -> None:
    log = servers["bank-a"].create_database("takeoverlog")
    world = make_world(["--takeover-s", "600"], nodes=2, log=log)
    manager = connected(world)
    assert transfer(world) == "committed"
    assert manager.status().coordinator == "c1"
    world.coordinator.kill()
    eventually(lambda: manager.status().coordinator == "c2", 10)
    assert transfer(world, 50) == "committed", world.evidence()
    assert [*manager.status().coordinators.values()][1] == ""
    assert owner_of(world, "c1") == "c1"
    world.at_rest()


def test_a_frozen_coordinator_is_taken_over_and_comes_back_when_it_wakes_up(
    make_world: Make, connected: Connect, servers: dict[str, Server]
) -> None:
    """Rules 7 and 12: it is fenced, says so, and opens its log again; what it had begun was ended by the other one.

    Its log is not a file: what its other threads hold when it freezes, such as SQLite's lock, they hold until it wakes up.
    """
    log = servers["bank-a"].create_database("frozenlog")
    world = make_world(nodes=2, log=log, c1="coordinator.before_record=stop")
    manager = connected(world)
    told = transfer(world)
    assert told == "aborted", world.evidence()
    eventually(lambda: owner_of(world, "c1") == "c2", 20, world.evidence)
    world.coordinator.arm("")
    world.coordinator.resume()
    eventually(lambda: owner_of(world, "c1") == "c1", 20, world.evidence)
    world.coordinator.wait_for("back after a takeover")
    eventually(lambda: manager.status().coordinator == "c1", 20, world.evidence)
    ends(world, told, "aborted")
    # Each process finds its session with that coordinator again in its own time.
    eventually(lambda: transfer(world) == "committed", 20, world.evidence)
    assert world.status()["committed"] == 1
    eventually(lambda: not world.status(world.coordinators[1])["taken_over"], 10, world.evidence)


def test_a_coordinator_that_is_stopped_hands_over_at_once(make_world: Make, connected: Connect) -> None:
    """Of three: the one that has been there longest takes over, long before it would have been missed."""
    world = make_world(["--takeover-s", "600"], nodes=3)
    connected(world)
    assert transfer(world) == "committed"
    assert world.coordinators[2].terminate() == 0
    eventually(lambda: world.status()["taken_over"], 40, world.evidence)
    expected = {"c1": (True, "c1", True), "c2": (True, "c2", False), "c3": (False, "c1", False)}

    def nodes() -> dict[str, tuple[bool, str, bool]]:
        return {each["node"]: (each["lives"], each["holder"], each["leads"]) for each in world.status()["nodes"]}

    eventually(lambda: nodes() == expected, 20, world.evidence)
    world.coordinators[2].start()
    eventually(lambda: not world.status()["taken_over"], 40, world.evidence)


@pytest.mark.proof
@pytest.mark.parametrize("failpoint", ["coordinator.before_takeover=kill", "coordinator.after_takeover=kill"])
def test_the_one_that_takes_over_dies_as_well(make_world: Make, connected: Connect, failpoint: str) -> None:
    """Of three: what the first had begun, and the second had taken over, the third one finishes."""
    world = make_world(nodes=3, c1="coordinator.after_record=kill", c2=failpoint)
    connected(world)
    assert transfer(world) == "committed", world.evidence()
    ends(world, "committed", "committed")
    eventually(lambda: [one.running for one in world.coordinators] == [False, False, True], 20, world.evidence)


def test_a_service_that_was_away_as_well_learns_its_decision_from_the_other_coordinator(
    make_world: Make, connected: Connect
) -> None:
    """Rules 4 and 6: prepared in a database, decided in the log, and everyone who knew of it dead."""
    world = make_world(nodes=2, c1="coordinator.after_record=kill", bank_b="participant.after_prepare=sleep:0.3")
    connected(world)
    world.services["bank-b"].arm("participant.before_commit_prepared=kill")
    assert transfer(world) == "committed", world.evidence()
    world.services["bank-b"].wait(30)
    world.services["bank-b"].arm("")
    assert world.prepared() == [0, 1]
    world.services["bank-b"].start()
    ends(world, "committed", "committed")


def test_who_takes_no_part_in_takeovers_is_left_alone(make_world: Make, connected: Connect) -> None:
    world = make_world(["--takeover-s", "0"], nodes=2, c1="coordinator.after_record=kill")
    connected(world)
    reviver = world.revive(world.coordinator)
    assert transfer(world) == "committed"
    reviver.join(30)
    assert world.status(world.coordinators[1])["nodes"] == []
    ends(world, "committed", "committed")


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_no_cent_is_lost_while_the_coordinator_that_clients_prefer_dies_again_and_again(make_world: Make) -> None:
    waits = measure(make_world(nodes=2), kills=4)
    assert len(waits) == 16
