"""What each form of a transaction has a database execute, statement by statement, from the server's own log."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import sqlalchemy as sa

import txrpc
import txrpc.sql
from examples.bank import bank_pb2
from tests.system.world import World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]
AMOUNT = bank_pb2.Amount(account="0000", cents=1)


class Listener:
    """Hears what the databases execute; sweeps, which come by the clock, are left out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._from = {name: len(server.log()) for name, server in world.servers.items()}

    def heard(self) -> list[list[str]]:
        """What each database has executed since then, each statement by its first words."""
        found = []
        for name, server in self._world.servers.items():
            said = re.findall(r"(?:statement|execute [^:]+): (.+)", server.log()[self._from[name] :])
            found.append([short for short in map(_short, said) if short])
        return found


def _short(statement: str) -> str:
    """The first words; "" for what does not belong to a transaction: sweeps, marks of done, and this test's own questions."""
    for beginning, short in SHORT.items():
        if re.match(beginning, statement):
            return short
    return statement


SHORT = {
    r"SELECT account\.": "SELECT account",
    r"UPDATE account ": "UPDATE account",
    r"INSERT INTO (journal|entry) ": "INSERT work",
    r"SELECT pg_current_xact_id_if_assigned": "SELECT what a vote rests on",
    r"PREPARE TRANSACTION ": "PREPARE TRANSACTION",
    r"COMMIT PREPARED ": "COMMIT PREPARED",
    r"INSERT INTO \S*txrpc_decision": "INSERT decision",
    r"SELECT id, floor": "SELECT floor",
    r"SELECT gid, .* FROM pg_prepared_xacts|SELECT count|UPDATE \S*txrpc_|SELECT xid, branches": "",
}
WORK = ["BEGIN", "SELECT account", "UPDATE account", "INSERT work"]
"""Of a bank's method."""
VOTE = "SELECT what a vote rests on"


def _has_heard(listener: Listener, number: int) -> bool:
    return sum(map(len, listener.heard())) >= number


def check(world: World, transfer: Callable[[], None], expected: list[list[str]]) -> None:
    """One of a few transfers costs exactly that: the first one makes connections, and a sweep may fall into another."""
    heard: list[list[str]] = []
    for _ in range(5):
        listener = Listener(world)
        transfer()
        world.at_rest()
        eventually(functools.partial(_has_heard, listener, sum(map(len, expected))))
        heard = listener.heard()
        if heard == expected:
            return
    assert heard == expected


@pytest.mark.parametrize("final", [False, True])
def test_two_branches(make_world: Make, connected: Connect, final: bool) -> None:
    world = make_world()
    connected(world)
    teller = world.teller()

    def transfer() -> None:
        with txrpc.transaction(), txrpc.final_call() if final else nullcontext():
            teller.banks[0].Withdraw(AMOUNT)
            teller.banks[1].Deposit(AMOUNT)

    check(world, transfer, [[*WORK, VOTE, "PREPARE TRANSACTION", "COMMIT PREPARED"]] * 2)
    teller.close()


HELD = "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND state LIKE 'idle in transaction%'"


@pytest.mark.parametrize(
    ("final", "held"), [(False, [(0, 0), (1, 0), (1, 1), (0, 0)]), (True, [(0, 0), (0, 0), (0, 0), (0, 0)])]
)
def test_connections_that_are_held(
    make_world: Make, connected: Connect, final: bool, held: list[tuple[int, int]]
) -> None:
    """One a branch, from its first call to its vote: with final calls none while another service is called."""
    world = make_world()
    connected(world)
    teller = world.teller()
    found = []

    def look() -> None:
        counts = [server.execute(HELD.format(world.databases[bank]))[0][0] for bank, server in world.servers.items()]
        found.append(tuple(counts))

    look()
    with txrpc.transaction(), txrpc.final_call() if final else nullcontext():
        teller.banks[0].Withdraw(AMOUNT)
        look()
        teller.banks[1].Deposit(AMOUNT)
        look()
    look()
    assert found == held
    teller.close()


def test_one_branch_elsewhere(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    teller = world.teller()

    def transfer() -> None:
        with txrpc.transaction():
            teller.banks[1].Deposit(AMOUNT)

    check(world, transfer, [[], [*WORK, VOTE, "COMMIT"]])
    teller.close()


def test_one_program(make_world: Make, tmp_path: Path) -> None:
    """Two of its databases in two phases; one of them decides; and one alone."""
    world = make_world()
    urls = [server.create_database("statements") for server in world.servers.values()]
    engines = [sa.create_engine(url) for url in urls]
    for engine in engines:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE entry (number int)")
    resources = [
        txrpc.sql.ResourceManager(f"db-{number}", engine, decides=not number) for number, engine in enumerate(engines)
    ]

    def insert(number: int, decide_in: str = "") -> None:
        with txrpc.transaction(wait="acknowledged", decide_in=decide_in):
            for resource in resources[:number]:
                with resource.connection() as connection:
                    connection.exec_driver_sql("INSERT INTO entry VALUES (1)")

    two_phase = ["BEGIN", "INSERT work", VOTE, "PREPARE TRANSACTION", "COMMIT PREPARED"]
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=resources):
        check(world, lambda: insert(1), [["BEGIN", "INSERT work", VOTE, "COMMIT"], []])
        check(world, lambda: insert(2), [two_phase, two_phase])
        decides = ["BEGIN", "INSERT work", "INSERT decision", "SELECT floor", "COMMIT"]
        check(world, lambda: insert(2, "db-0"), [decides, two_phase])
    for engine, server in zip(engines, world.servers.values(), strict=True):
        engine.dispose()
        server.execute("DROP DATABASE statements WITH (FORCE)")
