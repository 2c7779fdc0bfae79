"""Transactions that a resource of their root's process decides: real PostgreSQL, a real coordinator, services over real gRPC."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.proof import note_proof
from tests.runtime.memory_resource import MemoryResource
from tests.system.ledger_program import CENTS
from tests.system.world import World
from tests.waiting import aeventually, eventually
from txrpc.cli import overview
from txrpc.cli.reach import Reach
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import Child, CoordinatorProcess

numbers = itertools.count(1)
LONG_S = 300
"""Longer than any test is patient."""
PATIENCE_S = 60


class Database:
    """A fresh database on one of the servers, with a table of rows."""

    def __init__(self, server: Server) -> None:
        self.server, self.name = server, f"last{next(numbers)}"
        self.url = server.create_database(self.name)
        self.ask("CREATE TABLE entry (number int PRIMARY KEY)")

    def ask(self, query: str) -> Any:
        return self.server.execute(query, self.name)

    @property
    def rows(self) -> list[int]:
        return [row[0] for row in self.ask("SELECT number FROM entry ORDER BY 1")]

    @property
    def prepared(self) -> int:
        count: int = self.ask("SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()")[0][0]
        return count

    @property
    def decisions(self) -> list[tuple[bool, bool]]:
        """COMMITTED, and done."""
        return [(bool(one), bool(two)) for one, two in self.ask("SELECT committed, done FROM txrpc_decision")]


class File(Database):
    """The same in a SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"last{next(numbers)}.db"
        self.url = f"sqlite:///{self.path}"
        self.ask("CREATE TABLE entry (number int PRIMARY KEY)")

    def ask(self, query: str) -> Any:
        with contextlib.closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            return [connection.execute(statement).fetchall() for statement in query.split("; ")][-1]

    @property
    def prepared(self) -> int:
        return 0


@pytest.fixture
def ledger(servers: Mapping[str, Server]) -> Database:
    return Database(next(iter(servers.values())))


@pytest.fixture
def other(servers: Mapping[str, Server]) -> Database:
    return Database(list(servers.values())[1])


def insert(resource: txrpc.sql.ResourceManager, number: int = 1) -> None:
    with resource.connection() as connection:
        connection.execute(sa.text(f"INSERT INTO entry VALUES ({number})"))


# ------------------------------------------------------------------------------------------------------------- one program


@pytest.fixture
def resources(ledger: Database, other: Database) -> Iterator[tuple[txrpc.sql.ResourceManager, ...]]:
    engines = [sa.create_engine(each.url) for each in (ledger, other)]
    yield (
        txrpc.sql.ResourceManager("ledger", engines[0], decides=True),
        txrpc.sql.ResourceManager("other", engines[1]),
    )
    for engine in engines:
        engine.dispose()


def test_both_databases_of_a_program_commit_and_the_row_is_marked_done(
    tmp_path: Path, ledger: Database, other: Database, resources: tuple[txrpc.sql.ResourceManager, ...]
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources) as manager:
        with txrpc.transaction(decide_in="ledger") as tx:
            for resource in resources:
                insert(resource)
        assert ledger.rows == [1]
        eventually(lambda: ledger.decisions == [(True, True)])
        assert other.rows == [1]
        assert manager.outcome(tx.xid) is txrpc.Outcome.COMMITTED
        with pytest.raises(ValueError, match="no"), txrpc.transaction(decide_in=resources[0]):
            for resource in resources:
                insert(resource, 2)
            raise ValueError("no")
        assert (ledger.rows, other.rows) == ([1], [1])
        assert len(ledger.decisions) == 1, "to abort costs no write"
    assert (ledger.prepared, other.prepared) == (0, 0)


@pytest.mark.parametrize("wait", [None, "acknowledged"])
def test_the_caller_may_wait_for_the_second_phase(
    tmp_path: Path, ledger: Database, other: Database, resources: tuple[txrpc.sql.ResourceManager, ...], wait: Any
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources):
        with txrpc.transaction(decide_in="ledger", wait=wait, propagation="requires_new") as tx:
            for resource in resources:
                insert(resource)
        if wait is None:
            assert tx.pending == ("other",)
        else:
            assert tx.pending == ()
            assert other.rows == [1]
        eventually(lambda: other.rows == [1])


def test_a_ledger_that_is_not_used_decides_all_the_same(
    tmp_path: Path, ledger: Database, other: Database, resources: tuple[txrpc.sql.ResourceManager, ...]
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources):
        with txrpc.transaction(decide_in="ledger"):
            insert(resources[1])
        eventually(lambda: other.rows == [1])
        eventually(lambda: ledger.decisions == [(True, True)])
        with txrpc.transaction(decide_in="ledger"):
            insert(resources[0], 5)
        with txrpc.transaction(decide_in="ledger"):
            pass
        assert ledger.rows == [5]
        assert len(ledger.decisions) == 1, "alone it needs no row"


def test_a_database_that_cannot_prepare_can_decide(tmp_path: Path, other: Database) -> None:
    with PostgresServer.start_new(max_prepared_transactions=0) as server:
        bare = sa.create_engine(server.url())
        engine = sa.create_engine(other.url)
        with bare.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE entry (number int PRIMARY KEY)")
        ledger = txrpc.sql.ResourceManager("ledger", bare, decides=True)
        resources = ledger, txrpc.sql.ResourceManager("other", engine)
        with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources):
            with txrpc.transaction(decide_in="ledger", wait="acknowledged"):
                for resource in resources:
                    insert(resource)
            with txrpc.transaction():
                insert(ledger, 2)  # alone
            with pytest.raises(txrpc.TransactionAborted, match="ledger"), txrpc.transaction():
                for resource in resources:
                    insert(resource, 3)
            with ledger.connection() as connection:
                assert connection.scalars(sa.text("SELECT number FROM entry ORDER BY 1")).all() == [1, 2]
        assert other.rows == [1]
        bare.dispose()
        engine.dispose()


def test_a_file_decides_and_alone_it_commits_by_itself(tmp_path: Path, other: Database) -> None:
    file = File(tmp_path)
    engines = [sa.create_engine(each.url) for each in (file, other)]
    resources = [
        txrpc.sql.ResourceManager("ledger", engines[0], decides=True),
        txrpc.sql.ResourceManager("other", engines[1]),
    ]
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources, decide_in="ledger"):
        with txrpc.transaction(wait="acknowledged"):
            for resource in resources:
                insert(resource)
        eventually(lambda: file.decisions == [(True, True)])
        with txrpc.transaction():
            insert(resources[0], 2)
        with pytest.raises(txrpc.TransactionAborted, match="SQLite cannot prepare"), txrpc.transaction(decide_in=""):
            for resource in resources:
                insert(resource, 3)
        with pytest.raises(ValueError, match="no"), txrpc.transaction():
            for resource in resources:
                insert(resource, 4)
            raise ValueError("no")
        assert (file.rows, other.rows, len(file.decisions)) == ([1, 2], [1], 1)
    for engine in engines:
        engine.dispose()


def test_a_transaction_that_only_reads_has_nothing_to_decide(
    tmp_path: Path, ledger: Database, resources: tuple[txrpc.sql.ResourceManager, ...]
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources):
        with txrpc.transaction(decide_in="ledger", read_only=True):
            for resource in resources:
                with resource.connection() as connection:
                    connection.execute(sa.text("SELECT * FROM entry"))
        assert ledger.decisions == []


async def test_the_same_in_asyncio(tmp_path: Path, ledger: Database, other: Database) -> None:
    engines = [create_async_engine(each.url) for each in (ledger, other)]
    resources = [
        txrpc.sql.AsyncResourceManager("ledger", engines[0], decides=True),
        txrpc.sql.AsyncResourceManager("other", engines[1]),
    ]
    async with await txrpc.aio.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources, decide_in="ledger"):
        async with txrpc.aio.transaction(wait="acknowledged"):
            for resource in resources:
                async with resource.connection() as connection:
                    await connection.execute(sa.text("INSERT INTO entry VALUES (1)"))
        assert (ledger.rows, other.rows) == ([1], [1])
        await aeventually(lambda: ledger.decisions == [(True, True)])
    for engine in engines:
        await engine.dispose()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("nothing", txrpc.ResourceUnavailable, "known are ledger, other"),
        ("other", txrpc.ConfigurationError, "decides=True"),
        (7, txrpc.UsageError, "a resource, or its name"),
    ],
)
def test_a_resource_that_cannot_decide_is_refused_at_once(
    tmp_path: Path, resources: tuple[txrpc.sql.ResourceManager, ...], given: Any, error: type[Exception], says: str
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources), pytest.raises(error, match=says):
        txrpc.begin(decide_in=given)


def test_what_is_over_is_marked_together_and_at_the_latest_when_the_program_ends(
    tmp_path: Path,
    ledger: Database,
    resources: tuple[txrpc.sql.ResourceManager, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mark is a forced write in the database that decides: one for each transaction would cost as much as its decision."""
    monkeypatch.setattr("txrpc._client.registers._MARK_EVERY_MS", 1000 * LONG_S)
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources, decide_in="ledger") as manager:
        for number in range(3):
            with txrpc.transaction():
                for resource in resources:
                    insert(resource, number)
        eventually(lambda: len(manager._client.state.to_mark.get("ledger", ())) == 3)
        assert ledger.decisions == [(True, False)] * 3
    assert ledger.decisions == [(True, True)] * 3


def test_a_program_says_once_which_database_decides(
    tmp_path: Path, ledger: Database, other: Database, resources: tuple[txrpc.sql.ResourceManager, ...]
) -> None:
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources, decide_in=resources[0]):
        with txrpc.transaction(wait="acknowledged"):
            for resource in resources:
                insert(resource)
        with txrpc.transaction(read_only=True):
            pass
        eventually(lambda: ledger.decisions == [(True, True)])
        with txrpc.transaction(decide_in=""):
            for resource in resources:
                insert(resource, 2)
        assert (ledger.rows, other.rows) == ([1, 2], [1, 2])
        assert len(ledger.decisions) == 1, "the coordinator decided"


def test_what_cannot_decide_is_no_default(tmp_path: Path, resources: tuple[txrpc.sql.ResourceManager, ...]) -> None:
    log, (ledger, other) = f"sqlite:///{tmp_path}/log.db", resources
    with pytest.raises(txrpc.ConfigurationError, match="decides=True"):
        txrpc.embedded(log, resources=resources, decide_in="other")
    with pytest.raises(txrpc.ConfigurationError, match="resources="):
        txrpc.embedded(log, resources=[other], decide_in=ledger)
    with pytest.raises(txrpc.UsageError, match="a resource, or its name"):
        txrpc.embedded(log, resources=resources, decide_in=7)  # type: ignore[arg-type]
    with (
        txrpc.embedded(log, resources=resources, decide_in="elsewhere"),
        pytest.raises(txrpc.ResourceUnavailable, match="known are"),
    ):
        txrpc.begin()


# ------------------------------------------------------------------------------------------------------------- services


class Service:
    """Writes numbers into its notebook."""

    def __init__(self, coordinator: CoordinatorProcess, name: str, ends: ExitStack) -> None:
        self.notebook = MemoryResource(name)
        self.manager = ends.enter_context(txrpc.connect(coordinator.address, resources=[self.notebook], process=name))
        server = grpc.server(ThreadPoolExecutor(8), interceptors=txrpc.server_interceptors(self.manager))
        handler = grpc.unary_unary_rpc_method_handler(self._write)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", {"write": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ends.callback(lambda: server.stop(0).wait(PATIENCE_S))
        plain: Any = ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        channel: Any = grpc.intercept_channel(plain, *txrpc.client_interceptors())
        self.write: Any = channel.unary_unary("/t.S/write")

    def _write(self, request: bytes, _context: Any) -> bytes:
        handle: Any = txrpc.current_transaction()
        with handle.use(self.notebook) as page:
            page.write(request.decode())
        return b"written"


def looks_through(resource: txrpc.sql.ResourceManager) -> Callable[[], bool]:
    """Return whether its register has been looked through at its start: what is decided before that is said twice."""
    decider: Any = resource.decider
    look, looked = decider.undone, threading.Event()

    def undone() -> Any:
        try:
            return look()
        finally:
            looked.set()

    decider.undone = undone
    return looked.is_set


class Shop:
    """Two services, and a client whose ledger decides."""

    def __init__(self, coordinator: CoordinatorProcess, ledger: Database) -> None:
        self.ends = ExitStack()
        self.coordinator = coordinator
        self.a, self.b = (Service(coordinator, name, self.ends) for name in ("a", "b"))
        engine = sa.create_engine(ledger.url)
        self.ends.callback(engine.dispose)
        self.ledger = txrpc.sql.ResourceManager("ledger", engine, decides=True)
        looked = looks_through(self.ledger)
        self.client = self.ends.enter_context(
            txrpc.connect(coordinator.address, resources=[self.ledger], process="client")
        )
        eventually(looked)

    @property
    def lines(self) -> tuple[list[str], list[str]]:
        return self.a.notebook.lines, self.b.notebook.lines


@pytest.fixture
def shop(coordinator: CoordinatorProcess, ledger: Database) -> Iterator[Shop]:
    shop = Shop(coordinator, ledger)
    with shop.ends:
        yield shop


def test_after_final_calls_nothing_is_said_before_the_commit_returns(shop: Shop, ledger: Database) -> None:
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
        insert(shop.ledger)
        with txrpc.final_call():
            shop.a.write(b"one")
            shop.b.write(b"two")
    assert ledger.rows == [1]
    eventually(lambda: shop.lines == (["one"], ["two"]))
    eventually(lambda: ledger.decisions == [(True, True)])


def said(shop: Any) -> Counter[str]:
    """What the coordinator has sent and received so far, clocks and the directory aside, and its decisions."""
    status = overview.as_dict(overview.ask(Reach(shop.coordinator.address), 1_000, 10))
    others = ("Hello", "Welcome", "Tick", "Registers")
    found = Counter({name: int(count) for name, count in status["messages"].items() if not name.endswith(others)})
    return found + Counter(decisions=int(status["log_decisions"]))


@pytest.mark.parametrize("final", [True, False])
def test_the_messages_are_those_of_the_protocols_table_and_the_log_has_nothing(
    shop: Shop, ledger: Database, final: bool
) -> None:
    """Three branches that wrote: two and 2(N - 1) messages afterwards, and where votes are missing as many more before."""
    before = said(shop)
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
        insert(shop.ledger)
        with txrpc.final_call() if final else nullcontext():
            shop.a.write(b"one")
            shop.b.write(b"two")
    eventually(lambda: ledger.decisions == [(True, True)])
    after = {"received Decided": 1, "sent Commit": 2, "received Acked": 2, "sent DecisionDone": 1}
    votes = {"received CommitRequest": 1, "sent Prepare": 2, "received Voted": 2, "sent Votes": 1}
    assert said(shop) - before == Counter(after if final else after | votes)


def test_the_coordinator_collects_the_votes_that_are_missing(shop: Shop, ledger: Database) -> None:
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
        insert(shop.ledger)
        shop.a.write(b"one")
        with txrpc.final_call():
            shop.b.write(b"two")
    assert ledger.rows == [1]
    eventually(lambda: shop.lines == (["one"], ["two"]))
    eventually(lambda: ledger.decisions == [(True, True)])


def test_one_vote_against_rolls_everything_back(shop: Shop, ledger: Database) -> None:
    shop.b.notebook.refuses = True
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(decide_in="ledger", manager=shop.client):
        insert(shop.ledger)
        shop.a.write(b"one")
        shop.b.write(b"two")
    assert ledger.rows == []
    eventually(lambda: shop.a.notebook.verbs[-1] in ("rollback_prepared", "rollback"))
    assert shop.lines == ([], [])
    assert ledger.decisions == []


# -------------------------------------------------------------------------------------------------------------- crashes

ROOT, C1, A = "root", "c1", "bank-a"
CRASHES = [
    # The root, which has the deciding database: before, between and after the row and its COMMIT.
    (ROOT, "participant.before_decide", True, False),
    (ROOT, "participant.before_insert_decision", True, False),
    (ROOT, "participant.after_insert_decision", True, False),
    (ROOT, "participant.after_decide", True, True),
    (ROOT, "participant.before_decided", True, True),
    (ROOT, "participant.after_decided", True, True),
    (ROOT, "client.after_commit_request", False, None),
    (ROOT, "participant.after_insert_decision", False, False),
    (ROOT, "participant.before_decided", False, True),
    # The coordinator.
    (C1, "coordinator.before_votes", False, False),
    (C1, "coordinator.after_votes", False, None),
    (C1, "coordinator.before_commit", True, True),
    (C1, "coordinator.before_decision_done", True, True),
    (C1, "coordinator.after_decision_done", True, True),
    # A bank.
    (A, "participant.after_prepare", True, False),
    (A, "participant.after_prepare", False, False),
    (A, "participant.after_reply", True, None),
    (A, "participant.before_commit_prepared", True, True),
    (A, "participant.after_commit_prepared", True, True),
]
"""Which process is killed where, whether the calls are final, and how the transaction then ends (None: either way)."""
ALWAYS = {
    ("postgresql", "participant.after_insert_decision"),
    ("postgresql", "participant.before_decided"),
    ("postgresql", "coordinator.before_commit"),
    ("sqlite", "participant.after_insert_decision"),
}
"""The points of `make test`."""


class Ledger:
    """A world of two banks, the database of a ledger, and a process that can ask its register."""

    def __init__(self, world: World, database: Database) -> None:
        self.world, self.database = world, database
        database.ask("DROP TABLE entry; CREATE TABLE entry (xid text)")
        self.engine = sa.create_engine(database.url)

    def root(self, final: bool) -> Child:
        addresses = [service.address for service in self.world.services.values()]
        program = [sys.executable, "-m", "tests.system.ledger_program", self.world.addresses, *addresses]
        program += ["--ledger", self.database.url, *(["--final"] if final else [])]
        output = self.world.folder / f"root{next(numbers)}.log"
        return Child(program, name="root", output=output, ready="ready")

    def keeper(self) -> txrpc.TransactionManager:
        """Another process with the register: one that knows nothing of the transaction."""
        ledger = txrpc.sql.ResourceManager("ledger", self.engine, decides=True)
        return txrpc.connect(self.world.addresses, resources=[ledger], process="keeper")

    def check(self, before: list[int], told: str) -> bool:
        """Return whether it committed: in the ledger and in both banks, or nowhere, and as its root was told."""
        rows = self.database.ask("SELECT xid FROM entry")
        moved = [now - was for now, was in zip(self.world.money(), before, strict=True)]
        committed = bool(rows)
        assert moved == ([-CENTS, CENTS] if committed else [0, 0])
        assert not told.startswith("committed") or committed
        assert not told.startswith("aborted") or not committed
        decisions = self.database.decisions
        assert (True, True) in decisions if committed else (True, False) not in decisions
        return committed


@pytest.fixture
def ledger_world(
    request: pytest.FixtureRequest, make_world: Callable[..., World], ledger: Database, tmp_path: Path
) -> Iterator[Ledger]:
    """By default the ledger is in PostgreSQL; ``sqlite`` as the fixture's parameter puts it into a file."""
    made = Ledger(make_world(), File(tmp_path) if getattr(request, "param", "") == "sqlite" else ledger)
    yield made
    made.engine.dispose()


@pytest.mark.parametrize(
    ("ledger_world", "process", "point", "final", "commits"),
    [
        pytest.param(
            kind,
            *cell,
            id=f"{kind}-{cell[0]}-{cell[1]}-{'final' if cell[2] else 'polled'}",
            marks=[] if cell[2] and (kind, cell[1]) in ALWAYS else pytest.mark.proof,
        )
        for kind, cells in (("postgresql", CRASHES), ("sqlite", [cell for cell in CRASHES if cell[0] == ROOT]))
        for cell in cells
    ],
    indirect=["ledger_world"],
)
def test_rule_1_all_ends_alike_whoever_dies_where(
    ledger_world: Ledger, process: str, point: str, final: bool, commits: bool | None
) -> None:
    world, before = ledger_world.world, ledger_world.world.money()
    root = ledger_world.root(final)
    children = {"root": root, "c1": world.coordinator, **world.services}
    victim = children[process]
    root.arm(f"{point}=kill" if victim is root else "")
    if victim is not root:
        victim.arm(f"{point}=kill")
    with ExitStack() as stack:
        if victim is not root:
            stack.enter_context(ledger_world.keeper())
        root.start()
        victim.wait(60)
        assert f"failpoint {point}: kill" in victim.text()
        if victim is root:
            stack.enter_context(ledger_world.keeper())
        else:
            victim.arm("")
            victim.start()
            root.wait(60)
        told = root.text().partition("told ")[2].strip()
        world.at_rest(60)
        eventually(lambda: (True, False) not in ledger_world.database.decisions, 60, world.evidence)
        committed = ledger_world.check(before, told)
    assert commits in (None, committed)
    note_proof("last resource", process=process, point=point, final=final, committed=committed)
