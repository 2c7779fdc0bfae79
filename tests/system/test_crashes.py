"""Kill -9 of coordinator, service and database at named points: both banks agree with what the client was told.

Real processes and real PostgreSQL.  Each test ends at rest: nothing prepared, no locks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import txrpc
from examples.bank import bank_pb2
from tests.postgres import needs_own_server
from tests.system.world import START, World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


def transfer(world: World, cents: int = 100) -> str:
    """One transfer between the accounts 0000 of both banks; what the client was told."""
    teller = world.teller()
    try:
        with txrpc.transaction(timeout=15):
            teller.banks[0].Withdraw(_amount(-cents))
            teller.banks[1].Deposit(_amount(cents))
    except txrpc.TransactionAborted:
        return "aborted"
    except txrpc.OutcomeUnknown:
        return "unknown"
    except txrpc.CoordinatorUnavailable:
        return "unreachable"
    finally:
        teller.close()
    return "committed"


def _amount(cents: int) -> bank_pb2.Amount:
    return bank_pb2.Amount(account="0000", cents=abs(cents))


def ends(world: World, told: str, expected: str) -> None:
    """The world comes to rest in agreement with what the client was *told*, which is what was *expected*."""
    assert told == expected, world.evidence()
    world.at_rest()
    changed = [START - 100, START + 100]
    assert world.money() == (changed if told == "committed" else [START, START]), world.evidence()
    journals = world.journals()
    assert journals[0].keys() == journals[1].keys()


def test_nothing_crashes(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    ends(world, transfer(world), "committed")


# ------------------------------------------------------------------------------------------------- the coordinator


@pytest.mark.parametrize(
    ("failpoint", "expected"),
    [
        ("coordinator.before_record=kill", "aborted"),
        ("coordinator.after_record=kill", "committed"),
        ("coordinator.before_commit=kill", "committed"),
        ("coordinator.before_commit=kill@2", "committed"),
        ("coordinator.before_outcome_reply=kill", "committed"),
    ],
)
def test_coordinator_killed(make_world: Make, connected: Connect, failpoint: str, expected: str) -> None:
    """Rules 3, 5, 6 and 12: the decision is what is durable; a client that lost the answer learns the truth."""
    world = make_world(c1=failpoint)
    connected(world)
    reviver = world.revive(world.coordinator)
    told = transfer(world)
    reviver.join(30)
    ends(world, told, expected)
    eventually(lambda: world.status()["open"] == 0, 20, world.evidence)


def test_coordinator_stays_away_the_client_is_told_that_nobody_knows(make_world: Make, connected: Connect) -> None:
    """Rule 13: OutcomeUnknown where the truth cannot be learnt, and `outcome` tells it later."""
    world = make_world(c1="coordinator.after_record=kill")
    manager = connected(world)
    manager._client.state.commit_timeout_ms = 500
    teller = world.teller()
    with pytest.raises(txrpc.OutcomeUnknown) as caught, txrpc.transaction(timeout=3) as tx:
        teller.banks[0].Withdraw(_amount(-100))
        teller.banks[1].Deposit(_amount(100))
    assert caught.value.xid == tx.xid
    assert tx.status is txrpc.Status.UNKNOWN
    assert sum(world.prepared()) == 2
    world.coordinator.arm("")
    world.coordinator.start()
    assert manager.outcome(tx.xid, timeout=10) is txrpc.Outcome.COMMITTED
    teller.close()
    ends(world, "committed", "committed")


def test_a_frozen_coordinator_is_noticed_and_the_transaction_ends(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    world.coordinator.suspend()
    threading.Timer(3, world.coordinator.resume).start()
    told = transfer(world)
    ends(world, told, "committed")


# --------------------------------------------------------------------------------------------------- the participant


@pytest.mark.parametrize(
    ("failpoint", "expected"),
    [
        ("participant.before_prepare=kill", "aborted"),
        ("participant.after_prepare=kill", "aborted"),
        ("participant.before_commit_prepared=kill", "committed"),
        ("participant.after_commit_prepared=kill", "committed"),
    ],
)
def test_rule_4_service_killed(make_world: Make, connected: Connect, failpoint: str, expected: str) -> None:
    """Rules 4 and 8: its promise outlives the process; the next one finds the branch and ends it."""
    world = make_world(bank_a=failpoint)
    connected(world)
    reviver = world.revive(world.services["bank-a"])
    told = transfer(world)
    reviver.join(30)
    ends(world, told, expected)


def test_service_killed_between_its_call_and_the_commit(make_world: Make, connected: Connect) -> None:
    """Rule 8: lost work is not prepared, even if a new process answers under the same name."""
    world = make_world()
    connected(world)
    teller = world.teller()
    with pytest.raises(txrpc.TransactionAborted) as caught, txrpc.transaction(timeout=15):
        teller.banks[0].Withdraw(_amount(-100))
        teller.banks[1].Deposit(_amount(100))
        world.services["bank-a"].kill()
        world.services["bank-a"].start()
    assert caught.value.retryable
    teller.close()
    ends(world, "aborted", "aborted")


def test_both_services_and_the_coordinator_killed_while_prepared(make_world: Make, connected: Connect) -> None:
    """All three at once: what is durable decides."""
    world = make_world(c1="coordinator.after_record=kill")
    manager = connected(world)
    manager._client.state.commit_timeout_ms = 500
    told: list[str] = []
    client = threading.Thread(target=lambda: told.append(transfer(world)))
    client.start()
    world.coordinator.wait(30)
    world.coordinator.arm("")
    for service in world.services.values():
        service.kill()
    for child in (world.coordinator, *world.services.values()):
        child.start()
    client.join(40)
    ends(world, "committed" if told == ["unknown"] else told[0], "committed")


# ------------------------------------------------------------------------------------------------------ the database


@needs_own_server
@pytest.mark.parametrize("bank", ["bank-a", "bank-b"])
def test_rule_4_database_killed_after_prepare(make_world: Make, connected: Connect, bank: str) -> None:
    """Rule 4: the prepared branch survives its database's crash, and phase 2 is repeated until it arrives."""
    world = make_world(**{bank.replace("-", "_"): "participant.before_commit_prepared=sleep:1.5"})
    connected(world)
    server = world.servers[bank]

    def crash() -> None:
        eventually(lambda: bool(world.prepared()[list(world.servers).index(bank)]), 20)
        server.kill()
        time.sleep(1)
        server.restart()

    chaos = threading.Thread(target=crash)
    chaos.start()
    told = transfer(world)
    chaos.join(30)
    ends(world, told, "committed")


@needs_own_server
def test_database_killed_before_prepare(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    teller = world.teller()
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(timeout=10):
        teller.banks[0].Withdraw(_amount(-100))
        teller.banks[1].Deposit(_amount(100))
        world.servers["bank-a"].kill()
        restart = threading.Timer(1, world.servers["bank-a"].restart)
        restart.start()
    teller.close()
    restart.join()
    ends(world, "aborted", "aborted")


# -------------------------------------------------------------------------------------------------------- the client

CLIENT = """
import sys, txrpc
from examples.bank import bank_pb2
from examples.bank.teller import Teller
with txrpc.connect(sys.argv[1]):
    teller = Teller(sys.argv[2:])
    with txrpc.transaction(timeout=3):
        teller.banks[0].Withdraw(bank_pb2.Amount(account="0000", cents=100))
        teller.banks[1].Deposit(bank_pb2.Amount(account="0000", cents=100))
"""


@pytest.mark.parametrize("failpoint", ["client.before_commit_request=kill", "client.after_commit_request=kill"])
def test_client_killed(make_world: Make, failpoint: str) -> None:
    """Rule 11: without its client a transaction ends by its deadline, alike everywhere."""
    world = make_world()
    command = [sys.executable, "-c", CLIENT, world.coordinator.address, *(s.address for s in world.services.values())]
    done = subprocess.run(
        command, env={**os.environ, "TXRPC_FAILPOINTS": failpoint}, timeout=30, check=False, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    world.at_rest()
    assert world.money() in ([START, START], [START - 100, START + 100])
    if "before" in failpoint:
        assert world.money() == [START, START]


# ------------------------------------------------------------------------------------------------- commit in one phase


def deposit(world: World) -> str:
    teller = world.teller()
    try:
        with txrpc.transaction(timeout=15):
            teller.banks[0].Deposit(_amount(100))
    except txrpc.TransactionAborted:
        return "aborted"
    except txrpc.OutcomeUnknown:
        return "unknown"
    except txrpc.CoordinatorUnavailable:
        return "unreachable"
    finally:
        teller.close()
    return "committed"


def linger_in_commit(world: World) -> None:
    """COMMIT takes a moment, so that `Committing` has certainly left the process that is about to die."""
    world.servers["bank-a"].execute(
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER linger AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION linger()",
        world.databases["bank-a"],
    )


@pytest.mark.parametrize(
    ("failpoint", "expected"),
    [
        (None, "committed"),
        ("participant.after_commit_one_phase=kill", "committed"),
    ],
)
def test_rule_13_the_truth_after_a_crash_in_one_phase_commit(
    make_world: Make, connected: Connect, failpoint: str | None, expected: str
) -> None:
    world = make_world(**({"bank_a": failpoint} if failpoint else {}))
    linger_in_commit(world)
    connected(world)
    reviver = world.revive(world.services["bank-a"]) if failpoint else None
    told = deposit(world)
    if reviver is not None:
        reviver.join(30)
    world.at_rest()
    assert told == expected, world.evidence()
    assert world.money() == [START + 100, START]


def test_rule_13_the_token_of_a_one_phase_commit_survives_its_process_and_the_coordinator(
    make_world: Make, connected: Connect
) -> None:
    """F10b: both died, and the coordinator took the only token with it: UNKNOWN for ever, though the database knew."""
    world = make_world(bank_a="participant.before_one_phase_done=kill")
    linger_in_commit(world)
    manager = connected(world)

    def both_die_and_come_back() -> None:
        service = world.services["bank-a"]
        service.wait(30)
        eventually(
            lambda: manager._client.state.tokens, 20, world.evidence
        )  # the coordinator has noticed, and sent it on
        world.coordinator.kill()
        world.coordinator.start()
        service.arm("")
        service.start()

    reviver = threading.Thread(target=both_die_and_come_back)
    reviver.start()
    told = deposit(world)
    reviver.join(40)
    assert told == "committed", world.evidence()
    assert world.money() == [START + 100, START]
    assert not manager._client.state.tokens


@pytest.mark.proof
def test_service_killed_before_one_phase_commit(make_world: Make, connected: Connect) -> None:
    """Nothing can have been committed, but only the dead process knew: never told as committed, never done."""
    world = make_world(bank_a="participant.before_commit_one_phase=kill")
    manager = connected(world)
    manager._client.state.commit_timeout_ms = 2_000
    reviver = world.revive(world.services["bank-a"])
    told = deposit(world)
    reviver.join(30)
    world.at_rest()
    assert told in ("aborted", "unknown")
    assert world.money() == [START, START]
