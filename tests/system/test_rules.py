"""The design's rules and costs on real processes: what test_crashes.py does not show."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

import txrpc
from examples.bank import bank_pb2
from tests.system.test_crashes import deposit, ends, transfer
from tests.system.world import START, World
from tests.waiting import eventually
from txrpc._protocol.messages import Owner, TransactionContext
from txrpc._wire.metadata import CONTEXT_KEY, encode_context
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid
from txrpc.testing.processes import CoordinatorProcess

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]
ACCOUNT = bank_pb2.Amount(account="0000", cents=100)

# ----------------------------------------------------------------------------- what a transaction costs (section 4)

NOISE = {"Tick", "Welcome", "Hello", "GoAway", "Inquiry"}


class Meter:
    """Counts messages and log writes at the coordinator, and statements in the databases."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before = self._read()

    def _read(self) -> Counter[str]:
        status = self._world.status()
        counts = Counter({k: n for k, n in status["messages"].items() if k.split()[1] not in NOISE})
        counts["log"] = status["log_decisions"]
        counts["log batches"] = status["log_batches"]
        for server in self._world.servers.values():
            log = server.log()
            for verb in ("PREPARE TRANSACTION", "COMMIT PREPARED", "ROLLBACK PREPARED"):
                counts[verb] += log.count(f"statement: {verb} '")
        return counts

    def check(self, expected: dict[str, int]) -> None:
        """This much has been spent since the meter was made, when nothing is under way any more."""
        eventually(lambda: self._spent() == expected, evidence=lambda: str(self._spent()))
        eventually(lambda: self._world.status()["open"] == 0)
        self._world.at_rest()
        assert self._spent() == expected

    def _spent(self) -> dict[str, int]:
        now = self._read()
        now.subtract(self._before)
        return {key: count for key, count in now.items() if count}


def test_cost_of_two_branches_that_wrote(make_world: Make, connected: Connect) -> None:
    """N >= 2: client 2, participants 4N, one decision, 2N forced writes in the databases."""
    world = make_world()
    connected(world)
    meter = Meter(world)
    ends(world, transfer(world), "committed")
    meter.check(
        {
            "received CommitRequest": 1,
            "sent Prepare": 2,
            "received Voted": 2,
            "log": 1,
            "log batches": 1,
            "sent Commit": 2,
            "received Acked": 2,
            "sent OutcomeReply": 1,
            "PREPARE TRANSACTION": 2,
            "COMMIT PREPARED": 2,
        }
    )


def test_cost_of_final_calls(make_world: Make, connected: Connect) -> None:
    """N >= 2, all with an early vote: client 2, participants 2N; the forced writes are the same."""
    world = make_world()
    connected(world)
    teller = world.teller()
    meter = Meter(world)
    with txrpc.transaction(), txrpc.final_call():
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    teller.close()
    meter.check(
        {
            "received CommitRequest": 1,
            "log": 1,
            "log batches": 1,
            "sent Commit": 2,
            "received Acked": 2,
            "sent OutcomeReply": 1,
            "PREPARE TRANSACTION": 2,
            "COMMIT PREPARED": 2,
        }
    )


def test_cost_of_one_branch_elsewhere(make_world: Make, connected: Connect) -> None:
    """One phase: client 2; participant 2, and one more that tells the database's transaction id (rule 13); nothing logged."""
    world = make_world()
    connected(world)
    meter = Meter(world)
    assert deposit(world) == "committed"
    meter.check(
        {
            "received CommitRequest": 1,
            "sent CommitOnePhase": 1,
            "received Committing": 1,
            "received OnePhaseDone": 1,
            "sent OutcomeReply": 1,
        }
    )


def test_cost_of_reading_only(make_world: Make, connected: Connect) -> None:
    """N branches that wrote nothing: client 2, participants 2N, nothing forced anywhere."""
    world = make_world()
    connected(world)
    teller = world.teller()
    meter = Meter(world)
    with txrpc.transaction():
        assert teller.total() == 2 * 20 * START
    teller.close()
    meter.check(
        {
            "received CommitRequest": 1,
            "sent Prepare": 2,
            "received Voted": 2,
            "sent OutcomeReply": 1,
        }
    )


def test_cost_of_a_rollback(make_world: Make, connected: Connect) -> None:
    """Abort: client 2, one a branch, nothing forced."""
    world = make_world()
    connected(world)
    teller = world.teller()
    meter = Meter(world)
    with pytest.raises(KeyError), txrpc.transaction():
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
        raise KeyError
    teller.close()
    world.at_rest()
    meter.check({"received RollbackRequest": 1, "sent Rollback": 2, "sent OutcomeReply": 1})


def test_cost_of_nothing(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    meter = Meter(world)
    with txrpc.transaction():
        pass
    meter.check({})


# ---------------------------------------------------------------------------------------------- rules 5, 7: one log


def test_rule_7_a_second_coordinator_on_the_log_fences_the_first(
    make_world: Make, connected: Connect, tmp_path: Path
) -> None:
    world = make_world()
    manager = connected(world)
    second = CoordinatorProcess(tmp_path / "second", log=world.coordinator.log, node="c1")
    (tmp_path / "second").mkdir()
    manager._client.state.commit_timeout_ms = 500
    with second:
        told = transfer(world)
        assert told in ("aborted", "unknown", "unreachable")  # the last: it had noticed before it was asked
        assert world.coordinator.wait(20) == 4
        assert "fenced" in world.coordinator.text()
    for service in world.services.values():
        assert service.running
    second.kill()
    world.coordinator.start()
    world.at_rest()
    assert world.money() == [START, START]
    eventually(lambda: transfer(world) == "committed", 20)


def test_a_coordinator_on_a_copied_log_is_refused_by_whoever_knew_the_original(
    make_world: Make, connected: Connect, tmp_path: Path
) -> None:
    """A log restored from a copy goes on from another past; a process that has seen the later one must not believe it."""
    world = make_world()
    connected(world)
    assert transfer(world) == "committed"
    world.coordinator.terminate()
    shutil.copy(tmp_path / "coordinator.db", tmp_path / "copy.db")
    world.coordinator.start()  # epoch 2 on the original
    eventually(lambda: len(world.status()["sessions"]) == 3, 20)
    world.coordinator.kill()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"coordinator.db{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "copy.db", tmp_path / "coordinator.db")
    world.coordinator.start()  # epoch 2 as well, on the copy
    # All three that have seen the later one come back: two services and this client.
    eventually(lambda: world.coordinator.text().count("refused") >= 3, evidence=world.coordinator.text)
    assert world.status()["sessions"] == []
    assert "copy" in world.coordinator.text() or "restored" in world.coordinator.text()
    world.services["bank-a"].kill()
    world.services["bank-a"].start()  # a new process has seen nothing else, and is welcome
    eventually(lambda: len(world.status()["sessions"]) == 1, 20)


def test_rule_5_a_transaction_of_an_earlier_epoch_is_refused_and_may_be_run_again(
    make_world: Make, connected: Connect
) -> None:
    world = make_world()
    connected(world)
    teller = world.teller()
    with pytest.raises(txrpc.TransactionAborted) as caught, txrpc.transaction(timeout=15):
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
        world.coordinator.kill()
        world.coordinator.start()
    assert caught.value.reason.code is txrpc.AbortCode.COORDINATOR_RESTARTED
    assert caught.value.retryable
    teller.close()
    ends(world, "aborted", "aborted")


# ------------------------------------------------------------------------------------- branches that are not for us


def test_prepared_transactions_of_others_are_never_touched(make_world: Make, connected: Connect) -> None:
    world = make_world()
    server = world.servers["bank-a"]
    xid, branch, participant = Xid.make(1, bytes(10)), BranchId(bytes(8)), ParticipantId(bytes(8))
    strangers = [
        "somebody else's".replace("'", "''"),
        "txrpc1:nonsense",
        str(Gid("othergroup", "c1", Epoch.make(1, 1), xid, branch, participant, "bank-a")),
        str(Gid("default", "c9", Epoch.make(1, 1), xid, branch, participant, "bank-a")),
        str(Gid("default", "c1", Epoch.make(1, 1), xid, branch, participant, "other")),
    ]
    import psycopg

    for number, gid in enumerate(strangers):
        with psycopg.connect(world.urls["bank-a"].replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("BEGIN")
            connection.execute("INSERT INTO account VALUES (%s, 1)", [f"stranger {number}"])
            connection.execute(f"PREPARE TRANSACTION '{gid}'".encode())
    mine = str(Gid("default", "c1", Epoch.make(1, 1), xid, BranchId(b"mine...."), participant, "bank-a"))
    with psycopg.connect(world.urls["bank-a"].replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO account VALUES ('mine', 1)")
        connection.execute(f"PREPARE TRANSACTION '{mine}'".encode())
    world.services["bank-a"].kill()
    world.services["bank-a"].start()
    connected(world)
    assert transfer(world) == "committed"
    eventually(lambda: "strange epoch" in world.coordinator.text(), evidence=world.coordinator.text)  # it has looked
    left = {gid for (gid,) in server.execute("SELECT gid FROM pg_prepared_xacts", world.databases["bank-a"])}
    assert {gid.replace("''", "'") for gid in strangers} <= left
    # Epoch 1 with another nonce is of another log's past: nobody may decide about it, and the coordinator says so.
    assert mine in left
    for gid in left:
        server.execute("ROLLBACK PREPARED '" + gid.replace("'", "''") + "'", world.databases["bank-a"])


# ------------------------------------------------------------------------------------------- rules 10, 14, 15: seen


def test_rule_14_what_is_in_doubt_is_visible_with_its_reason(make_world: Make, connected: Connect) -> None:
    world = make_world(options=["--in-doubt-warn-s", "1"], bank_a="participant.before_commit_prepared=kill")
    connected(world)
    teller = world.teller()
    with txrpc.transaction(timeout=15) as tx:
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    assert tx.status is txrpc.Status.COMMITTED
    assert isinstance(tx, txrpc.RootTransaction)
    assert tx.pending == ("bank-a",)
    teller.close()
    status = world.status()
    assert status["in_doubt"] == 1
    (row,) = status["transactions"]
    assert row["xid"] == str(tx.xid)
    (branch,) = [b for b in row["branches"] if b["state"] != "committed"]
    assert branch["resource"] == "bank-a"
    assert branch["reason"] == "no process with resource bank-a is connected"
    eventually(lambda: 'event="in doubt"' in world.coordinator.text(), 10, world.coordinator.text)
    assert f"xid={tx.xid}" in world.coordinator.text()
    world.services["bank-a"].arm("")
    world.services["bank-a"].start()
    ends(world, "committed", "committed")
    assert world.status()["in_doubt"] == 0


def test_rule_10_a_call_that_comes_after_the_end_is_refused(make_world: Make, connected: Connect) -> None:
    world = make_world()
    manager = connected(world)
    teller = world.teller()
    with txrpc.transaction() as tx:
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    assert manager._client.state.chosen is not None
    replayed = TransactionContext("default", tx.xid, manager._client.state.chosen.owner, 5_000)
    status = call_with(world, encode_context(replayed))
    assert status.code() is grpc.StatusCode.ABORTED
    assert "after the transaction had ended" in (status.details() or "")
    teller.close()
    ends(world, "committed", "committed")


def call_with(world: World, *contexts: bytes) -> grpc.RpcError:
    """A withdrawal with that metadata, on a plain channel; returns its error."""
    from examples.bank import bank_pb2_grpc

    with grpc.insecure_channel(world.services["bank-a"].address) as channel:
        stub = bank_pb2_grpc.AccountsStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Withdraw(ACCOUNT, metadata=tuple((CONTEXT_KEY, data) for data in contexts), timeout=10)
    return caught.value


def test_rule_15_malformed_duplicated_forged_and_foreign_contexts_are_refused(
    make_world: Make, connected: Connect
) -> None:
    world = make_world()
    manager = connected(world)
    assert manager._client.state.chosen is not None
    owner, xid = manager._client.state.chosen.owner, Xid.make(1, bytes(10))
    good = encode_context(TransactionContext("default", xid, owner, 5_000))
    refusals = [
        ((b"",), grpc.StatusCode.INVALID_ARGUMENT),
        ((b"\xff" * 40,), grpc.StatusCode.INVALID_ARGUMENT),
        ((good[:20],), grpc.StatusCode.INVALID_ARGUMENT),
        ((good, good), grpc.StatusCode.INVALID_ARGUMENT),
        ((good + b"\x00" * 9_000,), None),
        ((encode_context(TransactionContext("other", xid, owner, 5_000)),), grpc.StatusCode.FAILED_PRECONDITION),
        (
            (encode_context(TransactionContext("default", xid, Owner("c9", owner.epoch), 5_000)),),
            grpc.StatusCode.UNAVAILABLE,
        ),
        (
            (encode_context(TransactionContext("default", xid, Owner("c1", Epoch(owner.epoch + 1)), 5)),),
            grpc.StatusCode.UNAVAILABLE,
        ),
        ((encode_context(TransactionContext("default", xid, owner, 0)),), grpc.StatusCode.DEADLINE_EXCEEDED),
    ]
    for contexts, code in refusals:
        error = call_with(world, *contexts)
        assert code is None or error.code() is code, (contexts, error)
    assert world.money() == [START, START]
    ends(world, transfer(world), "committed")


def test_a_service_that_is_not_connected_says_so(make_world: Make, connected: Connect, tmp_path: Path) -> None:
    """No session with that coordinator: refused before the handler runs, with a status that says so."""
    world = make_world()
    connected(world)
    code = (
        "import sys, grpc, txrpc, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from examples.bank import bank_pb2, bank_pb2_grpc\n"
        "class Accounts(bank_pb2_grpc.AccountsServicer):\n"
        "    def Withdraw(self, request, context): raise SystemExit('ran')\n"
        "server = grpc.server(ThreadPoolExecutor(2), interceptors=txrpc.server_interceptors())\n"
        "bank_pb2_grpc.add_AccountsServicer_to_server(Accounts(), server)\n"
        "print(server.add_insecure_port('127.0.0.1:0'), flush=True)\n"
        "server.start(); server.wait_for_termination(30)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    port = int(child.stdout.readline())
    from examples.bank import bank_pb2_grpc

    with grpc.intercept_channel(grpc.insecure_channel(f"127.0.0.1:{port}"), *txrpc.client_interceptors()) as channel:
        stub = bank_pb2_grpc.AccountsStub(channel)
        with pytest.raises(txrpc.CoordinatorUnavailable, match="takes no part"), txrpc.transaction():
            stub.Withdraw(ACCOUNT, timeout=10)
    child.kill()
    child.stdout.close()
    child.wait()


def test_rule_2_what_postgresql_cannot_prepare_aborts_everything_and_is_the_reason(
    make_world: Make, connected: Connect
) -> None:
    world = make_world()
    connected(world)
    world.servers["bank-b"].execute(
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN CREATE TEMP TABLE IF NOT EXISTS scratch (n int) ON COMMIT DROP; RETURN NEW; END$$;"
        "CREATE TRIGGER spoil AFTER UPDATE ON account FOR EACH ROW EXECUTE FUNCTION spoil()",
        world.databases["bank-b"],
    )
    teller = world.teller()
    with pytest.raises(txrpc.TransactionAborted, match="temporary") as caught, txrpc.transaction():
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    assert caught.value.reason.code is txrpc.AbortCode.CANNOT_PREPARE
    assert "bank-b" in caught.value.reason.text
    assert not caught.value.retryable
    teller.close()
    ends(world, "aborted", "aborted")


def test_rule_12_what_is_forgotten_is_unknown_and_never_a_guess(make_world: Make, connected: Connect) -> None:
    """The log keeps a record for the retention time, and after that the coordinator does not call it aborted."""
    world = make_world(options=["--retention-s", "5"])
    connected(world)
    teller = world.teller()
    with txrpc.transaction() as tx:
        teller.banks[0].Withdraw(ACCOUNT)
        teller.banks[1].Deposit(ACCOUNT)
    teller.close()

    def rows() -> int:
        with sqlite3.connect(world.folder / "coordinator.db") as log:
            count: int = log.execute("SELECT count(*) FROM txrpc_decision").fetchone()[0]
        log.close()
        return count

    assert rows() == 1
    eventually(lambda: rows() == 0)
    world.coordinator.kill()
    world.coordinator.start()
    with txrpc.connect(world.coordinator.address, process="another") as another:
        assert another.outcome(tx.xid) is txrpc.Outcome.UNKNOWN


@pytest.mark.parametrize("branches", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_rule_11_what_hangs_in_prepare_or_commit_is_broken_off(
    make_world: Make, connected: Connect, branches: int
) -> None:
    """A deferred constraint that takes a minute: the branch has promised nothing, so its locks go soon after the deadline."""
    world = make_world()
    connected(world)
    world.servers["bank-a"].execute(
        "CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(60); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER hang AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION hang()",
        world.databases["bank-a"],
    )
    teller = world.teller()
    with pytest.raises(txrpc.TxrpcError), txrpc.transaction(timeout=2):
        for bank in teller.banks[:branches]:
            bank.Deposit(ACCOUNT)
    teller.close()
    world.at_rest(20)
    assert world.money() == [START, START]
