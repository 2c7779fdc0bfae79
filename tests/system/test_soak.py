"""Twenty clients, two minutes, random kills of coordinator, services and databases: money is conserved whenever they rest."""

from __future__ import annotations

import collections
import os
import random
import threading
import time
from collections.abc import Callable

import grpc
import pytest

import txrpc
from examples.bank import bank_pb2
from examples.bank.teller import Teller
from tests.postgres import needs_own_server
from tests.system.world import BANKS, START, World, eventually

pytestmark = [pytest.mark.serial, pytest.mark.timeout(600)]

SECONDS = float(os.environ.get("TXRPC_SOAK_S", "120"))
CLIENTS = 20
ROUNDS = 4


class Client(threading.Thread):
    """Transfers until told to stop, and writes down what it was told."""

    def __init__(self, world: World, seed: int, go: threading.Event, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(seed)
        self._world = world
        self._go = go
        self._ended = stop
        self.resting = threading.Event()
        self.told: dict[str, str] = {}
        self.strange: list[str] = []

    def run(self) -> None:
        teller = self._world.teller()
        while not self._ended.is_set():
            if not self._go.is_set():
                self.resting.set()
                self._go.wait(1)
                continue
            self.resting.clear()
            self._transfer(teller)
        teller.close()

    def _transfer(self, teller: Teller) -> None:
        source, target = self._random.sample(range(len(BANKS)), 2)
        accounts = [f"{self._random.randrange(20):04}" for _ in range(2)]
        cents = self._random.randint(1, 50)
        xid = ""
        try:
            with txrpc.transaction(timeout=self._random.uniform(1, 6)) as tx:
                xid = str(tx.xid)
                teller.banks[source].Withdraw(bank_pb2.Amount(account=accounts[0], cents=cents))
                teller.banks[target].Deposit(bank_pb2.Amount(account=accounts[1], cents=cents))
            self.told[xid] = "committed"
        except txrpc.OutcomeUnknown:
            self.told[xid] = "unknown"
        except (txrpc.TransactionAborted, txrpc.CoordinatorUnavailable, txrpc.ResourceUnavailable):
            self.told[xid] = "aborted"
        except grpc.RpcError as error:
            self.told[xid] = "aborted"
            if error.code() not in DOCUMENTED:
                self.strange.append(f"{error.code()} {error.details()}")
        except Exception as error:
            self.strange.append(f"{type(error).__name__}: {error}")


DOCUMENTED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.FAILED_PRECONDITION,  # the bank's own: not enough money
    grpc.StatusCode.UNKNOWN,  # a handler's SQLAlchemy error while its database is down
}


def chaos(world: World, until: float, dice: random.Random, events: list[str]) -> None:
    """Kill something, wait a little, bring it back; again and again."""
    while time.monotonic() < until:
        time.sleep(dice.uniform(0.5, 3))
        name = dice.choice(["coordinator", *BANKS, *(f"database of {bank}" for bank in BANKS)])
        events.append(name)
        if name == "coordinator":
            world.coordinator.kill()
            time.sleep(dice.uniform(0, 1.5))
            world.coordinator.start()
        elif name in BANKS:
            world.services[name].kill()
            time.sleep(dice.uniform(0, 1.5))
            world.services[name].start()
        else:
            server = world.servers[name.removeprefix("database of ")]
            server.kill()
            time.sleep(dice.uniform(0, 1.5))
            server.restart()


@needs_own_server
def test_money_is_conserved_whatever_is_killed(
    make_world: Callable[..., World], connected: Callable[[World], object]
) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    dice = random.Random(seed)
    print(f"seed {seed}")
    world = make_world()
    connected(world)
    go, stop = threading.Event(), threading.Event()
    clients = [Client(world, seed + i, go, stop) for i in range(CLIENTS)]
    events: list[str] = []
    for client in clients:
        client.start()
    for _ in range(ROUNDS):
        go.set()
        chaos(world, time.monotonic() + SECONDS / ROUNDS, dice, events)
        time.sleep(1)
        go.clear()
        for client in clients:
            assert client.resting.wait(60), world.evidence()
        world.at_rest(60)
        check(world, clients)
    stop.set()
    go.set()
    for client in clients:
        client.join(30)
    world.at_rest(60)
    check(world, clients)
    eventually(lambda: world.status()["open"] == 0, 20, world.evidence)
    told = collections.Counter(result for client in clients for result in client.told.values())
    print(f"{told}; {len(events)} kills: {collections.Counter(events)}")
    assert told["committed"] > 50
    assert len(events) >= SECONDS / 12
    assert [strange for client in clients for strange in client.strange] == []


def check(world: World, clients: list[Client]) -> None:
    """At rest: money conserved, both journals agree, and what clients were told is what is there."""
    assert world.total() == 2 * 20 * START
    journals = world.journals()
    assert journals[0].keys() == journals[1].keys(), world.evidence()
    assert [xid for xid in journals[0] if journals[0][xid] + journals[1][xid]] == []
    told = {xid: result for client in clients for xid, result in client.told.items()}
    there = journals[0].keys()
    assert [xid for xid, result in told.items() if result == "committed" and xid not in there] == []
    assert [xid for xid, result in told.items() if result == "aborted" and xid in there] == []
