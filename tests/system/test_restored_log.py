"""Rules 17 and 18 on real processes: a log that has lost decisions, and a name that means another database (F2, F6)."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import pytest
import sqlalchemy as sa

import txrpc
import txrpc.sql
from examples.bank import bank_pb2
from tests.postgres import Server
from tests.system.world import World
from tests.waiting import eventually
from txrpc._coordinator.server import BEHIND

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]
ACCOUNT = bank_pb2.Amount(account="0000", cents=100)


def _transfer(world: World) -> txrpc.Status:
    teller = world.teller()
    try:
        with txrpc.transaction(timeout=15) as tx:
            teller.banks[0].Withdraw(ACCOUNT)
            teller.banks[1].Deposit(ACCOUNT)
    finally:
        teller.close()
    status: txrpc.Status = tx.status
    return status


def _restore(world: World, name: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        (world.folder / f"coordinator.db{suffix}").unlink(missing_ok=True)
    shutil.copy(world.folder / name, world.folder / "coordinator.db")


def test_rule_18_a_log_restored_from_a_backup_of_the_running_epoch_decides_nothing(
    make_world: Make, connected: Connect
) -> None:
    """F2: a bank that is down holds the branch of a decision that the backup does not have; half of it was rolled back."""
    world = make_world(["--ack-wait-s", "1", "--recovery-wait-s", "2"])
    connected(world)
    assert _transfer(world) is txrpc.Status.COMMITTED
    with (
        closing(sqlite3.connect(world.folder / "coordinator.db")) as source,
        closing(sqlite3.connect(world.folder / "backup.db")) as target,
    ):
        source.backup(target)
    bank_b = world.services["bank-b"]
    bank_b.arm("participant.before_commit_prepared=kill")
    assert _transfer(world) is txrpc.Status.COMMITTED
    assert world.prepared() == [0, 1]
    world.coordinator.kill()
    with (
        closing(sqlite3.connect(world.folder / "coordinator.db")) as source,
        closing(sqlite3.connect(world.folder / "right.db")) as target,
    ):
        source.backup(target)
    _restore(world, "backup.db")
    bank_b.arm("")
    bank_b.start()  # knows nothing of what was decided, and asks
    world.coordinator.start()
    assert world.coordinator.wait(30) == BEHIND
    assert "has seen position 2" in world.coordinator.text()
    assert "start the coordinator on the log that has the latest decisions" in world.coordinator.text()
    assert world.prepared() == [0, 1]
    _restore(world, "right.db")
    # Who had a session with the coordinator on the restored log takes this one for a stranger's, and is started again.
    for service in world.services.values():
        service.kill()
        service.start()
    world.coordinator.start()
    eventually(lambda: world.prepared() == [0, 0], evidence=world.evidence)
    assert sum(world.money()) == 2_000


def test_rule_17_another_database_under_the_name_is_refused_until_an_operator_says_so(
    make_world: Make, connected: Connect, servers: dict[str, Server], caplog: pytest.LogCaptureFixture
) -> None:
    """F6: with nobody else connected it was believed, acknowledged a commit, and the right one's branch was rolled back."""
    world = make_world(bank_b="participant.before_commit_prepared=kill")
    connected(world)
    assert _transfer(world) is txrpc.Status.COMMITTED
    wrong = servers["bank-a"].create_database("wrong")
    try:
        engine = sa.create_engine(wrong)
        bank_b = txrpc.sql.ResourceManager("bank-b", engine)
        patience = txrpc.SessionOptions(connect_timeout_s=1)
        with txrpc.connect(world.coordinator.address, resources=[bank_b], options=patience) as manager:
            assert manager._client.state.chosen is None
            assert "txrpc rebind bank-b" in caplog.text
        engine.dispose()
        assert world.prepared() == [0, 1]
        identity = world.status()["identities"]["bank-b"]
        command = [sys.executable, "-m", "txrpc.cli", "rebind", "bank-b", "--coordinator", world.coordinator.address]
        rebound = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert rebound.stdout == f"bank-b meant {identity}, and means the next one that comes now\n"
        world.services["bank-b"].arm("")
        world.services["bank-b"].start()
        eventually(lambda: world.prepared() == [0, 0], evidence=world.evidence)
        assert world.status()["identities"]["bank-b"] == identity
    finally:
        servers["bank-a"].execute("DROP DATABASE wrong WITH (FORCE)")
