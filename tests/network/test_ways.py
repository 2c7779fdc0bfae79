"""The ways between processes of one machine held up, delayed and broken in mid-transaction: needs nothing but TCP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

import txrpc
from tests.network.proxy import Way
from tests.postgres import Server
from tests.proof import note_proof
from tests.system.scenarios import carry_out
from tests.system.world import START, Service, World
from tests.waiting import eventually
from txrpc.testing.failpoints import failpoint

pytestmark = pytest.mark.proof

PAIRS = ("client-coordinator", "bank-a-coordinator", "bank-a-database", "client-bank-a")
FAULTS: dict[str, Callable[[Way], Any]] = {
    "held": lambda way: way.hold(),
    "held there": lambda way: way.hold(back=False),
    "held back": lambda way: way.hold(there=False),
    "delayed": lambda way: setattr(way, "delay_s", 0.3),
    "reset": lambda way: way.reset(),
}
MOMENTS = ("participant.after_prepare", "coordinator.after_record")


class Ways:
    """A world with a `Way` for each pair."""

    def __init__(self, folder: Path, servers: dict[str, Server], ends: ExitStack) -> None:
        self.world = world = World(folder, servers, 990, ["--ack-wait-s", "2"])
        ends.callback(world.stop)
        coordinator = world.coordinator.address
        url = make_url(world.urls["bank-a"])
        self.ways = {
            "client-coordinator": ends.enter_context(Way(coordinator)),
            "bank-a-coordinator": ends.enter_context(Way(coordinator)),
            "bank-a-database": ends.enter_context(Way(f"{url.host}:{url.port}")),
            "client-bank-a": ends.enter_context(Way(world.services["bank-a"].address)),
        }
        through = url.set(host="127.0.0.1", port=int(self.ways["bank-a-database"].address.rpartition(":")[2]))
        world.services["bank-a"] = Service(
            world,
            "bank-a",
            through.render_as_string(hide_password=False),
            coordinator=self.ways["bank-a-coordinator"].address,
            port=world.services["bank-a"].port,
        )
        world.start()
        ends.enter_context(txrpc.connect(self.ways["client-coordinator"].address, process="client"))
        self._addresses = [self.ways["client-bank-a"].address, world.services["bank-b"].address]

    def transfer(self, timeout_s: float = 8) -> tuple[str, str]:
        return carry_out("transfer", "", self._addresses, timeout_s)


@pytest.fixture(scope="module")
def ways(servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with ExitStack() as ends:
        yield Ways(tmp_path_factory.mktemp("ways"), servers, ends)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_rule_1_all_ends_alike_when_a_way_is_spoilt(ways: Ways, pair: str, fault: str) -> None:
    world, way = ways.world, ways.ways[pair]
    eventually(lambda: ways.transfer()[1] == "committed", 45, world.evidence)
    point = MOMENTS[(PAIRS.index(pair) + list(FAULTS).index(fault)) % 2]
    child = world.coordinator if point.startswith("coordinator") else world.services["bank-a"]
    said: list[tuple[str, str]] = []
    client = threading.Thread(target=lambda: said.append(ways.transfer()))
    with failpoint(point, "sleep:0.5", process=child) as moment:
        client.start()
        moment.wait()
        FAULTS[fault](way)
    time.sleep(2)
    way.heal()
    client.join(60)
    ((xid, told),) = said
    world.at_rest()
    journals = world.journals()
    assert journals[0].keys() == journals[1].keys(), world.evidence()
    ended = "committed" if xid in journals[0] else "aborted"
    assert told in (ended, "unknown"), world.evidence()
    assert world.total() == 2 * 20 * START
    note_proof("network", pair=pair, fault=fault, moment=point, told=told, ended=ended)


def test_a_way_holds_delays_and_breaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Way(f"127.0.0.1:{server.getsockname()[1]}") as way:
        host, _, port = way.address.partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            there, _ = server.accept()
            client.sendall(b"1")
            assert there.recv(1) == b"1"
            way.hold(back=False)
            client.sendall(b"2")
            there.sendall(b"3")
            assert client.recv(1) == b"3", "the other direction is open"
            there.settimeout(0.3)
            with pytest.raises(TimeoutError):
                there.recv(1)
            way.heal()
            there.settimeout(5)
            assert there.recv(1) == b"2", "held, and not lost"
            way.delay_s = 0.3
            began = time.monotonic()
            client.sendall(b"4")
            assert there.recv(1) == b"4"
            assert time.monotonic() - began >= 0.3
            way.reset()
            assert client.recv(1) == b""
            there.close()
