"""A group whose members are cut off from each other, or from everyone, under load: while a majority can talk, work goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

import txrpc
from tests.network.net import Net, Node, why_not
from tests.postgres import URLS, Server
from tests.system.test_crashes import transfer
from tests.system.test_takeover import owner_of
from tests.system.unavailability import transferring
from tests.system.world import START, World
from tests.waiting import eventually

REASON = why_not() or (
    "TXRPC_TEST_POSTGRES_URLS is set, and these servers are on machines of their own" if URLS else ""
)
pytestmark = [pytest.mark.proof, pytest.mark.skipif(bool(REASON), reason=REASON)]

_FLAPS = 8
FAULTS = ("from everyone", "from its peers", "its peers do not hear it", "it does not hear its peers")


@pytest.fixture
def machines(
    servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Net, World, dict[str, Node]]]:
    """Each member on a machine of its own; services, databases and clients on this one."""
    with Net() as net:
        nodes = {name: net.add(name) for name in ("c1", "c2", "c3")}
        world = World(tmp_path_factory.mktemp("group"), {**servers}, 901, [], places=nodes, group=3)
        world.start()
        yield net, world, nodes
        world.stop()


def spoil(net: Net, victim: Node, others: list[Node], fault: str) -> None:
    for other in others:
        if fault in ("from everyone", "from its peers"):
            net.part(victim, other)
        elif fault == "its peers do not hear it":
            net.cut(victim, other)
        else:
            net.cut(other, victim)
    if fault == "from everyone":
        net.part(victim, net.client)


@pytest.mark.timeout(400)
def test_no_cent_is_lost_and_nothing_is_blocked_while_each_member_is_cut_off_in_turn(
    machines: tuple[Net, World, dict[str, Node]],
) -> None:
    net, world, nodes = machines
    with transferring(world, 3) as customers:
        for number, fault in enumerate(FAULTS):
            victim = f"c{number % 3 + 1}"
            others = [node for name, node in nodes.items() if name != victim]
            eventually(lambda: all(len(each.commits) >= 3 for each in customers), 60, world.evidence)
            spoil(net, nodes[victim], others, fault)
            by = 1 if victim != "c2" else 2
            eventually(lambda of=victim, by=by: owner_of(world, of, by) != of, 30, world.evidence)  # type: ignore[misc]
            for customer in customers:
                customer.commits.clear()
            eventually(lambda: all(each.commits for each in customers), 60, world.evidence)
            net.heal()
            eventually(lambda victim=victim: owner_of(world, victim) == victim, 60, world.evidence)  # type: ignore[misc]
            for customer in customers:
                customer.commits.clear()


@pytest.mark.timeout(200)
def test_a_flapping_link_causes_no_storm_of_elections(machines: tuple[Net, World, dict[str, Node]]) -> None:
    """c1 comes and goes: each time it is taken over once at most, gets its log back, and the others stay what they are."""
    net, world, nodes = machines
    others = [nodes["c2"], nodes["c3"]]
    dice = random.Random(7)
    with txrpc.connect(world.addresses, process="customers"):
        for _ in range(_FLAPS):
            spoil(net, nodes["c1"], others, "from its peers")
            time.sleep(dice.uniform(0.2, 2.0))
            net.heal()
            time.sleep(dice.uniform(0.2, 2.0))
        eventually(lambda: all(owner_of(world, node) == node for node in nodes), 60, world.evidence)
        eventually(lambda: transfer(world) == "committed", 60, world.evidence)
    texts = [each.text() for each in world.coordinators]
    # Twice as many as there were flaps is a slow machine's; a storm has many more.
    assert sum(text.count('event="taken over"') for text in texts) <= 2 * _FLAPS, world.evidence()
    world.at_rest()
    assert world.total() == 2 * 20 * START, world.evidence()
