"""Transactions that a resource of another process decides when they are committed: no call was told to."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import grpc
import pytest

import txrpc
import txrpc.aio
from tests.postgres import Server
from tests.proof import note_proof
from tests.system.ledger_program import CENTS
from tests.system.test_deciding_call import Shop
from tests.system.test_last_resource import LONG_S, Database, said
from tests.system.world import World
from tests.waiting import aeventually, eventually
from txrpc.testing import failpoint
from txrpc.testing.processes import Child, CoordinatorProcess


@pytest.fixture
def shop(coordinator: CoordinatorProcess, servers: dict[str, Server]) -> Iterator[Shop]:
    shop = Shop(coordinator, Database(next(iter(servers.values()))))
    with shop.ends:
        yield shop


def work(shop: Shop, calls: str) -> None:
    """d: a call to the service whose database decides; a: to the other one; a capital: a final call."""
    numbers = itertools.count(1)
    for call in calls:
        with txrpc.final_call() if call.isupper() else nullcontext():
            if call in "dD":
                shop.d.call("write", b"%d" % next(numbers))
            else:
                shop.a.write(b"one")


@pytest.mark.parametrize(
    ("calls", "wait"),
    [*((calls, None) for calls in ("da", "ad", "dad", "d", "a", "Ad", "aD", "AD")), ("da", "acknowledged")],
)
def test_it_commits_when_the_block_ends(shop: Shop, calls: str, wait: Any) -> None:
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", wait=wait, manager=shop.client) as tx:
        work(shop, calls)
    lines, rows = ["one"] * ("a" in calls.lower()), [1, 2][: calls.lower().count("d")]
    if wait is not None:
        assert shop.found == (lines, rows)
    eventually(lambda: shop.found == (lines, rows))
    eventually(lambda: shop.database.decisions == [(True, True)])
    assert shop.client.outcome(tx.xid) is txrpc.Outcome.COMMITTED
    assert shop.database.prepared == 0


@pytest.mark.parametrize(
    ("calls", "messages"),
    [
        (
            "da",
            {
                "received CommitRequest": 1,
                "sent Prepare": 1,
                "received Voted": 1,
                "sent Decide": 1,
                "received OnePhaseDone": 1,
                "sent OutcomeReply": 1,
                "sent Commit": 1,
                "received Acked": 1,
                "sent DecisionDone": 1,
            },
        ),
        (
            "d",
            {
                "received CommitRequest": 1,
                "sent Decide": 1,
                "received OnePhaseDone": 1,
                "sent OutcomeReply": 1,
            },
        ),
        (
            "A",
            {
                "received CommitRequest": 1,
                "sent RegisterQuestion": 1,
                "received RegisterAnswer": 1,
                "sent OutcomeReply": 1,
                "sent Commit": 1,
                "received Acked": 1,
                "sent DecisionDone": 1,
            },
        ),
    ],
)
def test_the_messages_are_those_of_the_protocols_table_and_the_log_has_nothing(
    shop: Shop, calls: str, messages: dict[str, int]
) -> None:
    before = said(shop)
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
        work(shop, calls)
    eventually(lambda: shop.database.decisions == [(True, True)])
    assert said(shop) - before == Counter(messages)


@pytest.mark.parametrize("calls", ["da", "a", "aD"])
def test_one_vote_against_rolls_everything_back_and_writes_nothing(shop: Shop, calls: str) -> None:
    shop.a.notebook.refuses = True
    with pytest.raises(txrpc.TransactionAborted):
        with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
            work(shop, calls)
    eventually(lambda: shop.database.prepared == 0)
    eventually(lambda: shop.d.manager._client.state.branches == {})
    assert (*shop.found, shop.database.decisions) == ([], [], [])


def test_a_database_that_refuses_its_commit_decides_nothing(shop: Shop) -> None:
    shop.database.ask(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE unique_violation; END'; "
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION no()"
    )
    with pytest.raises(txrpc.TransactionAborted):
        with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
            work(shop, "da")
    assert shop.database.decisions == [(False, False)], "the register says so, for those who ask"
    eventually(lambda: shop.a.manager._client.state.branches == {})
    assert shop.found == ([], [])


def test_an_answer_that_comes_too_late_is_asked_for_at_the_register(shop: Shop) -> None:
    with failpoint("participant.after_decide", "sleep:6"):
        with txrpc.transaction(timeout=5, decide_in="ledger", wait="acknowledged", manager=shop.client) as tx:
            work(shop, "da")
    assert shop.found == (["one"], [1])
    assert shop.client.outcome(tx.xid) is txrpc.Outcome.COMMITTED


def test_a_decision_that_begins_too_late_is_none(shop: Shop) -> None:
    with pytest.raises(txrpc.TransactionAborted):
        with failpoint("participant.before_decide", "sleep:6"):
            with txrpc.transaction(timeout=5, decide_in="ledger", manager=shop.client):
                work(shop, "da")
    eventually(lambda: shop.d.manager._client.state.branches == {})
    eventually(lambda: shop.a.manager._client.state.branches == {})
    assert (*shop.found, shop.database.decisions) == ([], [], [(False, False)])


@pytest.mark.parametrize("calls", ["da", "a"])
def test_the_right_to_decide_is_given_to_the_epoch_that_is_there_at_the_end(shop: Shop, calls: str) -> None:
    managers = shop.client, shop.a.manager, shop.d.manager
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", wait="acknowledged", manager=shop.client):
        work(shop, calls)
        shop.coordinator.kill()
        eventually(lambda: not any(each.status().coordinator for each in managers))
        shop.coordinator.start()
        eventually(lambda: all(each.status().coordinator for each in managers))
    assert shop.found == (["one"], [1] * (calls == "da"))
    eventually(lambda: shop.database.decisions == [(True, True)])


async def test_the_same_in_asyncio(shop: Shop) -> None:
    async with await txrpc.aio.connect(shop.coordinator.address, process="aclient") as manager:
        await aeventually(lambda: "ledger" in manager._client.state.registers)
        address = f"127.0.0.1:{shop.d.port}"
        interceptors = txrpc.aio.client_interceptors()
        async with grpc.aio.insecure_channel(address, interceptors=interceptors) as opened:
            channel: Any = opened
            async with txrpc.aio.transaction(decide_in="ledger", manager=manager):
                await channel.unary_unary("/t.D/write")(b"1")
    assert shop.database.rows == [1]


# -------------------------------------------------------------------------------------------------------------- crashes

CRASHES = [
    ("root", "client.after_commit_request", None),
    ("c1", "coordinator.before_decide", False),
    ("c1", "coordinator.after_decide", None),
    ("c1", "coordinator.before_outcome_reply", True),
    ("c1", "coordinator.before_commit", True),
    ("c1", "coordinator.before_decision_done", True),
    ("bank-b", "participant.before_decide", False),
    ("bank-b", "participant.after_insert_decision", False),
    ("bank-b", "participant.after_decide", True),
    ("bank-b", "participant.before_one_phase_done", True),
    ("bank-b", "participant.after_one_phase_done", True),
    ("bank-a", "participant.after_prepare", False),
    ("bank-a", "participant.before_commit_prepared", True),
]
"""Which process is killed where, and how the transaction then ends (None: either way)."""
ALWAYS = {"coordinator.after_decide", "participant.before_one_phase_done"}
"""The points of `make test`."""


@pytest.mark.parametrize(
    ("process", "point", "commits"),
    [
        pytest.param(*cell, id="-".join(cell[:2]), marks=[] if cell[1] in ALWAYS else pytest.mark.proof)
        for cell in CRASHES
    ],
)
def test_rule_1_all_ends_alike_whoever_dies_where(
    make_world: Callable[..., World], process: str, point: str, commits: bool | None
) -> None:
    world = make_world(decides="bank-b")
    before = world.money()
    program = [sys.executable, "-m", "tests.system.ledger_program", world.addresses]
    program += [service.address for service in world.services.values()]
    program += ["--decided-by", "bank-b"]
    root = Child(program, name="root", output=world.folder / "root.log", ready="ready")
    victim = {"root": root, "c1": world.coordinator, **world.services}[process]
    victim.arm(f"{point}=kill")
    root.start()
    victim.wait(60)
    assert f"failpoint {point}: kill" in victim.text()
    if victim is not root:
        victim.arm("")
        victim.start()
        root.wait(60)
    told = root.text().partition("told ")[2].strip()
    world.at_rest(60)
    found = world.servers["bank-b"].execute("SELECT committed, done FROM txrpc_decision", world.databases["bank-b"])
    moved = [now - was for now, was in zip(world.money(), before, strict=True)]
    committed = moved != [0, 0]
    assert moved == ([-CENTS, CENTS] if committed else [0, 0])
    assert not told.startswith("committed") or committed
    assert not told.startswith("aborted") or not committed
    assert any(row[0] for row in found) == committed
    assert commits in (None, committed)
    note_proof("decided elsewhere", process=process, point=point, committed=committed)
