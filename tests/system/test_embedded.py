"""A coordinator inside the program: several databases in one process, and no server."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.runtime.memory_resource import MemoryResource, Page
from tests.waiting import eventually
from txrpc._protocol.messages import GoAway, Outcome, OutcomeReply
from txrpc.ids import Gid, Xid
from txrpc.resource import Prepared, ReadOnly, ResourceInfo
from txrpc.testing.processes import Child

numbers = itertools.count(1)


@pytest.fixture
def databases(servers: Mapping[str, Server]) -> list[tuple[Server, str, str]]:
    """A database on each server: the server, the name, the URL."""
    made = []
    for server in servers.values():
        name = f"embedded{next(numbers)}"
        url = server.create_database(name)
        server.execute("CREATE TABLE entry (number int)", name)
        made.append((server, name, url))
    return made


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'decisions.db'}"


def counts(databases: list[tuple[Server, str, str]]) -> list[int]:
    return [server.execute("SELECT count(*) FROM entry", name)[0][0] for server, name, _ in databases]


def prepared(databases: list[tuple[Server, str, str]]) -> int:
    query = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
    return sum(server.execute(query, name)[0][0] for server, name, _ in databases)


@pytest.fixture
def resources(databases: list[tuple[Server, str, str]]) -> Iterator[list[txrpc.sql.ResourceManager]]:
    engines = [sa.create_engine(url) for _, _, url in databases]
    yield [txrpc.sql.ResourceManager(f"db-{n}", engine) for n, engine in enumerate(engines)]
    for engine in engines:
        engine.dispose()


def insert(resources: list[txrpc.sql.ResourceManager]) -> None:
    for resource in resources:
        with resource.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES (1)"))


def test_two_databases_commit_together_or_not_at_all(
    log: str, databases: list[tuple[Server, str, str]], resources: list[txrpc.sql.ResourceManager]
) -> None:
    with txrpc.embedded(log, resources=resources) as manager:
        assert manager.status().ready
        with txrpc.transaction() as tx:
            insert(resources)
        assert counts(databases) == [1, 1]
        assert manager.outcome(tx.xid) is txrpc.Outcome.COMMITTED
        with pytest.raises(ValueError, match="no"), txrpc.transaction():
            insert(resources)
            raise ValueError("no")
        with txrpc.transaction():
            insert(resources[:1])
        assert counts(databases) == [2, 1]
    assert prepared(databases) == 0
    with txrpc.embedded(log, resources=resources), txrpc.transaction():  # the same log once more
        insert(resources)
    assert counts(databases) == [3, 2]


def test_many_threads_share_one_coordinator(log: str) -> None:
    notebooks = [MemoryResource("one"), MemoryResource("two")]

    def write(number: int) -> None:
        with txrpc.transaction():
            for notebook in notebooks:
                notebook.write(str(number))

    with txrpc.embedded(log, resources=notebooks), ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert sorted(notebooks[0].lines) == sorted(notebooks[1].lines) == sorted(map(str, range(200)))


async def test_two_databases_commit_together_in_asyncio(log: str, databases: list[tuple[Server, str, str]]) -> None:
    engines = [create_async_engine(url) for _, _, url in databases]
    resources = [txrpc.sql.AsyncResourceManager(f"db-{n}", engine) for n, engine in enumerate(engines)]

    async def write() -> None:
        for resource in resources:
            async with resource.connection() as connection:
                await connection.execute(sa.text("INSERT INTO entry VALUES (1)"))

    async with await txrpc.aio.embedded(log, resources=resources):
        async with txrpc.aio.transaction():
            await write()
        with pytest.raises(ValueError, match="no"):
            async with txrpc.aio.transaction():
                await write()
                raise ValueError("no")
    assert counts(databases) == [1, 1]
    assert prepared(databases) == 0
    for engine in engines:
        await engine.dispose()


@pytest.mark.parametrize(
    ("failpoint", "rows"),
    [
        ("participant.after_prepare=kill", 0),
        ("coordinator.before_record=kill", 0),
        ("coordinator.after_record=kill", 1),
        ("participant.after_commit_prepared=kill", 1),
    ],
)
def test_what_a_crash_leaves_is_finished_when_the_program_starts_again(
    log: str, databases: list[tuple[Server, str, str]], tmp_path: Path, failpoint: str, rows: int
) -> None:
    urls = [url for _, _, url in databases]
    program = Child(
        [sys.executable, "-m", "tests.system.embedded_program", log, *urls],
        name="embedded",
        output=tmp_path / "program.log",
    )
    program.arm(failpoint)
    program.launch()
    program.wait()
    assert "told committed" not in program.text()
    again = Child(
        [sys.executable, "-m", "tests.system.embedded_program", log, *urls, "--wait"],
        name="again",
        output=tmp_path / "again.log",
        ready="ready",
    )
    with again:
        eventually(lambda: prepared(databases) == 0, evidence=again.text)
        assert counts(databases) == [rows, rows], again.text()


def test_rule_7_a_second_program_on_the_same_file_is_refused_while_the_first_one_has_it(log: str) -> None:
    with txrpc.embedded(log, resources=[MemoryResource("one")]):
        with pytest.raises(txrpc.ConfigurationError, match="another program has the decision log"):
            txrpc.embedded(log)
        with txrpc.transaction():
            pass
    with txrpc.embedded(log):
        pass


def test_rule_7_on_another_database_the_later_program_ends_the_earlier_one(servers: Mapping[str, Server]) -> None:
    """Its transactions fail at once: a coordinator that has ended here does not come back."""
    url = next(iter(servers.values())).create_database(f"embedded{next(numbers)}")
    began = time.monotonic()
    notebooks = [MemoryResource("one"), MemoryResource("two")]
    with txrpc.embedded(url, resources=notebooks) as first, txrpc.embedded(url) as second:
        with pytest.raises((txrpc.TransactionAborted, txrpc.OutcomeUnknown)), first.transaction():
            for notebook in notebooks:
                notebook.write("x")
        eventually(lambda: first.status().coordinator is None)
        assert "epoch" in first.status().coordinators["embedded"]
        with pytest.raises(txrpc.CoordinatorUnavailable, match="no coordinator"), first.transaction():
            for notebook in notebooks:
                notebook.write("y")
        assert second.status().ready
    assert (notebooks[0].lines, notebooks[1].lines) == ([], [])
    assert time.monotonic() - began < 30


def test_a_mistake_of_its_own_ends_the_coordinator_and_the_log_goes_on_with_the_next(log: str) -> None:
    notebooks = [MemoryResource("one"), MemoryResource("two")]

    def mistaken(_event: object) -> None:
        raise KeyError("a mistake")

    with txrpc.embedded(log, resources=notebooks, commit_timeout=1) as manager:
        session: Any = manager._client.state.sessions[0]
        session._driver.step = mistaken
        with pytest.raises(txrpc.OutcomeUnknown), txrpc.transaction(timeout=1):
            for notebook in notebooks:
                notebook.write("x")
        assert "start the program again" in manager.status().coordinators["embedded"]
    with txrpc.embedded(log, resources=notebooks), txrpc.transaction():
        for notebook in notebooks:
            notebook.write("y")
    assert notebooks[0].lines == notebooks[1].lines == ["y"]


@pytest.mark.parametrize("log", ["sqlite:////no/such/folder/x.db", "nothing://x", "no url at all"])
def test_a_log_that_cannot_be_opened_is_refused_with_a_reason(log: str) -> None:
    with pytest.raises(txrpc.ConfigurationError, match="log"):
        txrpc.embedded(log)


class Identified(MemoryResource):
    """A notebook that says which one it is."""

    def __init__(self, identity: str) -> None:
        super().__init__("bank")
        self.identity = identity

    def start(self) -> ResourceInfo:
        return ResourceInfo(self.name, self.kind, self.identity)


def test_rule_17_another_database_under_the_name_is_refused_at_once(log: str) -> None:
    with txrpc.embedded(log, resources=[Identified("a")]), txrpc.transaction() as tx:
        pass
    began = time.monotonic()
    with pytest.raises(txrpc.ConfigurationError, match=r"'bank' is database b in .* one name must mean one database"):
        txrpc.embedded(log, resources=[Identified("b")], commit_timeout=60)
    assert time.monotonic() - began < 30
    with txrpc.embedded(log, resources=[Identified("a")]) as manager:  # the log was closed
        assert manager.outcome(tx.xid) is not txrpc.Outcome.COMMITTED


class Named(MemoryResource):
    """Remembers in which thread it was asked to prepare."""

    thread = ""

    def prepare(self, work: Page, gid: Gid) -> Prepared | ReadOnly:
        self.thread = threading.current_thread().name
        return super().prepare(work, gid)


def test_the_roots_own_branches_prepare_in_its_own_thread_and_cost_no_messages_for_it(log: str) -> None:
    one, two = Named("one"), Named("two")
    with txrpc.embedded(log, resources=[one, two]) as manager:
        driver = manager._client.state.sessions[0]._driver  # type: ignore[attr-defined]
        before = Counter(driver.messages)
        with manager.transaction():
            one.write("x")
            two.write("x")
        said = Counter(driver.messages) - before
    assert one.thread == two.thread == threading.current_thread().name
    assert {name: number for name, number in said.items() if name != "sent Tick"} == {
        "received CommitRequest": 1,
        "sent Commit": 2,
        "received Acked": 2,
        "sent OutcomeReply": 1,
    }


def test_a_branch_that_cannot_prepare_takes_back_the_votes_before_it(log: str) -> None:
    one, two = MemoryResource("one"), MemoryResource("two")
    two.refuses = True
    with txrpc.embedded(log, resources=[one, two]) as manager:
        with pytest.raises(txrpc.TransactionAborted), manager.transaction():
            one.write("x")
            two.write("x")
        eventually(lambda: not one.prepared)
    assert (one.lines, two.lines) == ([], [])


class Slow(MemoryResource):
    """Its vote comes when a test lets it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.preparing, self.may = threading.Event(), threading.Event()

    def prepare(self, work: Page, gid: Gid) -> Prepared | ReadOnly:
        self.preparing.set()
        assert self.may.wait(60)
        return super().prepare(work, gid)


def test_what_is_being_decided_when_the_program_closes_it_is_decided(log: str) -> None:
    """It had let its session go before, so that no vote reached it, and waited for five seconds in vain."""
    slow, other = Slow("slow"), MemoryResource("other")
    manager = txrpc.embedded(log, resources=[slow, other])

    def commit() -> None:
        with manager.transaction():
            slow.write("x")
            other.write("x")

    with ThreadPoolExecutor(2) as pool:
        committing = pool.submit(commit)
        assert slow.preparing.wait(60)
        closing = pool.submit(manager.close)
        eventually(lambda: manager._client._closed)
        slow.may.set()
        committing.result(60)
        closing.result(60)
    assert slow.lines == other.lines == ["x"]


def test_a_reply_comes_before_the_end_of_the_session_that_was_sent_after_it(log: str) -> None:
    """The end had overtaken it, where both were sent in one turn of the loop: a transaction that was decided was unknown."""
    seen: list[object] = []
    with txrpc.embedded(log) as manager:
        session: Any = manager._client.state.sessions[0]
        core = session._core

        def lost(*arguments: Any) -> None:
            seen.append("lost")
            core.on_lost(*arguments)

        session._core = SimpleNamespace(on_message=lambda _session, _node, message: seen.append(message), on_lost=lost)
        reply = OutcomeReply(Xid(bytes(15) + b"x"), Outcome.COMMITTED)

        def both() -> None:
            session.put(reply)
            session.close_session(GoAway("shutdown", "over", retry=True))

        session._loop.call_soon_threadsafe(both)
        eventually(lambda: seen == [reply, "lost"])


def test_a_service_cannot_join_what_only_this_process_coordinates(log: str) -> None:
    with txrpc.embedded(log) as here, txrpc.embedded(f"{log}2", resources=[MemoryResource("there")]) as there:
        server = grpc.server(ThreadPoolExecutor(2), interceptors=txrpc.server_interceptors(there))
        handler = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", {"echo": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as plain:
            channel: Any = grpc.intercept_channel(plain, *txrpc.client_interceptors())
            with pytest.raises(txrpc.TxrpcError), here.transaction():
                channel.unary_unary("/t.S/echo")(b"x")
        server.stop(0).wait(60)
