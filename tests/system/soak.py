"""A long run under mixed load and faults: ``python -m tests.system.soak --minutes 60`` (or ``make soak MINUTES=60``).

A coordinator, two banks with a PostgreSQL server each, and clients of both colours.  Troubled times, in which something is killed,
frozen or made to crash at a failpoint every few seconds, take turns with calm ones; in the second half the coordinator is spared.
At the end: what happened, and PASS or FAIL with the reason, line by line.  The exit code is 0 only if all passed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import click

import txrpc
from tests.system.load import AsyncClient, Client
from tests.system.verdicts import Reading, Sample, Soak, Verdict, verdicts
from tests.system.world import BANKS, START, World
from tests.waiting import eventually
from txrpc._failpoints import POINTS
from txrpc.testing.failpoints import failpoint
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import Child

__all__ = ["Run", "main"]

CLIENTS = 8
SETTLED_S = 6.0
"""After the last fault, until what is in doubt counts."""
OPTIONS = ["--retention-s", "20", "--ack-wait-s", "3"]


class Run:
    """One soak."""

    def __init__(self, world: World, seed: int, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.dice = random.Random(seed)
        self.soak = Soak()
        self.faults = Counter[str]()
        self.began = time.monotonic()
        self._last_fault_s = 0.0
        self._over = threading.Event()
        banks = [service.address for service in world.services.values()]
        self.clients: list[Client | AsyncClient] = [Client(banks, seed + number) for number in range(CLIENTS)]
        self.clients.append(AsyncClient(world.coordinator.address, banks, seed + 1_000))
        self.processes: dict[str, Child] = {
            child.name: child for child in (world.coordinator, *world.services.values())
        }

    @property
    def now_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def go(self) -> list[Verdict]:
        """Run, and judge."""
        watcher = threading.Thread(target=self._watch)
        for thread in (watcher, *self.clients):
            thread.start()
        troubled_s, calm_s = max(8.0, min(60.0, self.seconds / 8)), max(12.0, min(60.0, self.seconds / 8))
        while self.now_s < self.seconds - calm_s:
            self._trouble(self.now_s + troubled_s)
            time.sleep(min(calm_s, max(0.0, self.seconds - self.now_s)))
        for client in self.clients:
            client.over.set()
        for client in self.clients:
            client.join(60)
        self._over.set()
        watcher.join(30)
        self._end()
        return verdicts(self.soak)

    @property
    def told(self) -> dict[str, str]:
        """What all clients were told."""
        return {xid: told for client in self.clients for xid, told in list(client.diary.told.items())}

    # ---------------------------------------------------------------------------------------------------------- trouble

    def _trouble(self, until_s: float) -> None:
        while self.now_s < until_s:
            time.sleep(self.dice.uniform(0.3, 3))
            spare_it = self.now_s > self.seconds / 2
            names = [name for name in self.processes if not (spare_it and name == self.world.coordinator.name)]
            with suppress(TimeoutError):
                self.dice.choice((self._kill, self._freeze, self._crash, self._kill_database))(self.dice.choice(names))
            self._last_fault_s = self.now_s

    def _kill(self, name: str) -> None:
        self.faults[f"{name} killed"] += 1
        self.processes[name].kill()
        self._start_again(name)

    def _start_again(self, name: str) -> None:
        time.sleep(self.dice.uniform(0, 1.5))
        self.processes[name].start()

    def _freeze(self, name: str) -> None:
        self.faults[f"{name} frozen"] += 1
        self.processes[name].suspend()
        time.sleep(self.dice.uniform(0.1, 3))
        self.processes[name].resume()

    def _crash(self, name: str) -> None:
        role = "coordinator" if name == self.world.coordinator.name else "participant"
        point = self.dice.choice(sorted(point for point in POINTS if point.startswith(role)))
        with failpoint(point, f"kill@{self.dice.randint(1, 20)}", process=self.processes[name]) as crash:
            crash.wait(3)  # or nobody came, which is a TimeoutError
            self.processes[name].wait(10)
        self.faults[f"{name} crashed at a failpoint"] += 1
        self._start_again(name)

    def _kill_database(self, name: str) -> None:
        bank = name if name in BANKS else self.dice.choice(BANKS)
        self.faults[f"database of {bank} killed"] += 1
        server: Any = self.world.servers[bank]
        server.kill()
        time.sleep(self.dice.uniform(0, 1.5))
        server.restart()

    # ------------------------------------------------------------------------------------------------------ measuring

    def _watch(self) -> None:
        every_s = max(0.5, min(5.0, self.seconds / 120))
        while not self._over.wait(every_s):
            for name, child in self.processes.items():
                with suppress(OSError, RuntimeError):
                    self.soak.samples.append(_sample(self.now_s, name, child.pid))
            with suppress(Exception):  # it may be down just now
                self.soak.readings.append(self._read())

    def _read(self) -> Reading:
        status = self.world.status()
        log = Path(self.world.coordinator.log.removeprefix("sqlite:///"))
        size_kb = sum(path.stat().st_size for path in log.parent.glob(f"{log.name}*")) / 1024
        ages = [row["age_ms"] / 1000 for row in status["transactions"] if row["state"] == "committing"]
        calm = self.now_s - self._last_fault_s > SETTLED_S
        committed = sum(told == "committed" for told in self.told.values())
        return Reading(self.now_s, calm, size_kb, status["open"], status["in_doubt"], max(ages, default=0.0), committed)

    def _end(self) -> None:
        """At rest: is everything there that should be, and nothing that should not?"""
        try:
            self.world.at_rest(60)
        except AssertionError as error:
            self.soak.left.append(str(error)[:300])
        self.soak.broken += list(self._broken())
        self.soak.strange += [text for client in self.clients for text in client.diary.strange]

    def _broken(self) -> Iterator[str]:
        journals = self.world.journals()
        both = {xid for xid in journals[0] if xid in journals[1]}
        alone = [xid for journal in journals for xid, cents in journal.items() if xid not in both and cents]
        if alone:
            yield f"{len(alone)} transactions are in one journal only: {alone[:3]}"
        if self.world.total() != len(BANKS) * 20 * START:
            yield f"there are {self.world.total()} cents, not {len(BANKS) * 20 * START}"
        there = {xid for journal in journals for xid in journal}
        told = self.told
        if lost := [xid for xid, how in told.items() if how == "committed" and xid not in there]:
            yield f"{len(lost)} were told that they committed, and are not there: {lost[:3]}"
        if kept := [xid for xid, how in told.items() if how == "aborted" and xid in there]:
            yield f"{len(kept)} were told that they were rolled back, and are there: {kept[:3]}"


def _sample(at_s: float, name: str, pid: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmRSS" not in status:
        raise ProcessLookupError(f"{name} has just died")
    memory_mb, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
    return Sample(at_s, name, pid, memory_mb, threads, len(os.listdir(f"/proc/{pid}/fd")))


def report(run: Run, judged: list[Verdict]) -> str:
    """All of it, for people."""
    told = Counter(run.told.values())
    kinds = sum((client.diary.kinds for client in run.clients), Counter[str]())
    lines = [f"{run.now_s:.0f} s, {sum(told.values()):,} transactions: " + _counts(told), "load:   " + _counts(kinds)]
    lines += ["faults: " + _counts(run.faults), ""]
    lines += [f"{'PASS' if one.passed else 'FAIL'}  {one.name}: {one.text}" for one in judged]
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none"


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--seed", default=0, help="Of the faults; a random one by default.")
def main(minutes: float, seed: int) -> None:
    """Soak a whole system for so many minutes, and say what is wrong with it."""
    seed = seed or int.from_bytes(os.urandom(4), "big")
    click.echo(f"seed {seed}")
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="txrpc-soak-")))
        servers = {bank: ends.enter_context(PostgresServer.start_new()) for bank in BANKS}
        world = World(folder, {**servers}, 1, OPTIONS)
        ends.callback(world.stop)
        world.start()
        eventually(lambda: world.status()["open"] == 0)
        ends.enter_context(txrpc.connect(world.coordinator.address, process="soak"))
        run = Run(world, seed, minutes * 60)
        judged = run.go()
        click.echo(report(run, judged))
    sys.exit(not all(one.passed for one in judged))


if __name__ == "__main__":
    main()
