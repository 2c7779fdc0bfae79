"""``txrpc bench``, as a user runs it: two real databases, and nothing that is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from tests.postgres import Server, start_servers
from tests.sql.kit import gid
from txrpc.cli.bench.work import GROUP, add, prepared_databases
from txrpc.testing.postgres import PostgresServer


@pytest.fixture(scope="module")
def servers() -> Iterator[Any]:
    servers = start_servers(2)
    yield servers
    for server in servers:
        server.stop()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "txrpc.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def left(server: Server, database: str) -> list[tuple[object, ...]]:
    return [
        *server.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'txrpc%'", database),
        *server.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{database}'", database),
    ]


def test_it_says_what_a_transaction_costs_and_leaves_nothing_behind(servers: tuple[Server, Server]) -> None:
    urls = [server.create_database(f"cost{number}") for number, server in enumerate(servers)]
    done = bench(*urls, "--clients", "2", "--seconds", "0.3", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"two databases, (.+?) *\n", done.stdout) == ["1 client", "2 clients"]
    rows = re.findall(r"│ (.+?) *│ +(\d+)[^│]*│ +(?:(\d\.\d\d)[^│]*)?│ +(\d+\.\d)", done.stdout)
    assert [label for label, *_ in rows] == [
        "each service commits alone",
        "a transaction",
        "with final calls",
        "one of the databases decides",
    ] * 2
    assert all(int(rate) > 0 and float(median) > 0 for _, rate, _, median in rows)
    assert re.search(r"On its own a transaction takes -?\d+\.\d ms more", done.stdout)
    assert [left(server, f"cost{number}") for number, server in enumerate(servers)] == [[], []]


def test_two_names_of_one_database_are_refused(servers: tuple[Server, Server]) -> None:
    url = servers[0].create_database("twice")
    done = bench(url, url)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr == "txrpc: both URLs are of one database: a transaction over two needs two\n"
    assert left(servers[0], "twice") == []


def test_what_another_run_has_left_is_not_dropped(servers: tuple[Server, Server]) -> None:
    urls = [server.create_database("rest") for server in servers]
    servers[1].execute("CREATE SCHEMA txrpc_bench", "rest")
    done = bench(*urls)
    assert done.returncode == 2
    assert "has a schema txrpc_bench already" in done.stderr
    assert left(servers[0], "rest") == []
    assert left(servers[1], "rest") == [("txrpc_bench",)]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "no engine for that URL"),
        ("postgresql+nodriver://h/d", "no engine for postgresql+nodriver://h/d"),
        ("sqlite:///nothing.db", "the databases of a benchmark are PostgreSQL's"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "is out of reach"),
    ],
)
def test_a_url_that_is_of_no_use_is_told_without_its_password(
    servers: tuple[Server, Server], url: str, said: str
) -> None:
    done = bench(servers[0].create_database(f"use{abs(hash(url))}"), url)
    assert done.returncode == 2
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_cannot_prepare_says_what_to_change(servers: tuple[Server, Server]) -> None:
    with PostgresServer.start_new(max_prepared_transactions=0) as server:
        done = bench(servers[0].create_database("one"), server.create_database("other"))
    assert done.returncode == 2
    assert "set max_prepared_transactions in postgresql.conf" in done.stderr


def test_what_a_run_that_was_cut_off_has_prepared_does_not_keep_its_tables(servers: tuple[Server, Server]) -> None:
    urls = (servers[0].create_database("cut0"), servers[1].create_database("cut1"))
    engine = sa.create_engine(urls[0])
    with pytest.raises(ZeroDivisionError), prepared_databases(urls, 2):
        with engine.connect() as connection:
            add(connection, 1, 1)
            connection.exec_driver_sql(f"PREPARE TRANSACTION '{gid(group=GROUP)}'")
            connection.rollback()
        raise ZeroDivisionError
    engine.dispose()
    assert left(servers[0], "cut0") == left(servers[1], "cut1") == []
