"""How to test your own services: real processes, a real PostgreSQL, real crashes.  The fixtures are of txrpc's pytest plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, text

import txrpc
from examples.bank.teller import Teller
from txrpc.testing import failpoint
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

AtRest = Callable[[], None]


class Bank:
    """One service of ours, with a database of its own."""

    def __init__(self, name: str, database: str, coordinator: str, start: Callable[..., Child]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.engine = create_engine(database, poolclass=NullPool)
        arguments = ["--name", name, "--listen", self.address, "--database", database, "--coordinator", coordinator]
        arguments += ["--accounts", "1", "--cents", "1000"]
        self.process = start([sys.executable, "-m", "examples.bank.service", *arguments], name=name, ready="serving")

    def cents(self) -> Any:
        with self.engine.connect() as connection:
            return connection.scalar(text("SELECT cents FROM account"))


@pytest.fixture
def banks(
    txrpc_coordinator: CoordinatorProcess, txrpc_database: Callable[[], str], txrpc_process: Callable[..., Child]
) -> list[Bank]:
    return [Bank(name, txrpc_database(), txrpc_coordinator.address, txrpc_process) for name in ("a", "b")]


@pytest.fixture
def teller(banks: list[Bank]) -> Iterator[Teller]:
    teller = Teller([bank.address for bank in banks])
    yield teller
    teller.close()


pytestmark = pytest.mark.usefixtures("txrpc_manager")  # the test is a client: txrpc.transaction() works in it


def test_the_coordinator_crashes_between_the_decision_and_the_answer(
    banks: list[Bank], teller: Teller, txrpc_coordinator: CoordinatorProcess, txrpc_at_rest: AtRest
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with failpoint("coordinator.before_outcome_reply", "kill", process=txrpc_coordinator) as crash:
            done = pool.submit(transfer, teller)
            crash.wait()
            txrpc_coordinator.wait()
        txrpc_coordinator.start()
        done.result(timeout=30)  # no error: it was decided, and our code learns that
    txrpc_at_rest()
    assert [bank.cents() for bank in banks] == [900, 1100]


def test_a_service_that_dies_before_it_has_promised_undoes_everything(
    banks: list[Bank], teller: Teller, txrpc_at_rest: AtRest
) -> None:
    first = banks[0].process
    with ThreadPoolExecutor(1) as pool:
        with failpoint("participant.before_prepare", "kill", process=first) as crash:
            done = pool.submit(transfer, teller)
            crash.wait()
            first.wait()
        first.start()
        with pytest.raises(txrpc.TransactionAborted) as caught:
            done.result(timeout=30)
    assert caught.value.retryable
    txrpc_at_rest()
    assert [bank.cents() for bank in banks] == [1000, 1000]


def test_a_call_that_fails_undoes_what_was_done_before(
    banks: list[Bank], teller: Teller, txrpc_at_rest: AtRest
) -> None:
    with failpoint("client.before_call", "error@2"), pytest.raises(RuntimeError):
        transfer(teller)
    txrpc_at_rest()
    assert [bank.cents() for bank in banks] == [1000, 1000]


def transfer(teller: Teller) -> None:
    """Once: around it there is a transaction already, so it is not tried again."""
    with txrpc.transaction(timeout=10):
        teller.transfer(0, "0000", 1, "0000", 100)
