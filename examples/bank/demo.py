"""The main job, on real processes: transfers between two banks while a service, a database and the coordinator are killed.

    python -m examples.bank.demo [--transfers 2000] [--threads 8] [--group] [--final-calls]

With --group there are three coordinators with a disk each; the one that all begin with is killed and stays dead.
With --final-calls the banks prepare before they reply, and their votes come with the replies.

Ends with the proof and exit code 0, or with what is wrong and exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psycopg
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import txrpc
from examples.bank.teller import Teller
from txrpc.testing.postgres import NoPostgres, PostgresServer
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

ACCOUNTS, CENTS = 100, 1_000_000
BANKS = ("bank-a", "bank-b")
REST_S = 60.0


class World:
    """Everything that runs beside this process."""

    def __init__(self, folder: Path, *, group: bool) -> None:
        ports = {node: free_port() for node in (("c1", "c2", "c3") if group else ("c1",))}
        members = ",".join(f"{node}=127.0.0.1:{port}" for node, port in ports.items())
        self.coordinators = [
            CoordinatorProcess(
                folder,
                node=node,
                port=port,
                log=f"sqlite:///{folder / node}.db",
                options=["--members", members] if group else [],
            )
            for node, port in ports.items()
        ]
        self.addresses = ",".join(coordinator.address for coordinator in self.coordinators)
        self.databases = {name: PostgresServer.start_new(max_prepared_transactions=100) for name in BANKS}
        self.ports = {name: free_port() for name in BANKS}
        self.services: dict[str, Child] = {}
        for name in BANKS:
            self.databases[name].create_database("bank")
            self.services[name] = self._service(name, folder)

    def _service(self, name: str, folder: Path) -> Child:
        arguments = [sys.executable, "-m", "examples.bank.service", "--name", name]
        arguments += ["--listen", f"127.0.0.1:{self.ports[name]}", "--coordinator", self.addresses]
        arguments += [
            "--database",
            self.databases[name].url("bank"),
            "--accounts",
            str(ACCOUNTS),
            "--cents",
            str(CENTS),
        ]
        return Child(arguments, name=name, output=folder / f"{name}.log")

    def start(self) -> None:
        """Start the coordinators and the services."""
        with ThreadPoolExecutor() as pool:  # at once: the members of a group wait for each other
            list(pool.map(CoordinatorProcess.start, self.coordinators))
        for service in self.services.values():
            service.start()
        for service in self.services.values():
            service.wait_for("serving")

    def stop(self) -> None:
        """Stop everything, by its own process id."""
        for service in self.services.values():
            service.kill()
        for coordinator in self.coordinators:
            coordinator.kill()
        for database in self.databases.values():
            database.stop()

    def prepared(self) -> dict[str, int]:
        """How many branches each database holds prepared."""
        query = "SELECT count(*) FROM pg_prepared_xacts"
        return {name: int(database.execute(query, "bank")[0][0]) for name, database in self.databases.items()}

    def journal(self, name: str) -> dict[str, int]:
        """What each transaction did to this bank, in cents."""
        rows = self.databases[name].execute("SELECT xid, sum(cents) FROM journal GROUP BY xid", "bank")
        return {str(xid): int(cents) for xid, cents in rows}


@dataclass
class Progress:
    """What the screen shows."""

    transfers: int
    began: float = field(default_factory=time.monotonic)
    results: collections.Counter[str] = field(default_factory=collections.Counter)
    retries: int = 0
    told_committed: set[str] = field(default_factory=set)
    told_unknown: set[str] = field(default_factory=set)
    longest_gap_s: float = 0.0
    events: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last_commit: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.results.total()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def attempt(self, first: bool) -> None:
        with self._lock:
            self.retries += not first

    def finished(self, result: str, xid: str) -> None:
        with self._lock:
            self.results[result] += 1
            if result == "committed":
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - self._last_commit)
                self._last_commit = now
                self.told_committed.add(xid)
            elif result == "outcome unknown":
                self.told_unknown.add(xid)

    def say(self, console: Console, text: str) -> None:
        line = f"{self.elapsed_s:6.1f} s  {text}"
        self.events.append(line)
        if not console.is_terminal:
            console.print(line, highlight=False, soft_wrap=True)


def transfers(teller: Teller, progress: Progress, threads: int) -> None:
    """Random transfers from *threads* threads, each one transaction that is run again while that may help."""

    def one(_: int) -> None:
        amount = random.randint(1, 5_000)
        source, target = random.sample(range(len(BANKS)), 2)
        accounts = [f"{random.randrange(ACCOUNTS):04}" for _ in BANKS]
        xids: list[str] = []

        def transfer() -> None:
            transaction = txrpc.current_transaction()
            xids.append(str(transaction.xid) if transaction else "")
            progress.attempt(first=len(xids) == 1)
            teller.transfer(source, accounts[0], target, accounts[1], amount)

        try:
            txrpc.transactional(timeout=10, retry=txrpc.Retry(within_s=60))(transfer)()
            result = "committed"
        except txrpc.OutcomeUnknown:
            result = "outcome unknown"
        except (txrpc.TxrpcError, grpc.RpcError):
            result = "rolled back"
        progress.finished(result, xids[-1])

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(one, i) for i in range(progress.transfers)]:
            future.result()


def crashes(world: World, progress: Progress, console: Console) -> None:
    """Kill one of each kind on the way, and bring it back a second later; or not, if another one takes it over."""
    coordinator, service, database = world.coordinators[0], world.services["bank-a"], world.databases["bank-b"]
    plan: list[tuple[float, str, Callable[[], object], Callable[[], object]]] = [
        (0.20, f"service bank-a (pid {service.pid})", service.kill, service.start),
        (0.45, f"database of bank-b (pid {database.pid})", database.kill, database.restart),
        (0.70, f"coordinator (pid {coordinator.pid})", coordinator.kill, coordinator.start),
    ]
    for share, what, kill, start in plan:
        while progress.done < share * progress.transfers:
            time.sleep(0.02)
        kill()
        held = ", ".join(f"{count} in {name}" for name, count in _prepared(world).items() if count)
        progress.say(console, f"kill -9 {what}" + (f"; prepared and waiting: {held}" if held else ""))
        if kill == coordinator.kill and len(world.coordinators) > 1:
            heir = _heir(world)
            progress.say(console, f"coordinator {heir} has taken over what c1 had begun; c1 stays dead")
            continue
        time.sleep(1)
        start()
        progress.say(console, f"started again: {what.split(' (')[0]}")


def _heir(world: World) -> str:
    """Wait until another member has taken the dead one over; returns its name."""
    until = time.monotonic() + REST_S
    while time.monotonic() < until:
        for coordinator in world.coordinators[1:]:
            if 'event="taken over"' in coordinator.text():
                return coordinator.name
        time.sleep(0.02)
    raise TimeoutError("no member of the group has taken c1 over")


def _prepared(world: World) -> dict[str, int]:
    """`World.prepared`, or nothing while one of the databases is down."""
    try:
        return world.prepared()
    except psycopg.OperationalError:
        return {}


def screen(progress: Progress) -> RenderableType:
    """The picture while it runs."""
    counts = Table.grid(padding=(0, 2))
    counts.add_row("committed", "rolled back", "outcome unknown", "run again", "per second", style="dim")
    rate = progress.results["committed"] / max(0.1, progress.elapsed_s)
    shown = [progress.results["committed"], progress.results["rolled back"], progress.results["outcome unknown"]]
    counts.add_row(*(f"{number:,}" for number in [*shown, progress.retries]), f"{rate:,.0f}", style="bold")
    bar = ProgressBar(total=progress.transfers, completed=progress.done, width=60)
    events = Text("\n".join(progress.events))
    return Panel(Group(bar, Text(), counts, Text(), events), title="transfers between two banks", width=78)


def rest(world: World) -> None:
    """Wait until nothing is in doubt any more, or long enough."""
    until = time.monotonic() + REST_S
    while time.monotonic() < until and any(world.prepared().values()):
        time.sleep(0.1)


def proof(world: World, progress: Progress, before: int, after: int) -> tuple[bool, Table]:
    """Hold what the databases say against what the client was told."""
    journals = [world.journal(name) for name in BANKS]
    in_both = journals[0].keys() & journals[1].keys()
    in_one = journals[0].keys() ^ journals[1].keys()
    unbalanced = [xid for xid in in_both if journals[0][xid] + journals[1][xid]]
    missing = progress.told_committed - in_both
    surplus = in_both - progress.told_committed - progress.told_unknown
    prepared = sum(world.prepared().values())
    checks = [
        (before == after, "money", f"{before / 100:,.2f} before, {after / 100:,.2f} after"),
        (not in_one, "atomicity", f"{len(in_both):,} transfers are in both journals, {len(in_one)} in only one"),
        (not unbalanced, "balance", f"{len(unbalanced)} transfers changed the two banks by different amounts"),
        (not missing, "durability", f"{len(missing)} transfers were reported committed and are not there"),
        (not surplus, "honesty", f"{len(surplus)} transfers were reported rolled back and are there"),
        (not prepared, "in doubt", f"{prepared} prepared branches are left in the databases"),
    ]
    table = Table.grid(padding=(0, 2))
    for holds, name, text in checks:
        table.add_row(Text("yes", "bold green") if holds else Text("NO", "bold red"), Text(name, "bold"), text)
    return all(holds for holds, _, _ in checks), table


def _picture(console: Console, progress: Progress) -> AbstractContextManager[object]:
    """A live picture on a terminal; elsewhere the events are printed one by one."""
    if not console.is_terminal:
        return nullcontext()
    return Live(console=console, get_renderable=lambda: screen(progress), refresh_per_second=8)


def run(world: World, console: Console, arguments: argparse.Namespace) -> bool:
    """The whole demonstration; returns whether the proof holds."""
    world.start()
    with txrpc.connect(world.addresses, process="teller"):
        teller = Teller([f"127.0.0.1:{world.ports[name]}" for name in BANKS], final=arguments.final_calls)
        before = teller.total()
        progress = Progress(arguments.transfers)
        chaos = threading.Thread(target=crashes, args=(world, progress, console), daemon=True)
        chaos.start()
        with _picture(console, progress):
            transfers(teller, progress, arguments.threads)
            chaos.join(60)
            elapsed_s = progress.elapsed_s
            rest(world)
        after = teller.total()
        holds, table = proof(world, progress, before, after)
        teller.close()
    rate = progress.results["committed"] / elapsed_s
    counts = ", ".join(f"{count:,} {result}" for result, count in progress.results.most_common())
    console.print()
    console.print(
        f"{progress.done:,} transfers in {elapsed_s:.1f} s: {counts}; {progress.retries:,} were run again",
        highlight=False,
    )
    console.print(
        f"{rate:,.0f} commits a second over both banks; the longest pause was {progress.longest_gap_s:.1f} s",
        highlight=False,
    )
    console.print(Panel(table, title="the proof" if holds else "IT DOES NOT HOLD", width=78))
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transfers", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--group", action="store_true", help="three coordinators, of which one dies for good")
    parser.add_argument("--final-calls", action="store_true", help="the banks vote with their replies")
    arguments = parser.parse_args()
    # The events say what happens; the library's own log lines would tear the picture.
    logging.getLogger("txrpc").setLevel(logging.CRITICAL)
    # What is meant for another PostgreSQL of this machine (PGSSLMODE, PGOPTIONS, ...) would reach the private ones too.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="txrpc-demo-"))
    nodes = "three coordinators with a disk each" if arguments.group else "a coordinator"
    console.print(f"Starting two PostgreSQL databases, two bank services and {nodes} ...", highlight=False)
    try:
        world = World(folder, group=arguments.group)
    except NoPostgres as error:
        sys.exit(str(error))
    try:
        holds = run(world, console, arguments)
    finally:
        world.stop()
    if holds:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"the logs are in {folder}")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
