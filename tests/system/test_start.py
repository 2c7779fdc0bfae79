"""A real process with two real databases, of which one refuses it when it starts (G7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from examples.bank import bank_pb2
from tests.postgres import Server
from tests.system.world import World
from tests.waiting import aeventually, eventually

Make = Callable[..., World]
ACCOUNT = bank_pb2.Amount(account="0000", cents=100)


@pytest.fixture
def refused(servers: dict[str, Server]) -> Iterator[str]:
    """A URL of a role that may not log in yet."""
    server = servers["bank-b"]
    server.create_database("late")
    server.execute("CREATE ROLE latecomer NOLOGIN PASSWORD 'late'", "late")
    server.execute("CREATE TABLE note (line text); GRANT ALL ON note TO latecomer", "late")
    servers["bank-a"].create_database("early")
    servers["bank-a"].execute("CREATE TABLE note (line text)", "early")
    yield server.url("late", "psycopg")
    servers["bank-a"].execute("DROP DATABASE early WITH (FORCE)")
    server.execute("DROP DATABASE late WITH (FORCE)")
    server.execute("DROP ROLE latecomer")


def as_latecomer(url: str) -> str:
    return make_url(url).set(username="latecomer", password="late").render_as_string(hide_password=False)


def named(world: World) -> dict[str, str]:
    """The resources of this process, with their troubles, as the coordinator shows them."""
    (session,) = [each for each in world.status()["sessions"] if each["process"] == "test"]
    return {each["name"]: each["trouble"] for each in session["resources"]}


def test_a_process_starts_with_the_database_that_is_healthy(
    make_world: Make, servers: dict[str, Server], refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    """G7: `connect` raised at the first that was away, and the healthy ones were not finished."""
    world = make_world()
    healthy = txrpc.sql.ResourceManager("healthy", create_engine(servers["bank-a"].url("early", "psycopg")))
    late = txrpc.sql.ResourceManager("late", create_engine(as_latecomer(refused)))
    with txrpc.connect(world.coordinator.address, resources=[healthy, late], process="test"):
        assert "late" in caplog.text
        with txrpc.transaction(), healthy.session() as session:
            session.execute(text("INSERT INTO note VALUES ('alone')"))
        with pytest.raises(
            txrpc.ResourceUnavailable, match=r"'late' of this process is not ready: .*not permitted to log in"
        ):
            with txrpc.transaction(), late.session():
                pass
        troubles = named(world)
        assert troubles["healthy"] == ""
        assert "not permitted to log in" in troubles["late"]
        servers["bank-b"].execute("ALTER ROLE latecomer LOGIN")
        eventually(
            lambda: named(world) == {"healthy": "", "late": ""}, evidence=lambda: str(world.status()["sessions"])
        )
        with txrpc.transaction():
            for resource in (healthy, late):
                with resource.session() as session:
                    session.execute(text("INSERT INTO note VALUES ('together')"))
    for resource in (healthy, late):
        resource.engine.dispose()
    assert servers["bank-b"].execute("SELECT line FROM note", "late") == [("together",)]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_the_same_in_asyncio(make_world: Make, servers: dict[str, Server], refused: str, driver: str) -> None:
    world = make_world()
    url = as_latecomer(refused).replace("psycopg", driver)
    late = txrpc.sql.AsyncResourceManager("late", create_async_engine(url))
    async with await txrpc.aio.connect(world.coordinator.address, resources=[late], process="test"):
        with pytest.raises(txrpc.ResourceUnavailable, match="not permitted to log in"):
            async with txrpc.aio.transaction(), late.session():
                pass
        assert "not permitted to log in" in named(world)["late"]
        servers["bank-b"].execute("ALTER ROLE latecomer LOGIN")
        await aeventually(lambda: named(world) == {"late": ""})
        async with txrpc.aio.transaction(), late.session() as session:
            await session.execute(text("INSERT INTO note VALUES ('late')"))
    await late.engine.dispose()
    assert servers["bank-b"].execute("SELECT line FROM note", "late") == [("late",)]


def test_rule_14_a_decision_that_waits_is_carried_out_when_the_database_lets_somebody_in(
    make_world: Make, servers: dict[str, Server], connected: Callable[[World], txrpc.TransactionManager]
) -> None:
    """The service dies with a decided branch; who comes for it is refused by the database for a while."""
    world = make_world(bank_a="participant.before_commit_prepared=kill")
    connected(world)
    teller = world.teller()
    tx = txrpc.begin(timeout=15)
    teller.banks[0].Withdraw(ACCOUNT)
    teller.banks[1].Deposit(ACCOUNT)
    tx.commit(wait=txrpc.Wait.DECISION)
    teller.close()
    world.services["bank-a"].wait()
    server, database = servers["bank-a"], world.databases["bank-a"]
    prepared = f"SELECT gid FROM pg_prepared_xacts WHERE database = '{database}'"
    url = make_url(server.url(database, "psycopg"))
    server.execute(f"ALTER DATABASE {database} CONNECTION LIMIT 0")  # which does not hold for superusers
    server.execute(f"CREATE ROLE modest LOGIN PASSWORD 'modest' IN ROLE \"{url.username}\"")
    modest = txrpc.sql.ResourceManager("bank-a", create_engine(url.set(username="modest", password="modest")))
    try:
        with txrpc.connect(world.coordinator.address, resources=[modest], process="modest"):
            assert "too many connections" in str(world.status()["sessions"])
            assert len(server.execute(prepared)) == world.status()["in_doubt"] == 1
            server.execute(f"ALTER DATABASE {database} CONNECTION LIMIT -1")
            eventually(lambda: not server.execute(prepared), evidence=world.evidence)
            eventually(lambda: world.status()["in_doubt"] == 0, evidence=world.evidence)
    finally:
        modest.engine.dispose()
        server.execute(f"ALTER DATABASE {database} CONNECTION LIMIT -1")
        server.execute("DROP ROLE modest")
