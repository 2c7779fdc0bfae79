"""Two coordinators, and their log on a PostgreSQL with a synchronous standby: nothing that runs is there only once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from sqlalchemy import make_url

import txrpc
from tests.system.test_crashes import ends, transfer
from tests.system.test_takeover import owner_of
from tests.system.world import World
from tests.waiting import eventually
from txrpc.testing.postgres import PostgresServer

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


class Standby(PostgresServer):
    """A server that follows *primary* from its first moment."""

    primary: ClassVar[PostgresServer]

    def _initialise(self) -> None:
        super()._initialise()
        user = make_url(self.primary.url()).username
        arguments = [str(self.binaries / "pg_basebackup"), "-D", str(self._data), "-R", "-X", "stream", "--no-sync"]
        arguments += ["-c", "fast", "-d", f"host={self.primary.host} port={self.primary.port} user={user}"]
        shutil.rmtree(self._data)
        subprocess.run(self._as_user(arguments), check=True, cwd="/", env=self._env(), timeout=120)


@pytest.fixture
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A primary and its synchronous standby."""
    with PostgresServer.start_new() as primary:
        primary.create_database("decisions")
        Standby.primary = primary
        with Standby.start_new(binaries=primary.binaries) as standby:
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.execute("SELECT pg_reload_conf()")
            eventually(lambda: primary.execute("SELECT sync_state FROM pg_stat_replication") == [("sync",)])
            yield primary, standby


@pytest.mark.proof
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("failpoint", "expected"),
    [("coordinator.before_record=kill", "aborted"), ("coordinator.after_record=kill", "committed")],
)
def test_rule_22_the_coordinator_and_the_primary_of_its_log_die_together(
    make_world: Make,
    connected: Connect,
    pair: tuple[PostgresServer, PostgresServer],
    failpoint: str,
    expected: str,
) -> None:
    """The standby is promoted, and the other coordinator finds every decision on it that any process was told."""
    primary, standby = pair
    hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in pair)
    url = primary.url("decisions")
    log = f"{url.split('@')[0]}@/decisions?{hosts}&target_session_attrs=read-write"
    world = make_world(nodes=2, log=log)
    manager = connected(world)
    manager._client.state.commit_timeout_ms = 40_000
    assert transfer(world) == "committed", world.evidence()
    world.coordinator.arm(failpoint)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(transfer, world, -100)
        world.coordinator.wait(30)
        primary.kill()
        assert standby.execute("SELECT pg_promote()") == [(True,)]
        assert told.result(60) == expected, world.evidence()
    world.at_rest()
    eventually(lambda: owner_of(world, "c1") == "c2", 20, world.evidence)
    if expected == "aborted":
        ends(world, "committed", "committed")  # the first one, and no other
    else:
        assert world.total() == 2 * 20 * 1_000
        assert sum(len(journal) for journal in world.journals()) == 4
