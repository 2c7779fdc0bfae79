"""What runs out: the disk under the log, a database's connections.  One clear sentence, nothing lost, and it goes on after."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

import txrpc
from tests.postgres import needs_own_server
from tests.runtime.memory_resource import MemoryResource
from tests.system.scenarios import carry_out
from tests.system.world import BANKS, World
from tests.waiting import eventually
from txrpc.testing.failpoints import failpoint
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import CoordinatorProcess

pytestmark = pytest.mark.proof


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a file system of one megabyte")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False, timeout=20
    )
    if mounted.returncode:
        pytest.skip(f"needs root that may mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def fill(folder: Path) -> Path:
    """Write until there is no room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_rule_3_a_full_disk_under_the_log(small_disk: Path, tmp_path: Path) -> None:
    """What cannot be recorded rolls back with the reason; when there is room again the coordinator goes on by itself."""
    books = (MemoryResource("one"), MemoryResource("two"))
    log = f"sqlite:///{small_disk / 'log.db'}"
    with CoordinatorProcess(tmp_path, log=log) as coordinator, txrpc.connect(coordinator.address, resources=books):

        def write(line: str) -> None:
            with txrpc.transaction(timeout=10):
                for book in books:
                    book.write(line)

        write("before")
        filler = fill(small_disk)
        with pytest.raises(txrpc.TransactionAborted) as caught:
            for number in range(200):  # what SQLite has already may have room for some
                write(f"while {number}")
        assert caught.value.reason.code is txrpc.AbortCode.LOG_UNAVAILABLE
        assert "full" in str(caught.value)
        assert "full" in coordinator.text()
        filler.unlink()
        written = list(books[0].lines)

        def works() -> bool:
            with suppress(txrpc.TransactionAborted, txrpc.Unavailable):
                write("after")
                return True
            return False

        eventually(works, 30, coordinator.text)
        assert coordinator.running
        assert books[0].lines == books[1].lines == [*written, "after"]
        coordinator.kill()
        coordinator.start()
        eventually(works, 30, coordinator.text)


class Crowd:
    """Takes every connection that a server has."""

    def __init__(self, url: str) -> None:
        self._address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._taken = ExitStack()

    def come(self) -> None:
        """Instead of all who are there now."""
        first = self._taken.enter_context(psycopg.connect(self._address, autocommit=True))
        others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        first.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        with suppress(psycopg.OperationalError):
            while True:
                self._taken.enter_context(psycopg.connect(self._address))

    def go(self) -> None:
        self._taken.close()


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[World]:
    """A world in which bank-a's server has few connections."""
    with ExitStack() as ends:
        servers = {
            bank: ends.enter_context(
                PostgresServer.start_new(fsync="off", max_connections=number, max_prepared_transactions=64)
            )
            for bank, number in zip(BANKS, (20, 60), strict=True)
        }
        world = World(tmp_path, {**servers}, 1, ["--ack-wait-s", "2"])
        ends.callback(world.stop)
        world.start()
        ends.enter_context(txrpc.connect(world.coordinator.address, process="client"))
        yield world


@needs_own_server
def test_a_database_that_is_out_of_connections(narrow: World) -> None:
    addresses = [service.address for service in narrow.services.values()]
    crowd = Crowd(narrow.urls["bank-a"])
    crowd.come()
    try:
        told = [carry_out("transfer", "", addresses, timeout_s=3)[1] for _ in range(3)]
    finally:
        crowd.go()
    assert set(told) == {"aborted"}, "no connection, nothing done"
    eventually(lambda: carry_out("transfer", "", addresses, timeout_s=8)[1] == "committed", 30, narrow.evidence)


@needs_own_server
def test_rule_4_a_database_that_runs_out_of_connections_between_the_promise_and_the_commit(narrow: World) -> None:
    addresses = [service.address for service in narrow.services.values()]
    crowd = Crowd(narrow.urls["bank-a"])
    service = narrow.services["bank-a"]
    with failpoint("participant.after_prepare", "sleep:1", process=service) as promised:
        told: list[tuple[str, str]] = []
        client = threading.Thread(target=lambda: told.append(carry_out("transfer", "", addresses, timeout_s=10)))
        client.start()
        promised.wait()
        crowd.come()
        client.join(30)
    crowd.go()
    narrow.at_rest()
    xid, said = told[0]
    journals = narrow.journals()
    assert (xid in journals[0]) == (xid in journals[1]) == (said == "committed"), narrow.evidence()
    eventually(lambda: carry_out("transfer", "", addresses, timeout_s=8)[1] == "committed", 30, narrow.evidence)
