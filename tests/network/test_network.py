"""Real machines (network namespaces) whose network breaks in mid-transaction: all ends alike, and what was told is true."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import txrpc
from tests.network.net import Net, Node, why_not
from tests.postgres import URLS
from tests.proof import note_proof
from tests.system.scenarios import carry_out
from tests.system.world import BANKS, START, World
from tests.waiting import eventually
from txrpc.testing.failpoints import failpoint
from txrpc.testing.postgres import PostgresServer

REASON = why_not() or (
    "TXRPC_TEST_POSTGRES_URLS is set, and these servers are on machines of their own" if URLS else ""
)
pytestmark = [pytest.mark.proof, pytest.mark.skipif(bool(REASON), reason=REASON)]

PAIRS = (
    ("client", "c1"),
    ("bank-a", "c1"),
    ("bank-b", "c1"),
    ("bank-a", "db-a"),
    ("client", "bank-a"),
)
LOST = "session with the coordinator lost"
FAULTS = ("parted", "one way", "the other way", "slow")
MOMENTS = (("bank-a", "participant.before_prepare"), ("c1", "coordinator.after_record"))
"""While the branches vote, and when the decision has just become durable."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What breaks between whom, and when."""

    pair: tuple[str, str]
    fault: str
    moment: tuple[str, str]

    def __str__(self) -> str:
        return f"{'-'.join(self.pair)} {self.fault}, {self.moment[1].partition('.')[2]}"


CELLS = [
    Cell(pair, fault, MOMENTS[(number + shift) % 2])
    for shift, pair in enumerate(PAIRS)
    for number, fault in enumerate(FAULTS)
]


class Machines:
    """The world on machines of its own; the test itself is the client's."""

    def __init__(self, net: Net, folder: Path) -> None:
        self.net = net
        self.nodes: dict[str, Node] = {name: net.add(name) for name in ("c1", *BANKS, "db-a", "db-b")}
        self.nodes["client"] = net.client
        self.servers = {}
        for bank in BANKS:
            node = self.nodes[f"db-{bank[-1]}"]
            self.servers[bank] = PostgresServer.start_new(host=node.address, launch=node.launch, fsync="off")
        options = ["--ack-wait-s", "2"]
        self.world = World(
            folder, {**self.servers}, 1, options, places={name: self.nodes[name] for name in ("c1", *BANKS)}
        )
        self.world.start()
        self.manager = txrpc.connect(self.world.coordinator.address, process="client")
        self.addresses = [service.address for service in self.world.services.values()]

    def close(self) -> None:
        self.manager.close()
        self.world.stop()
        for server in self.servers.values():
            server.stop()

    def spoil(self, cell: Cell) -> None:
        one, other = (self.nodes[name] for name in cell.pair)
        match cell.fault:
            case "parted":
                self.net.part(one, other)
            case "one way":
                self.net.cut(one, other)
            case "the other way":
                self.net.cut(other, one)
            case _:
                self.net.slow(one)

    def transfer(self) -> tuple[str, str]:
        return carry_out("transfer", "", self.addresses, timeout_s=8)

    def ends_well(self, xid: str, told: str) -> str:
        """At rest, agreed, told the truth; returns how the transaction ended."""
        self.world.at_rest()
        journals = self.world.journals()
        assert journals[0].keys() == journals[1].keys(), self.world.evidence()
        ended = "committed" if xid in journals[0] else "aborted"
        assert told in (ended, "unknown"), self.world.evidence()
        assert self.world.total() == 2 * 20 * START
        return ended


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Net() as net:
        made = Machines(net, tmp_path_factory.mktemp("machines"))
        yield made
        made.close()


def in_the_background(transfer: Callable[[], tuple[str, str]]) -> tuple[threading.Thread, list[tuple[str, str]]]:
    said: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: said.append(transfer()))
    thread.start()
    return thread, said


def test_a_way_that_is_cut_carries_nothing(machines: Machines) -> None:
    net, coordinator = machines.net, machines.nodes["c1"]
    address = (coordinator.address, machines.world.coordinator.port)
    for cut in ((net.client, coordinator), (coordinator, net.client)):
        net.cut(*cut)
        with pytest.raises(TimeoutError), socket.create_connection(address, timeout=0.5):
            pass
        net.heal()
        with socket.create_connection(address, timeout=5):
            pass


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_rule_1_all_ends_alike_when_the_network_breaks(machines: Machines, cell: Cell) -> None:
    process, point = cell.moment
    world = machines.world
    child = world.coordinator if process == "c1" else world.services[process]
    with failpoint(point, "sleep:1", process=child) as moment:
        client, said = in_the_background(machines.transfer)
        moment.wait()
        machines.spoil(cell)
    time.sleep(3)
    machines.net.heal()
    client.join(60)
    (xid, told) = said[0]
    ended = machines.ends_well(xid, told)
    eventually(lambda: machines.transfer()[1] == "committed", 30, world.evidence)
    note_proof("network", pair="-".join(cell.pair), fault=cell.fault, moment=point, told=told, ended=ended)


@pytest.mark.parametrize("process", ["c1", "bank-a"])
def test_a_machine_that_dies_unheard_leaves_connections_that_are_only_half_there(
    machines: Machines, process: str
) -> None:
    """It is cut off, killed and started again: the others' connections to it still look alive."""
    world = machines.world
    child = world.coordinator if process == "c1" else world.services[process]
    others = [machines.nodes[name] for name in ("client", "c1", *BANKS, "db-a", "db-b") if name != process]
    with failpoint("participant.after_prepare", "sleep:1", process=world.services["bank-b"]) as moment:
        client, said = in_the_background(machines.transfer)
        moment.wait()
        for other in others:
            machines.net.part(machines.nodes[process], other)
        child.kill()
    time.sleep(1)
    machines.net.heal()
    child.start()
    client.join(60)
    (xid, told) = said[0]
    ended = machines.ends_well(xid, told)
    eventually(lambda: machines.transfer()[1] == "committed", 45, world.evidence)
    note_proof("network", pair=process, fault="half open", moment="participant.after_prepare", told=told, ended=ended)


def test_a_partition_that_lasts_is_noticed_and_the_coordinator_finishes_when_it_ends(machines: Machines) -> None:
    """Longer than the keepalive (15 s): the session is given up, and taken up again."""
    world = machines.world
    lost = world.services["bank-a"].text().count(LOST)
    with failpoint("coordinator.after_record", "sleep:1", process=world.coordinator) as moment:
        client, said = in_the_background(machines.transfer)
        moment.wait()
        machines.net.part(machines.nodes["bank-a"], machines.nodes["c1"])
    eventually(lambda: world.services["bank-a"].text().count(LOST) > lost, 40, world.evidence)
    client.join(60)
    assert said[0][1] == "committed", "the decision was durable"
    machines.net.heal()
    assert machines.ends_well(*said[0]) == "committed"
