"""How long clients wait when a coordinator dies: python -m tests.system.unavailability --nodes 2 --kills 30 [--etcd], or --group 3.

Some clients transfer money without a pause.  Again and again the coordinator that they begin with is killed (of a group, each
member in turn), and started again when all of them go on.  Measured is, for each client and kill, how long it takes from the kill
to its next commit.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import txrpc
from tests.etcd import EtcdCluster
from tests.postgres import Server
from tests.system.world import START, World
from tests.waiting import eventually
from txrpc.testing.postgres import PostgresServer

__all__ = ["Customer", "measure", "transferring"]


class Customer(threading.Thread):
    """Transfers one cent at a time from its own account to the same one at the other bank, and back.

    Notes when each commit returned, and how long its transfer took.
    """

    def __init__(self, world: World, number: int) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._account = f"{number:04}"
        self.commits: list[float] = []
        self.took_s: list[float] = []
        self.failures = 0
        self.over = threading.Event()

    def run(self) -> None:
        teller = self._world.teller()
        there = True
        while not self.over.is_set():
            began = time.monotonic()
            try:
                teller.transfer(0 if there else 1, self._account, 1 if there else 0, self._account, 1)
            except (txrpc.TransactionAborted, txrpc.Unavailable, txrpc.OutcomeUnknown):
                self.failures += 1
                self.over.wait(0.01)  # a customer tries again, but not in a busy loop
            else:
                ended = time.monotonic()
                self.commits.append(ended)
                self.took_s.append(ended - began)
                there = not there
        teller.close()


@contextlib.contextmanager
def transferring(world: World, clients: int) -> Iterator[list[Customer]]:
    """That many customers at work; at the end all is at rest, and no cent is lost."""
    customers = [Customer(world, number) for number in range(clients)]
    with txrpc.connect(world.addresses, process="customers"):
        for customer in customers:
            customer.start()
        yield customers
        for customer in customers:
            customer.over.set()
        for customer in customers:
            customer.join(60)
    world.at_rest()
    assert world.total() == 2 * 20 * START, world.evidence()


def measure(world: World, kills: int, clients: int = 4) -> list[float]:
    """Kill the coordinator of *world* that clients begin with, that many times; seconds until each client's next commit."""
    waits: list[float] = []
    with transferring(world, clients) as customers:
        for number in range(kills):
            eventually(lambda: all(len(each.commits) >= 5 for each in customers), 60, world.evidence)
            victim = world.coordinators[number % len(world.coordinators) if world.group else 0]
            victim.kill()
            killed = time.monotonic()
            if len(world.coordinators) == 1:
                victim.start()
            for customer in customers:
                eventually(lambda each=customer, at=killed: each.commits[-1] > at, 60, world.evidence)  # type: ignore[misc]
            waits += [next(at for at in each.commits if at > killed) - killed for each in customers]
            if len(world.coordinators) > 1:
                victim.start()
            for customer in customers:
                customer.commits.clear()
    return waits


def _server() -> Any:
    return PostgresServer.start_new()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--etcd", action="store_true")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--clients", type=int, default=4)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[str, Server] = {bank: stack.enter_context(_server()) for bank in ("bank-a", "bank-b")}
        log = stack.enter_context(EtcdCluster()).url() if arguments.etcd else ""
        world = World(folder, servers, 1, [], nodes=arguments.nodes, log=log, group=arguments.group)
        stack.callback(world.stop)
        world.start()
        waits = sorted(measure(world, arguments.kills, arguments.clients))
    what = (
        f"a group of {arguments.group}"
        if arguments.group
        else f"{arguments.nodes} nodes on one log{' in etcd' if arguments.etcd else ''}"
    )
    print(f"{what}, {arguments.kills} kills, {len(waits)} waits in seconds:")
    tenth = waits[int(len(waits) * 0.9)]
    print(f"median {statistics.median(waits):.2f}, nine in ten below {tenth:.2f}, longest {waits[-1]:.2f}")


if __name__ == "__main__":
    main()
