"""A coordinator inside a program that serves other processes as well, so that services join the program's transactions."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

import txrpc
import txrpc.aio
from examples.bank import bank_pb2, bank_pb2_grpc
from tests.postgres import Server
from tests.runtime.memory_resource import MemoryResource
from tests.waiting import eventually
from txrpc.testing.processes import Child, free_port

numbers = itertools.count(1)
START = 1_000


class Bank(Child):
    """One bank of the example, in a process of its own."""

    def __init__(self, folder: Path, name: str, server: Server, coordinator: str) -> None:
        self.server, self.database = server, f"served{next(numbers)}"
        self.address = f"127.0.0.1:{free_port()}"
        arguments = ["--name", name, "--listen", self.address, "--database", server.create_database(self.database)]
        arguments += ["--coordinator", coordinator, "--accounts", "2", "--cents", str(START)]
        command = [sys.executable, "-m", "examples.bank.service", *arguments]
        super().__init__(command, name=name, output=folder / f"{name}.log", ready="serving")

    @property
    def cents(self) -> int:
        """Of the first account."""
        cents: int = self.server.execute("SELECT cents FROM account WHERE name = '0000'", self.database)[0][0]
        return cents

    @property
    def prepared(self) -> int:
        query = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
        count: int = self.server.execute(query, self.database)[0][0]
        return count

    def stub(self) -> bank_pb2_grpc.AccountsStub:
        channel = grpc.insecure_channel(self.address)
        return bank_pb2_grpc.AccountsStub(grpc.intercept_channel(channel, *txrpc.client_interceptors()))


@pytest.fixture
def coordinator() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def banks(tmp_path: Path, servers: Mapping[str, Server], coordinator: str) -> Iterator[list[Bank]]:
    made = [Bank(tmp_path, f"bank-{n}", server, coordinator) for n, server in enumerate(servers.values())]
    yield made
    for bank in made:
        bank.kill()


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'decisions.db'}"


def amount(cents: int) -> bank_pb2.Amount:
    return bank_pb2.Amount(account="0000", cents=cents)


def test_services_join_the_transactions_of_the_program_and_status_can_ask(
    log: str, coordinator: str, banks: list[Bank]
) -> None:
    with txrpc.embedded(log, listen=coordinator) as manager:
        assert manager.status().coordinators == {coordinator: ""}
        for bank in banks:
            bank.start()
        first, second = (bank.stub() for bank in banks)
        with txrpc.transaction():
            first.Withdraw(amount(100))
            second.Deposit(amount(100))
        assert [bank.cents for bank in banks] == [START - 100, START + 100]
        with pytest.raises(ValueError, match="no"), txrpc.transaction():
            first.Withdraw(amount(100))
            raise ValueError("no")
        command = [sys.executable, "-m", "txrpc.cli", "status", "--coordinator", coordinator]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "embedded" in told
        assert "bank service bank-1" in told
    assert [bank.cents for bank in banks] == [START - 100, START + 100]
    assert [bank.prepared for bank in banks] == [0, 0]


async def test_services_join_the_transactions_of_an_asyncio_program(
    log: str, coordinator: str, banks: list[Bank]
) -> None:
    async with await txrpc.aio.embedded(log, listen=coordinator, node="orders") as manager:
        await asyncio.to_thread(banks[0].start)
        async with grpc.aio.insecure_channel(banks[0].address, interceptors=txrpc.aio.client_interceptors()) as channel:
            async with txrpc.aio.transaction():
                await bank_pb2_grpc.AccountsStub(channel).Withdraw(amount(100))
        assert manager.status().coordinator == "orders"
    assert banks[0].cents == START - 100


@pytest.mark.parametrize(
    ("failpoint", "moved"), [("coordinator.before_record=kill", 0), ("coordinator.after_record=kill", 100)]
)
def test_what_a_crash_of_the_program_leaves_in_services_is_finished_when_it_is_back(
    log: str, coordinator: str, banks: list[Bank], tmp_path: Path, failpoint: str, moved: int
) -> None:
    arguments = [log, "--listen", coordinator, *[bank.address for bank in banks]]
    program = Child(
        [sys.executable, "-m", "tests.system.embedded_server_program", *arguments],
        name="program",
        output=tmp_path / "program.log",
    )
    program.arm(failpoint)
    program.launch()
    for bank in banks:
        bank.start()
    program.wait(60)
    assert "told committed" not in program.text()
    assert [bank.prepared for bank in banks] == [1, 1]
    again = Child(
        [sys.executable, "-m", "tests.system.embedded_server_program", *arguments, "--wait"],
        name="again",
        output=tmp_path / "again.log",
        ready="ready",
    )
    with again:
        eventually(lambda: [bank.prepared for bank in banks] == [0, 0], evidence=again.text)
    assert [bank.cents for bank in banks] == [START - moved, START + moved]


def test_one_service_joins_the_transactions_of_two_programs_with_a_name_each(
    log: str, coordinator: str, tmp_path: Path, servers: Mapping[str, Server]
) -> None:
    other = f"127.0.0.1:{free_port()}"
    bank = Bank(tmp_path, "bank", next(iter(servers.values())), f"{coordinator},{other}")
    with (
        txrpc.embedded(log, listen=coordinator, node="one") as one,
        txrpc.embedded(f"{log}2", listen=other, node="two") as two,
        bank,
    ):
        for manager in (one, two):
            channel = grpc.intercept_channel(grpc.insecure_channel(bank.address), *txrpc.client_interceptors())
            with manager.transaction():
                bank_pb2_grpc.AccountsStub(channel).Deposit(amount(1))
    assert bank.cents == START + 2


def test_an_address_that_cannot_be_had_is_refused_and_the_log_is_let_go(log: str, coordinator: str) -> None:
    with txrpc.embedded(log, listen=coordinator):
        with pytest.raises(txrpc.ConfigurationError, match=f"cannot listen on {coordinator}: the port is taken"):
            txrpc.embedded(f"{log}2", listen=coordinator)
        with txrpc.embedded(f"{log}2"):
            pass
    for wrong in ("nonsense", "127.0.0.1:70000"):
        with pytest.raises(txrpc.ConfigurationError, match="listen is HOST:PORT"):
            txrpc.embedded(log, listen=wrong)
    with pytest.raises(txrpc.ConfigurationError, match="node name"):
        txrpc.embedded(log, node="a node")


def test_a_coordinator_that_has_ended_serves_nobody(servers: Mapping[str, Server], coordinator: str, log: str) -> None:
    url = next(iter(servers.values())).create_database(f"served{next(numbers)}")
    notebooks = [MemoryResource("one"), MemoryResource("two")]
    with txrpc.embedded(url, resources=notebooks, listen=coordinator) as first, txrpc.embedded(url):
        assert _listens(coordinator)
        with pytest.raises((txrpc.TransactionAborted, txrpc.OutcomeUnknown)), first.transaction():
            for notebook in notebooks:
                notebook.write("x")
        eventually(lambda: not _listens(coordinator))


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionError:  # refused, or closed before it was accepted
        return False
    return True
