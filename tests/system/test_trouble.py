"""Rules 14, 16 and 20 on real processes: what a database lost, or does not let go of, is seen, named, and closed by an operator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import txrpc
from examples.bank import bank_pb2
from tests.postgres import Server, needs_own_server
from tests.system.world import World
from tests.waiting import eventually
from txrpc.testing.postgres import PostgresServer

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]
ACCOUNT = bank_pb2.Amount(account="0000", cents=100)


def _cli(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "txrpc.cli", *arguments, "--coordinator", world.coordinator.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _transfer(world: World) -> Any:
    teller = world.teller()
    try:
        with txrpc.transaction(timeout=15) as tx:
            teller.banks[0].Withdraw(ACCOUNT)
            teller.banks[1].Deposit(ACCOUNT)
    finally:
        teller.close()
    return tx


def _prepared(server: Server, database: str) -> list[str]:
    found = server.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{database}'")
    return [gid.replace("'", "''") for (gid,) in found]


def test_rule_16_a_branch_ended_by_hand_is_an_incident_until_an_operator_closes_it(
    make_world: Make, connected: Connect
) -> None:
    """It survives the coordinator, is shown with what to do, and one command closes it."""
    world = make_world(bank_a="participant.before_commit_prepared=kill")
    connected(world)
    tx = _transfer(world)
    assert tx.pending == ("bank-a",)
    server, database = world.servers["bank-a"], world.databases["bank-a"]
    (gid,) = _prepared(server, database)
    server.execute(f"ROLLBACK PREPARED '{gid}'", database)
    world.services["bank-a"].arm("")
    world.services["bank-a"].start()
    eventually(lambda: world.status()["incidents"], evidence=world.coordinator.text)
    eventually(lambda: world.status()["open"] == 0)
    world.coordinator.terminate()  # in an orderly way: what it knows is in the log
    world.coordinator.start()
    status = world.status()
    (incident,) = status["incidents"]
    assert incident["xid"] == str(tx.xid)
    assert (incident["resource"], incident["finish"]) == ("bank-a", "FINISH_RESULT_HEURISTIC")
    assert "ended by hand" in incident["text"]
    shown = _cli(world, "status").stdout
    assert str(tx.xid)[:12] in shown
    assert "1 incident" in shown
    assert json.loads(_cli(world, "status", "--json").stdout)["incidents"] == status["incidents"]
    closed = _cli(world, "close", str(tx.xid))
    assert (closed.returncode, closed.stdout) == (0, "1 closed\n")
    again = _cli(world, "close", str(tx.xid))
    assert (again.returncode, again.stdout) == (1, f"no incident of transaction {tx.xid} is open\n")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("0123",), ("00" * 16, "--branch", "zz"), ("00" * 16, "--branch", "00")]
)
def test_a_transaction_that_is_none_is_refused_in_one_sentence(make_world: Make, arguments: tuple[str, ...]) -> None:
    refused = _cli(make_world(), "close", *arguments)
    assert refused.returncode in (1, 2)
    assert "Traceback" not in refused.stderr
    assert refused.stderr.strip()


def test_rule_14_perhaps_prepared_in_a_process_that_is_gone_is_shown(make_world: Make, connected: Connect) -> None:
    """B5: killed between PREPARE and its vote: the transaction is aborted, and its branch holds its locks."""
    world = make_world(bank_a="participant.after_prepare=kill")
    connected(world)
    with pytest.raises(txrpc.TransactionAborted):
        _transfer(world)
    assert len(_prepared(world.servers["bank-a"], world.databases["bank-a"])) == 1
    (doubt,) = world.status()["doubts"]
    assert doubt["resource"] == "bank-a"
    assert "no process with resource bank-a is connected" in doubt["reason"]
    assert world.status()["in_doubt"] == 1
    assert "perhaps prepared" in _cli(world, "status").stdout
    world.services["bank-a"].arm("")
    world.services["bank-a"].start()
    eventually(lambda: not _prepared(world.servers["bank-a"], world.databases["bank-a"]))
    eventually(lambda: world.status()["in_doubt"] == 0)


def test_rule_20_what_keeps_an_aborted_branch_from_ending_is_reported(make_world: Make, connected: Connect) -> None:
    """F7: its role may not end it, and status, which knows nothing of an aborted transaction, said 0 in doubt."""
    world = make_world(bank_a="participant.after_prepare=kill")
    connected(world)
    with pytest.raises(txrpc.TransactionAborted):
        _transfer(world)
    server, database = world.servers["bank-a"], world.databases["bank-a"]
    (gid,) = _prepared(server, database)
    service = world.services["bank-a"]
    service.arm("")
    server.execute("CREATE ROLE reader LOGIN PASSWORD 'reader'", database)
    try:
        server.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO reader", database)
        at = service._arguments.index("--database") + 1
        url = service._arguments[at]
        head, _, tail = url.partition("://")
        service._arguments[at] = f"{head}://reader:reader@{tail.rpartition('@')[2]}"
        service.start()
        eventually(lambda: world.status()["doubts"], evidence=world.evidence)
        eventually(
            lambda: "42501" in world.status()["doubts"][0]["reason"], evidence=lambda: str(world.status()["doubts"])
        )
        assert "cannot roll back the branch in bank-a" in world.status()["doubts"][0]["reason"]
        assert "42501" in service.text()
        server.execute(f"ROLLBACK PREPARED '{gid}'", database)
        eventually(lambda: world.status()["in_doubt"] == 0)
    finally:
        service.kill()
        server.execute("DROP OWNED BY reader", database)
        server.execute("DROP ROLE reader", database)


@pytest.mark.proof
@needs_own_server
def test_rule_20_a_frozen_database_is_named(make_world: Make, connected: Connect) -> None:
    """G11: a branch waits prepared in it, and status said 0 in doubt."""
    world = make_world(bank_a="participant.before_commit_prepared=stop")
    connected(world)
    teller = world.teller()
    with txrpc.transaction(wait="decision"):
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    teller.close()
    server, service = world.servers["bank-a"], world.services["bank-a"]
    assert isinstance(server, PostgresServer)
    eventually(lambda: service.suspended)
    server.suspend()
    try:
        service.arm("")
        service.resume()
        frozen = "cannot commit the branch in bank-a: its database has not answered for"
        eventually(
            lambda: any(frozen in doubt["reason"] for doubt in world.status()["doubts"]),
            60,
            lambda: str(world.status()) + service.text()[-3000:],
        )
    finally:
        server.resume()
    world.at_rest()
