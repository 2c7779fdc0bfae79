"""How txrpc behaves when there is a lot of something: python -m benchmarks.scale [--of NAME ...].

Each measurement doubles or multiplies one thing and leaves all others as they are: open transactions in a coordinator's memory,
decisions that it makes at one time, records in its log at the start, branches that a crash has left in doubt, branches of one transaction, connected processes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import queue
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

import txrpc
import txrpc.aio
import txrpc.sql
from benchmarks.report import machine
from txrpc._decision_log.sql import SqlLog
from txrpc._grpc.batches import check_first, parse
from txrpc._grpc.link import METHOD
from txrpc._protocol.coordinator.events import Limits, Received, SessionOpened
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.messages import (
    PROTOCOL_VERSION,
    Acked,
    BranchRef,
    Commit,
    CommitRequest,
    FinishResult,
    Hello,
    OutcomeReply,
    ResourceInfo,
    Vote,
)
from txrpc._protocol.records import Decision, Opened, PreparedBranch
from txrpc._wire.codec import encode_to_coordinator
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import CoordinatorProcess

Rows = Iterator[tuple[str, str]]
"""What was measured, and the result in words."""

_BANK = ParticipantId(b"services")
_EPOCH = Epoch.make(1, 1)
_BATCH = 1_000


def _xid(now_ms: int) -> Xid:
    return Xid.make(now_ms, os.urandom(10))


def memory() -> Rows:
    """What an open transaction with two branches takes in a coordinator's memory, from the commit request on."""
    for number in (1_000, 10_000):
        yield f"{number:,} open transactions", f"{bytes_of_an_open_transaction(number):,.0f} bytes each"


def bytes_of_an_open_transaction(number: int) -> float:
    """Return what each of so many takes, with the parts of its request that are kept."""
    core = Coordinator("c1", "default", Opened(_EPOCH, {}, (), 0), Limits(max_transactions=number), 0, 0)
    info = (ResourceInfo("a", "test", "1"), ResourceInfo("b", "test", "2"))
    core.step(SessionOpened(1, Hello(PROTOCOL_VERSION, "default", ParticipantId(b"customer"), "customers")), 0)
    core.step(SessionOpened(2, Hello(PROTOCOL_VERSION, "default", _BANK, "services", info)), 0)
    gc.collect()
    tracemalloc.start()
    for _ in range(number):
        refs = tuple(BranchRef(BranchId(os.urandom(8)), name, _BANK, 1) for name in ("a", "b"))
        core.step(Received(1, "c1", CommitRequest(_xid(0), _EPOCH, 0, refs, 60_000)), 0)
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert core.deciding == number
    return taken / number


def start_up() -> Rows:
    """From the start of a coordinator's process until it listens, with decisions in its log that were not carried out, or were."""
    for pending, done in ((0, 0), (10_000, 0), (100_000, 0), (0, 1_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            coordinator = _coordinator(folder)
            _fill(coordinator.log, pending, done)
            began_s = time.monotonic()
            coordinator.launch()
            try:
                coordinator.wait_for("listening", 60)
                yield f"{pending:,} decisions to carry out, {done:,} done", f"{time.monotonic() - began_s:.2f} s"
            finally:
                coordinator.kill()


def _coordinator(folder: str) -> CoordinatorProcess:
    process = CoordinatorProcess(Path(folder))
    process.environment.pop("TXRPC_FAILPOINTS", None)  # what users do not have is not measured
    return process


def _fill(url: str, pending: int, done: int) -> None:
    log = SqlLog(url)
    now_ms = time.time_ns() // 1_000_000
    epoch = log.open("c1", 1).epoch
    for number, is_done in ((pending, False), (done, True)):
        for _ in range(number // _BATCH):
            batch = [_decision(epoch, now_ms) for _ in range(_BATCH)]
            log.record(batch)
            if is_done:
                log.done([decision.xid for decision in batch], now_ms)
    log.close()


def _decision(epoch: Epoch, now_ms: int) -> Decision:
    branches = (PreparedBranch(BranchId(os.urandom(8)), _BANK, "bank"),)
    return Decision(_xid(now_ms), epoch, now_ms, branches)


def in_doubt() -> Rows:
    """Branches that are prepared in one PostgreSQL, and decided, when coordinator and service start again."""
    number = 10_000
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer.start_new(max_connections=50, max_prepared_transactions=number + 100) as server,
    ):
        url = server.create_database("bank")
        server.execute("CREATE TABLE row (number int)", "bank")
        coordinator = _coordinator(folder)
        log, now_ms = SqlLog(coordinator.log), time.time_ns() // 1_000_000
        epoch = log.open("c1", 1).epoch
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for _ in range(number // _BATCH):
                batch = [_decision(epoch, now_ms) for _ in range(_BATCH)]
                for decision in batch:
                    gid = Gid("default", "c1", epoch, decision.xid, decision.branches[0].branch, _BANK, "bank")
                    connection.exec_driver_sql("BEGIN")
                    connection.exec_driver_sql("INSERT INTO row VALUES (1)")
                    connection.exec_driver_sql(f"PREPARE TRANSACTION '{gid}'")
                log.record(batch)
        log.close()
        bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
        with coordinator, txrpc.connect(coordinator.address, resources=[bank]):
            began_s = time.monotonic()
            left = number
            while left and time.monotonic() < began_s + 120:
                time.sleep(0.1)
                left = int(server.execute("SELECT count(*) FROM pg_prepared_xacts")[0][0])
            took_s = time.monotonic() - began_s
        rows = int(server.execute("SELECT count(*) FROM row", "bank")[0][0])
        yield f"{number:,} branches in doubt", f"{took_s:.1f} s, {rows / took_s:,.0f} a second ({left} left)"


def branches() -> Rows:
    """A transaction over that many databases of one PostgreSQL, with an embedded coordinator."""
    most = 32
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer.start_new(max_connections=200, max_prepared_transactions=100) as server,
    ):
        resources = []
        for number in range(most):
            engine = sa.create_engine(server.create_database(f"bank{number}"), pool_size=1)
            server.execute("CREATE TABLE row (number int)", f"bank{number}")
            resources.append(txrpc.sql.ResourceManager(f"bank-{number}", engine))
        with txrpc.embedded(f"sqlite:///{folder}/log.db", resources=resources):
            for number in (2, 4, 8, 16, 32):
                took = [_transaction(resources[:number]) for _ in range(30)]
                ms = statistics.median(took[5:]) * 1000
                yield f"{number} branches", f"{ms:.1f} ms, {ms / number:.2f} ms each"


def _transaction(resources: Iterable[txrpc.sql.ResourceManager]) -> float:
    began_s = time.monotonic()
    with txrpc.transaction():
        for resource in resources:
            with resource.connection() as connection:
                connection.exec_driver_sql("INSERT INTO row VALUES (1)")
    return time.monotonic() - began_s


def sessions() -> Rows:
    """A transaction over two databases while that many other processes are connected to its coordinator, and idle."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer.start_new(max_connections=50, max_prepared_transactions=50) as server,
        _coordinator(folder) as coordinator,
    ):
        resources = []
        for number in range(2):
            engine = sa.create_engine(server.create_database(f"bank{number}"), pool_size=1)
            server.execute("CREATE TABLE row (number int)", f"bank{number}")
            resources.append(txrpc.sql.ResourceManager(f"bank-{number}", engine))
        with txrpc.connect(coordinator.address, resources=resources):
            for number in (1, 50, 500):
                took = asyncio.run(_among(number - 1, coordinator.address, lambda: _transaction(resources)))
                yield f"{number} sessions", f"{statistics.median(took) * 1000:.1f} ms a transaction"


async def _among(number: int, address: str, measure: Callable[[], float]) -> list[float]:
    others = [await txrpc.aio.connect(address, process=f"idle {each}") for each in range(number)]
    try:
        return await asyncio.to_thread(lambda: [measure() for _ in range(100)][20:])
    finally:
        await asyncio.gather(*(other.close() for other in others))


def decisions() -> Rows:
    """A coordinator that does nothing else: commits of two branches that have voted, so many at one time, over one session."""
    for at_once, done in ((1, 0), (8, 0), (64, 0), (512, 0), (64, 100_000), (64, 1_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            coordinator = _coordinator(folder)
            _fill(coordinator.log, 0, done)
            with coordinator:
                rate, cpu_ms = _decide(coordinator, at_once)
            text = f"{rate:,.0f} a second, {cpu_ms:.2f} ms of processor time each"
            yield f"{at_once} at one time, {done:,} in the log before", text


def _decide(coordinator: CoordinatorProcess, at_once: int) -> tuple[float, float]:
    """Return commits a second, acknowledged by both branches, and what each took of the coordinator's processor time."""
    to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    info = (ResourceInfo("a", "test", "1"), ResourceInfo("b", "test", "2"))
    hello = Hello(PROTOCOL_VERSION, "default", _BANK, "customers and banks", info)
    to_send.put(encode_to_coordinator("", [hello]).SerializeToString())
    with grpc.insecure_channel(coordinator.address) as channel:
        stream: Any = channel
        heard = stream.stream_stream(METHOD)(iter(to_send.get, None))
        welcome, _ = check_first(parse(next(heard)))

        def ask(number: int) -> None:
            now_ms = time.time_ns() // 1_000_000
            asked = []
            for _ in range(number):
                refs = tuple(
                    BranchRef(BranchId(os.urandom(8)), each.name, _BANK, 1, Vote.PREPARED, "7", 1) for each in info
                )
                asked.append(CommitRequest(_xid(now_ms), welcome.owner.epoch, welcome.tick, refs, 60_000))
            to_send.put(encode_to_coordinator(welcome.owner.node, asked).SerializeToString())

        def pump(until_s: float) -> int:
            """Keep so many in progress until then; return how many have ended."""
            ended, open_ = 0, at_once
            ask(at_once)
            for data in heard:
                messages = [message for _, message in parse(data)]
                acks = [
                    Acked(each.gid.xid, each.gid.branch, FinishResult.DONE, each.gid.resource)
                    for each in messages
                    if isinstance(each, Commit)
                ]
                if acks:
                    to_send.put(encode_to_coordinator(welcome.owner.node, acks).SerializeToString())
                replies = sum(isinstance(each, OutcomeReply) for each in messages)
                ended, open_ = ended + replies, open_ - replies
                if replies and time.monotonic() < until_s:
                    ask(replies)
                    open_ += replies
                if not open_:
                    break
            return ended

        pump(time.monotonic() + 1)
        spent_s, began_s = _spent_s(coordinator), time.monotonic()
        number = pump(began_s + 5)
        took_s, spent_s = time.monotonic() - began_s, _spent_s(coordinator) - spent_s
        to_send.put(None)
    return number / took_s, spent_s / number * 1000


def _spent_s(coordinator: CoordinatorProcess) -> float:
    """The processor time of a process so far."""
    fields = Path(f"/proc/{coordinator.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


MEASUREMENTS: dict[str, Callable[[], Rows]] = {
    "memory": memory,
    "decisions": decisions,
    "start-up": start_up,
    "in-doubt": in_doubt,
    "branches": branches,
    "sessions": sessions,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale")
    parser.add_argument("--of", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    console = Console()
    console.print(machine())
    for name in parser.parse_args().of:
        table = Table.grid(padding=(0, 3))
        for what, result in MEASUREMENTS[name]():
            table.add_row(what, result)
        console.print(f"\n{(MEASUREMENTS[name].__doc__ or '').strip()}", style="bold")
        console.print(table, highlight=False)


if __name__ == "__main__":
    main()
