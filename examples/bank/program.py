"""One program with two stores of money and a coordinator of its own: no server runs, and no gRPC.

python -m examples.bank.program --log sqlite:///log.db --stores postgresql+psycopg://... postgresql+psycopg://...
python -m examples.bank.program --log sqlite:///log.db --stores box/ sqlite:///bank.db

The first form is two-phase commit.  SQLite cannot prepare: in the second one the file decides, and the box of cash follows.

Money moves between them until the program is told to stop (SIGTERM), or killed.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import txrpc
import txrpc.sql
from examples.bank.cashbox import CashBox
from examples.bank.service import Account, Entry, open_bank
from txrpc.resource import Resource


class Store(Protocol):
    """Where money is."""

    resource: Resource

    def add(self, account: str, cents: int) -> None:
        """Change an account, in the current transaction."""


class Box:
    """Has no accounts."""

    def __init__(self, name: str, folder: Path, opening: int) -> None:
        self._box = CashBox(name, folder, opening)
        self.resource: Resource = self._box

    def add(self, account: str, cents: int) -> None:
        self._box.add(cents)


class Bank:
    """Accounts in a SQL database."""

    def __init__(self, name: str, url: str, accounts: int, cents: int) -> None:
        engine = open_bank(url, accounts, cents)
        decides = engine.dialect.name == "sqlite"
        self._database = txrpc.sql.ResourceManager(name, engine, decides=decides)
        self.resource: Resource = self._database

    def add(self, account: str, cents: int) -> None:
        with self._database.session() as session:
            row = session.get_one(Account, account, with_for_update=True)
            row.cents += cents
            session.add(Entry(xid=str(session_xid()), account=account, cents=cents))


def session_xid() -> txrpc.Xid:
    transaction = txrpc.current_transaction()
    assert transaction is not None
    return transaction.xid


def say(*words: object) -> None:
    """One line, at once: the program may be killed at any moment."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def move(stores: list[Store], accounts: int) -> None:
    """One transfer, in one direction or the other; run again while that may help."""
    cents = random.randint(1, 5_000) * random.choice((1, -1))
    names = [f"{random.randrange(accounts):04}" for _ in stores]
    xids: list[txrpc.Xid] = []

    def transfer() -> None:
        if xids:
            say("again", xids[-1])
        xids.append(session_xid())
        say("try", xids[-1])
        for store, name, sign in zip(stores, names, (-1, 1), strict=True):
            store.add(name, sign * cents)

    try:
        txrpc.transactional(timeout=10, retry=txrpc.Retry(within_s=60))(transfer)()
        result = "committed"
    except txrpc.OutcomeUnknown:
        result = "outcome unknown"
    except txrpc.TxrpcError:
        result = "rolled back"
    say("told", xids[-1] if xids else "none", result)


stopping = threading.Event()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True)
    parser.add_argument("--stores", nargs=2, required=True, help="URLs of databases; or a folder, and a SQLite file")
    parser.add_argument("--accounts", type=int, default=100, help="make this many accounts if there are none")
    parser.add_argument("--cents", type=int, default=1_000_000, help="in each of them")
    parser.add_argument(
        "--threads", type=int, default=4, help="0: move nothing, and finish what an earlier run has left"
    )
    arguments = parser.parse_args()
    # Before any thread starts, which all inherit it: the signals wait for `sigwait`.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    stores: list[Store] = [
        Bank(f"bank-{letter}", where, arguments.accounts, arguments.cents)
        if "://" in where
        else Box(f"box-{letter}", Path(where), arguments.accounts * arguments.cents)
        for letter, where in zip("ab", arguments.stores, strict=True)
    ]
    decides = next((store.resource for store in stores if getattr(store.resource, "decider", None)), None)

    def work(_: int) -> None:
        while not stopping.is_set():
            move(stores, arguments.accounts)

    resources = [store.resource for store in stores]
    with txrpc.embedded(arguments.log, resources=resources, decide_in=decides):
        say("serving")
        with ThreadPoolExecutor(max(1, arguments.threads)) as pool:
            at_work = [pool.submit(work, number) for number in range(arguments.threads)]
            signal.sigwait(signals)
            stopping.set()
        for each in at_work:
            each.result()


if __name__ == "__main__":
    main()
