"""Histories of real transactions over three PostgreSQL databases, while coordinator and services are killed."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import txrpc
from tests.histories.checkers import Append, Ended, History, Read, Transaction, mistakes
from tests.histories.service import ACCOUNTS, LISTS, METHOD, TABLES
from tests.postgres import Server, start_servers
from tests.proof import note_proof
from tests.waiting import eventually
from txrpc.testing.failpoints import failpoint
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

pytestmark = pytest.mark.proof

BASES = ("a", "b", "c")
Deeds = dict[str, list[tuple[str, str, int]]]


class Lists:
    """Three services, a database each, on one server."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.server = server
        self.coordinator = CoordinatorProcess(folder)
        self.coordinator.start()
        self.services: dict[str, Child] = {}
        self.calls: dict[str, Any] = {}
        self._channels: list[grpc.Channel] = []
        for base in BASES:
            url = server.create_database(f"lists_{base}")
            server.execute(TABLES, f"lists_{base}")
            address = f"127.0.0.1:{free_port()}"
            arguments = [
                "--name",
                base,
                "--listen",
                address,
                "--database",
                url,
                "--coordinator",
                self.coordinator.address,
            ]
            command = [sys.executable, "-m", "tests.histories.service", *arguments]
            self.services[base] = Child(command, name=base, output=folder / f"{base}.log", ready="serving")
            self.services[base].start()
            channel: Any = grpc.intercept_channel(grpc.insecure_channel(address), *txrpc.client_interceptors())
            self.calls[base] = channel.unary_unary(METHOD)
            self._channels.append(channel)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for child in (*self.services.values(), self.coordinator):
            child.kill()

    def do(self, base: str, scenarios: list[tuple[str, str, int]]) -> list[Any]:
        answers: list[Any] = json.loads(self.calls[base](json.dumps(scenarios).encode(), timeout=8))
        return answers

    def ask(self, base: str, query: str) -> list[tuple[Any, ...]]:
        return self.server.execute(query, f"lists_{base}")

    def prepared(self) -> int:
        return int(self.server.execute("SELECT count(*) FROM pg_prepared_xacts")[0][0])

    def final(self) -> dict[tuple[str, str], tuple[int, ...]]:
        rows = [(base, *row) for base in BASES for row in self.ask(base, "SELECT name, held FROM list")]
        return {(base, name): tuple(held) for base, name, held in rows}


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lists]:
    (server,) = start_servers(1, fsync="off")
    made = Lists(tmp_path_factory.mktemp("lists"), server)
    with txrpc.connect(made.coordinator.address, process="histories"):
        yield made
    made.close()
    server.stop()


class Author:
    """A client that makes history."""

    def __init__(self, lists: Lists, seed: int) -> None:
        self._lists = lists
        self._dice = random.Random(seed)
        self._number = seed * 1_000_000
        self.made: list[Transaction] = []

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            scenarios = self._plan()
            did: list[Append | Read] = []
            try:
                with txrpc.transaction(timeout=8) as tx:
                    self._carry_out(scenarios, did)
                ended = Ended.COMMITTED
            except txrpc.OutcomeUnknown:
                ended = Ended.UNKNOWN
            except (txrpc.TxrpcError, grpc.RpcError, ZeroDivisionError):
                ended = Ended.ABORTED
                time.sleep(0.05)
            if did:
                self.made.append(Transaction(str(tx.xid)[-8:], tuple(did), ended))

    def _plan(self) -> Deeds:
        """In one order of databases and lists for all, so that nobody waits for somebody who waits for him."""
        dice = self._dice
        bases = sorted(dice.sample(BASES, dice.randint(1, 3)))
        scenarios: Deeds = {}
        for base in bases:
            names = sorted(dice.choices([f"l{n}" for n in range(1, LISTS + 1)], k=dice.randint(1, 3)))
            scenarios[base] = [(dice.choice(("append", "append", "read")), name, self._next()) for name in names]
        if len(bases) > 1:
            cents, account = dice.randint(1, 100), f"a{dice.randint(1, ACCOUNTS)}"
            scenarios[bases[0]].append(("move", account, -cents))
            scenarios[bases[-1]].append(("move", account, cents))
        return scenarios

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _carry_out(self, scenarios: Deeds, did: list[Append | Read]) -> None:
        for base, ours in scenarios.items():
            did += [Append((base, name), value) for verb, name, value in ours if verb == "append"]
        appended = list(did)
        did.clear()
        done: list[Append | Read] = []
        try:
            for base, ours in scenarios.items():
                for (verb, name, value), answer in zip(ours, self._lists.do(base, ours), strict=True):
                    if verb == "append":
                        done.append(Append((base, name), value))
                    elif verb == "read":
                        done.append(Read((base, name), tuple(answer)))
        except BaseException:
            did += appended  # a call that failed may have done its work
            raise
        did += done
        if self._dice.random() < 0.1:
            raise ZeroDivisionError("it gives up")


def test_rule_1_what_clients_saw_and_what_is_there_make_one_history(lists: Lists) -> None:
    authors = [Author(lists, seed) for seed in range(1, 6)]
    until = time.monotonic() + 30
    threads = [threading.Thread(target=author.work, args=(until,)) for author in authors]
    for thread in threads:
        thread.start()
    dice, killed = random.Random(7), Counter[str]()
    while time.monotonic() < until - 3:
        victim = dice.choice([lists.coordinator, *lists.services.values()])
        time.sleep(dice.uniform(1.5, 3))
        victim.kill()
        victim.start()
        killed[victim.name] += 1
    for thread in threads:
        thread.join(60)
    eventually(lambda: lists.prepared() == 0, 30)
    history = History([done for author in authors for done in author.made], lists.final())
    assert mistakes(history) == []
    assert sum(lists.ask(base, "SELECT sum(cents) FROM account")[0][0] for base in BASES) == 0
    ended = Counter(transaction.ended.value for transaction in history.transactions)
    assert ended["committed"] > 50
    assert sum(killed.values()) >= 5
    note_proof("history", transactions=len(history.transactions), ended=dict(ended), killed=dict(killed))


# --------------------------------------------------------------------------- what is not promised, and how to have it


def appended_while_half_done(lists: Lists, reading: str) -> list[tuple[bool, bool]]:
    """Append to a list in two databases; and while only one has committed, read both: which of the two was seen?"""
    eventually(lambda: reachable(lists), 30)
    value = random.randrange(1 << 40)
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        with txrpc.transaction(timeout=20):
            both = [value in lists.do(base, [(reading, "l1", 0)])[0] for base in ("a", "b")]
        seen.append((both[0], both[1]))

    with failpoint("participant.before_commit_prepared", "sleep:2", process=lists.services["b"]) as late:
        writer = threading.Thread(target=write, args=(lists, value))
        writer.start()
        late.wait()
        eventually(lambda: value in lists.final()["a", "l1"])
        reader = threading.Thread(target=look)
        reader.start()
        reader.join(30)
        writer.join(30)
    return seen


def reachable(lists: Lists) -> bool:
    """Whether everything has found everything again after what was killed before."""
    try:
        with txrpc.transaction(timeout=20):
            for base in BASES:
                lists.do(base, [("read", "l1", 0)])
    except (grpc.RpcError, txrpc.TxrpcError):
        return False
    return True


def write(lists: Lists, value: int) -> None:
    with txrpc.transaction(timeout=20):
        for base in ("a", "b"):
            lists.do(base, [("append", "l1", value)])


def test_a_plain_reader_of_two_databases_may_see_half_of_a_transaction(lists: Lists) -> None:
    assert appended_while_half_done(lists, "read") == [(True, False)]


def test_a_locking_reader_of_two_databases_sees_all_of_a_transaction(lists: Lists) -> None:
    assert appended_while_half_done(lists, "read locked") == [(True, True)]
