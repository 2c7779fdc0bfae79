"""The private PostgreSQL itself: what kills, clashes and dead parents do to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.postgres import needs_own_server
from tests.waiting import eventually, is_alive
from txrpc.testing.postgres import PostgresServer, embedded_binaries, installed_binaries
from txrpc.testing.processes import free_port

pytestmark = needs_own_server


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer.start_new() as server:
        yield server


def stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("which", ["installed", "embedded"])
def test_both_kinds_of_binaries_serve(which: str) -> None:
    folder = installed_binaries() if which == "installed" else embedded_binaries()
    if folder is None:
        pytest.skip(f"no {which} PostgreSQL")
    with PostgresServer.start_new(binaries=folder, max_connections=30) as server:
        assert server.execute("SHOW max_connections") == [("30",)]
        assert server.execute("SHOW listen_addresses") == [("127.0.0.1",)]
        pid, place = server.pid, server.folder
    assert not is_alive(pid)
    assert not place.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which starts it as another user")
def test_binaries_in_a_folder_of_roots_alone_serve(tmp_path: Path) -> None:
    """As in an environment in root's own folder: it ended in a traceback, Permission denied."""
    binaries = embedded_binaries()
    if binaries is None:
        pytest.skip("no embedded PostgreSQL")
    (hidden := tmp_path / "hidden").mkdir(mode=0o700)
    package = binaries.parent.parent
    for folder in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, hidden / folder.name, symlinks=True)
    with PostgresServer.start_new(binaries=hidden / binaries.relative_to(package.parent)) as server:
        assert server.execute("SELECT 1") == [(1,)]


def test_it_comes_back_from_kill_9_at_once_with_everything_that_was_committed(server: PostgresServer) -> None:
    server.execute("CREATE TABLE kept (n int)")
    for number in range(4):
        server.execute("INSERT INTO kept SELECT generate_series(1, 1000)")
        with psycopg.connect(f"host=127.0.0.1 port={server.port} user=txrpc dbname=postgres") as connection:
            connection.execute("SELECT count(*) FROM kept")
            server.kill()
            server.restart()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert server.execute("SELECT count(*) FROM kept") == [(1000 * (number + 1),)]


def test_a_restart_waits_for_its_port(server: PostgresServer) -> None:
    """Between kill and restart an outgoing connection may have taken it."""
    server.kill()
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import socket, time; s = socket.create_server(('127.0.0.1', {server.port})); time.sleep(1)",
        ]
    ) as thief:
        time.sleep(0.3)
        server.restart()
        thief.wait(10)
    assert server.execute("SELECT 1") == [(1,)]


def test_a_port_that_another_server_has_is_not_taken_for_ones_own(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = [server.port]
    monkeypatch.setattr("txrpc.testing.postgres.free_port", lambda: offered.pop() if offered else free_port())
    with PostgresServer.start_new() as other:
        assert other.port != server.port
        assert other.running
        assert other.execute("SHOW data_directory") != server.execute("SHOW data_directory")


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="no_such_setting"):
        PostgresServer.start_new(no_such_setting=1)


def test_suspend_and_resume(server: PostgresServer) -> None:
    with psycopg.connect(f"host=127.0.0.1 port={server.port} user=txrpc dbname=postgres") as connection:
        backend = connection.info.backend_pid
        server.suspend()
        try:
            for pid in (server.pid, backend):
                eventually(partial(stopped, pid))
        finally:
            server.resume()
        assert connection.execute("SELECT 1").fetchall() == [(1,)]


ORPHAN = """
import signal, time
from txrpc.testing.postgres import PostgresServer
server = PostgresServer.start_new()
print(server.pid, server.folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_its_parent_dies(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        parent.send_signal(number)
        parent.wait(10)
    eventually(lambda: not is_alive(int(pid)))
    eventually(lambda: not Path(folder).exists())
