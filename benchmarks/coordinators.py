"""Where decisions are kept, and what that costs: python -m benchmarks.coordinators --seconds 8 --rounds 3.

The same transfers, between two services with a PostgreSQL each, with one coordinator whose log is a SQLite file, one whose log is
in PostgreSQL, one whose log is in an etcd of three, and a group of three with a disk each.  All of them run at once, and take turns: rates are compared within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import txrpc
from tests.etcd import EtcdCluster
from tests.postgres import Server
from tests.system.unavailability import Customer
from tests.system.world import World
from tests.waiting import eventually
from txrpc.testing.postgres import PostgresServer

KINDS = ("SQLite", "PostgreSQL", "etcd of 3", "group of 3")


@dataclass
class Series:
    """What one kind of log has reached."""

    rates: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)


def measure(world: World, clients: int, seconds: float, series: Series) -> None:
    """Let *clients* transfer for some seconds."""
    with txrpc.connect(world.addresses, process="bench"):
        customers = [Customer(world, number) for number in range(clients)]
        for each in customers:
            each.start()
        eventually(lambda: all(len(each.took_s) > 5 for each in customers), 60, world.evidence)
        for each in customers:
            each.took_s.clear()
        threading.Event().wait(seconds)
        taken = [took_s * 1000 for each in customers for took_s in list(each.took_s)]
        for each in customers:
            each.over.set()
        for each in customers:
            each.join(60)
    series.rates.append(len(taken) / seconds)
    series.latencies_ms += taken


def main() -> None:
    """Measure, and print one row a kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    all_series = {kind: Series() for kind in KINDS}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[str, Server] = {
            bank: stack.enter_context(PostgresServer.start_new()) for bank in ("bank-a", "bank-b")
        }
        log = stack.enter_context(PostgresServer.start_new()).create_database("decisions")
        logs = {"PostgreSQL": log, "etcd of 3": stack.enter_context(EtcdCluster()).url()}
        worlds: dict[str, World] = {}
        for number, kind in enumerate(KINDS):
            folder = root / str(number)
            folder.mkdir()
            group = 3 if kind == "group of 3" else 0
            world = worlds[kind] = World(folder, servers, number, [], log=logs.get(kind, ""), group=group)
            stack.callback(world.stop)
            world.start()
        for _ in range(arguments.rounds):
            for kind, world in worlds.items():
                measure(world, arguments.clients, arguments.seconds, all_series[kind])
    first = all_series[KINDS[0]]
    print(f"{arguments.clients} clients, {arguments.rounds} rounds of {arguments.seconds:g} s each")
    print(f"{'log':12} {'transfers/s':>12} {'ratio':>6} {'p50 ms':>8} {'p99 ms':>8}")
    for kind, series in all_series.items():
        ratio = statistics.median(mine / its for mine, its in zip(series.rates, first.rates, strict=True))
        ordered = sorted(series.latencies_ms)
        p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
        print(f"{kind:12} {statistics.median(series.rates):12.0f} {ratio:6.2f} {p50:8.1f} {p99:8.1f}")


if __name__ == "__main__":
    main()
