"""Two banks that are services with a PostgreSQL each, and coordinators: all are killed while a teller moves money."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psycopg
from rich.console import Console

import txrpc
from examples.bank.demo.progress import Progress
from examples.bank.teller import Teller
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

__all__ = ["BANKS", "Bank", "Services"]

ACCOUNTS, CENTS = 100, 1_000_000
BANKS = ("bank-a", "bank-b")
TAKEOVER_S = 60.0


class Bank:
    """A PostgreSQL cluster of its own, and the database of a bank in it."""

    def __init__(self) -> None:
        self.server = PostgresServer.start_new(max_prepared_transactions=100)
        self.server.create_database("bank")
        self.url = self.server.url("bank")

    def prepared(self) -> int:
        """How many branches it holds prepared."""
        return int(self.server.execute("SELECT count(*) FROM pg_prepared_xacts", "bank")[0][0])

    def journal(self) -> dict[str, int]:
        """What each transaction did here, in cents."""
        rows = self.server.execute("SELECT xid, sum(cents) FROM journal GROUP BY xid", "bank")
        return {str(xid): int(cents) for xid, cents in rows}

    def total(self) -> int:
        """The money in all accounts, in cents."""
        return int(self.server.execute("SELECT sum(cents) FROM account", "bank")[0][0])


class Services:
    """Everything that runs beside this process."""

    def __init__(self, folder: Path, *, group: bool, form: str) -> None:
        """*form*: "two-phase", "final-calls", or "decides"."""
        self._form = form
        ports = {node: free_port() for node in (("c1", "c2", "c3") if group else ("c1",))}
        members = ",".join(f"{node}=127.0.0.1:{port}" for node, port in ports.items())
        self.coordinators = [
            CoordinatorProcess(
                folder,
                node=node,
                port=port,
                log=f"sqlite:///{folder / node}.db",
                options=["--members", members] if group else [],
            )
            for node, port in ports.items()
        ]
        self.addresses = ",".join(coordinator.address for coordinator in self.coordinators)
        self.banks = {name: Bank() for name in BANKS}
        self.ports = {name: free_port() for name in BANKS}
        self.services = {name: self._service(name, folder) for name in BANKS}

    def _service(self, name: str, folder: Path) -> Child:
        arguments = [sys.executable, "-m", "examples.bank.service", "--name", name]
        arguments += ["--listen", f"127.0.0.1:{self.ports[name]}", "--coordinator", self.addresses]
        arguments += ["--database", self.banks[name].url, "--accounts", str(ACCOUNTS), "--cents", str(CENTS)]
        arguments += ["--decides"] if self._form == "decides" and name == BANKS[-1] else []
        return Child(arguments, name=name, output=folder / f"{name}.log")

    def start(self) -> None:
        """Start the coordinators and the services."""
        with ThreadPoolExecutor() as pool:  # at once: the members of a group wait for each other
            list(pool.map(CoordinatorProcess.start, self.coordinators))
        for service in self.services.values():
            service.start()
        for service in self.services.values():
            service.wait_for("serving")

    def stop(self) -> None:
        """Stop everything, by its own process id."""
        for child in (*self.services.values(), *self.coordinators):
            child.kill()
        for bank in self.banks.values():
            bank.server.stop()

    def prepared(self) -> dict[str, int]:
        """See `Stores`; nothing while one of the databases is down."""
        try:
            return {name: bank.prepared() for name, bank in self.banks.items()}
        except psycopg.OperationalError:
            return {}

    def journals(self) -> list[dict[str, int]]:
        """See `Stores`."""
        return [bank.journal() for bank in self.banks.values()]

    def total(self) -> int:
        """See `Stores`."""
        return sum(bank.total() for bank in self.banks.values())

    def work(self, progress: Progress, console: Console, threads: int) -> None:
        """Move money, and kill one of each kind on the way."""
        decider = BANKS[-1] if self._form == "decides" else ""
        chaos = threading.Thread(target=self._crashes, args=(progress, console), daemon=True)
        with txrpc.connect(self.addresses, process="teller", decide_in=decider or None):
            addresses = [f"127.0.0.1:{port}" for port in self.ports.values()]
            teller = Teller(addresses, final=self._form == "final-calls", decider=decider)
            chaos.start()
            with ThreadPoolExecutor(threads) as pool:
                for future in [pool.submit(_transfer, teller, progress) for _ in range(progress.transfers)]:
                    future.result()
            chaos.join(60)
            teller.close()

    def _crashes(self, progress: Progress, console: Console) -> None:
        """Kill one of each kind, and bring it back a second later; or not, if another one takes it over."""
        coordinator, service = self.coordinators[0], self.services["bank-a"]
        database = self.banks["bank-b"].server
        plan: list[tuple[float, str, Callable[[], object], Callable[[], object]]] = [
            (0.20, f"service bank-a (pid {service.pid})", service.kill, service.start),
            (0.45, f"database of bank-b (pid {database.pid})", database.kill, database.restart),
            (0.70, f"coordinator (pid {coordinator.pid})", coordinator.kill, coordinator.start),
        ]
        for share, what, kill, start in plan:
            progress.wait_for(share)
            kill()
            progress.killed(console, what, self)
            if kill == coordinator.kill and len(self.coordinators) > 1:
                heir = self._heir()
                progress.say(console, f"coordinator {heir} has taken over what c1 had begun; c1 stays dead")
                continue
            time.sleep(1)
            start()
            progress.say(console, f"started again: {what.split(' (')[0]}")

    def _heir(self) -> str:
        """Wait until another member has taken the dead one over; returns its name."""
        until = time.monotonic() + TAKEOVER_S
        while time.monotonic() < until:
            for coordinator in self.coordinators[1:]:
                if 'event="taken over"' in coordinator.text():
                    return coordinator.name
            time.sleep(0.02)
        raise TimeoutError("no member of the group has taken c1 over")


def _transfer(teller: Teller, progress: Progress) -> None:
    """One random transfer: a transaction that is run again while that may help."""
    cents = random.randint(1, 5_000)
    source, target = random.sample(range(len(BANKS)), 2)
    accounts = [f"{random.randrange(ACCOUNTS):04}" for _ in BANKS]
    xids: list[str] = []

    def transfer() -> None:
        if xids:
            progress.again(xids[-1])
        transaction = txrpc.current_transaction()
        xids.append(str(transaction.xid) if transaction else "")
        teller.transfer(source, accounts[0], target, accounts[1], cents)

    try:
        txrpc.transactional(timeout=10, retry=txrpc.Retry(within_s=60))(transfer)()
        result = "committed"
    except txrpc.OutcomeUnknown:
        result = "outcome unknown"
    except txrpc.IllegalState as error:  # the last call failed, and it had decided all the same
        result = "committed" if "committed" in str(error) else "rolled back"
    except (txrpc.TxrpcError, grpc.RpcError):
        result = "rolled back"
    progress.finished(result, xids[-1] if xids else "")
