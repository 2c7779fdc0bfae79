"""MariaDB and MySQL in transactions with PostgreSQL and with itself: real servers, a real program, kill -9 of either."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.mariadb import BOTH, MariaServer
from tests.postgres import Server
from tests.waiting import eventually
from txrpc.testing.processes import Child

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=BOTH)
def mariadb(request: pytest.FixtureRequest) -> Iterator[MariaServer]:
    with request.param(innodb_lock_wait_timeout=2) as server:
        yield server


class Pair:
    """A database of MariaDB's and one of PostgreSQL's, with an empty table each, and a log."""

    def __init__(self, mariadb: MariaServer, postgres: Server, folder: Path) -> None:
        self.mariadb, self.postgres, self.folder = mariadb, postgres, folder
        self.name = f"pair{next(_numbers)}"
        self.urls = [mariadb.create_database(self.name), postgres.create_database(self.name)]
        for server in (mariadb, postgres):
            server.execute("CREATE TABLE entry (number int)", self.name)

    def program(self, *options: str) -> Child:
        """Not started."""
        command = [sys.executable, "-m", "tests.system.embedded_program", f"sqlite:///{self.folder}/log.db", *self.urls]
        return Child([*command, *options], name="program", output=self.folder / "program.log", ready="ready")

    def counts(self) -> list[int]:
        """How many rows each has."""
        return [
            server.execute("SELECT count(*) FROM entry", self.name)[0][0] for server in (self.mariadb, self.postgres)
        ]

    def prepared(self) -> int:
        """How many branches of either are prepared."""
        mine = f"SELECT count(*) FROM pg_prepared_xacts WHERE database = '{self.name}'"
        return self.mariadb.prepared() + int(self.postgres.execute(mine)[0][0])


@pytest.fixture
def pair(mariadb: MariaServer, servers: Mapping[str, Server], tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(mariadb, next(iter(servers.values())), tmp_path)
    yield pair
    pair.postgres.execute(f"DROP DATABASE {pair.name} WITH (FORCE)")


@pytest.mark.parametrize("server", ["stays", pytest.param("crashes", marks=pytest.mark.proof)])
@pytest.mark.parametrize(
    ("failpoint", "rows", "options"),
    [
        ("participant.before_prepare", 0, []),
        ("participant.after_prepare", 0, []),
        ("participant.after_prepare", 0, ["@2"]),
        ("coordinator.before_record", 0, []),
        ("coordinator.after_record", 1, []),
        ("participant.before_commit_prepared", 1, []),
        ("participant.after_commit_prepared", 1, []),
        ("participant.before_insert_decision", 0, ["--decides"]),
        ("participant.after_insert_decision", 0, ["--decides"]),
        ("participant.after_decide", 1, ["--decides"]),
    ],
)
def test_all_or_nothing_wherever_it_crashes(
    pair: Pair, failpoint: str, rows: int, options: list[str], server: str
) -> None:
    times = next((option for option in options if option.startswith("@")), "")
    options = [option for option in options if option.startswith("--")]
    program = pair.program(*options)
    program.arm(f"{failpoint}=kill{times}")
    program.launch()
    program.wait()
    assert "told committed" not in program.text()
    if server == "crashes":
        pair.mariadb.kill()
        pair.mariadb.start()
    program.arm("")
    with pair.program(*options, "--wait") as again:
        eventually(lambda: pair.prepared() == 0, evidence=again.text)
        eventually(lambda: pair.counts() == [rows, rows], evidence=lambda: f"{pair.counts()}\n{again.text()}")


@pytest.mark.proof
def test_money_is_conserved_while_program_and_server_are_killed(mariadb: MariaServer, tmp_path: Path) -> None:
    """Between two databases of MariaDB's; each time something is killed at another place."""
    names = [f"bank{next(_numbers)}" for _ in range(2)]
    urls = [mariadb.create_database(name) for name in names]
    for name in names:
        mariadb.execute("CREATE TABLE entry (number int)", name)
    points = [
        "after_prepare",
        "before_commit_prepared",
        "after_commit_prepared",
        "after_rollback_prepared",
        "before_prepare",
    ]
    dice = random.Random(7)
    command = [sys.executable, "-m", "tests.system.embedded_program", f"sqlite:///{tmp_path}/log.db", *urls]
    for turn in range(8):
        program = Child(command, name="program", output=tmp_path / "program.log", ready="ready")
        program.arm(f"participant.{dice.choice(points)}=kill@{dice.choice([1, 2])}")
        program.launch()
        program.wait(60)
        if turn % 2:
            mariadb.kill()
            mariadb.start()
        program.arm("")
    with Child([*command, "--wait"], name="last", output=tmp_path / "last.log", ready="ready") as last:
        eventually(lambda: mariadb.prepared() == 0, evidence=last.text)
        counts = [mariadb.execute("SELECT count(*) FROM entry", name)[0][0] for name in names]
        assert counts[0] == counts[1] > 0


async def test_the_same_in_asyncio(pair: Pair) -> None:
    engines = [
        create_async_engine(sa.make_url(url).set(drivername=driver))
        for url, driver in zip(pair.urls, (f"{pair.mariadb.product}+aiomysql", "postgresql+asyncpg"), strict=True)
    ]
    resources = [txrpc.sql.AsyncResourceManager(f"db-{n}", engine, decides=not n) for n, engine in enumerate(engines)]

    async def write() -> None:
        for resource in resources:
            async with resource.connection() as connection:
                await connection.execute(sa.text("INSERT INTO entry VALUES (1)"))

    async with await txrpc.aio.embedded(f"sqlite:///{pair.folder}/log.db", resources=resources):
        for decide_in in ("", "db-0"):
            async with txrpc.aio.transaction(decide_in=decide_in, wait="acknowledged"):
                await write()
            with pytest.raises(ValueError, match="no"):
                async with txrpc.aio.transaction(decide_in=decide_in):
                    await write()
                    raise ValueError("no")
    assert (pair.counts(), pair.prepared()) == ([2, 2], 0)
    for engine in engines:
        await engine.dispose()


def test_a_database_that_is_away_keeps_the_others_waiting_and_no_longer(pair: Pair) -> None:
    """Killed between its vote and its order: what it was told is done when it is back."""
    engines = [sa.create_engine(url) for url in pair.urls]
    resources = [txrpc.sql.ResourceManager(f"db-{n}", engine) for n, engine in enumerate(engines)]
    with txrpc.embedded(f"sqlite:///{pair.folder}/log.db", resources=resources):
        with txrpc.transaction(wait="decision"):
            for resource in resources:
                with resource.connection() as connection:
                    connection.execute(sa.text("INSERT INTO entry VALUES (1)"))
            voted = "detach" if pair.mariadb.product == "mariadb" else "checkin"
            sa.event.listen(engines[0], voted, lambda *_: pair.mariadb.suspend(), once=True)
        assert pair.mariadb.suspended, "since its branch was prepared"
        pair.mariadb.kill()
        pair.mariadb.start()
        eventually(lambda: pair.prepared() == 0)
        assert pair.counts() == [1, 1]
    for engine in engines:
        engine.dispose()
