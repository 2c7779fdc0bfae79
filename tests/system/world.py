"""Real processes of the bank example around a test: a coordinator, two services, two PostgreSQL servers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from examples.bank.teller import Teller
from tests.postgres import Server
from tests.waiting import eventually
from txrpc.cli import overview
from txrpc.cli.reach import Reach
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

BANKS = ("bank-a", "bank-b")
START = 1_000


class Place(Protocol):
    """A machine that something runs on, if it is not this one."""

    address: str
    launch: list[str]


class Service(Child):
    """One bank of `examples.bank.service`."""

    def __init__(
        self, world: World, name: str, database: str, coordinator: str = "", port: int = 0, decides: bool = False
    ) -> None:
        place = world.places.get(name)
        self.host = place.address if place else "127.0.0.1"
        self.port = port or free_port()
        arguments = [*(place.launch if place else []), sys.executable, "-m", "examples.bank.service"]
        arguments += ["--name", name, "--listen", self.address]
        arguments += ["--database", database, "--coordinator", coordinator or world.addresses]
        arguments += ["--accounts", "20", "--cents", str(START), *(["--decides"] if decides else [])]
        super().__init__(arguments, name=name, output=world.folder / f"{name}.log", ready="serving")

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


class World:
    """One test's processes.  Databases are fresh; their servers are shared by the tests of a worker."""

    def __init__(
        self,
        folder: Path,
        servers: dict[str, Server],
        number: int,
        options: list[str],
        places: Mapping[str, Place] | None = None,
        nodes: int = 1,
        log: str = "",
        group: int = 0,
        spare: int = 0,
        decides: str = "",
    ) -> None:
        """*nodes*: coordinators, all on one log, which is *log* or a file of the first one's.

        *decides*: the bank whose database decides, where a transaction says so.

        *group*: or as many, each with a disk of its own; and as many *spare* addresses of members that may be added.
        """
        self.folder = folder
        self.places = places or {}
        self.servers = servers
        self.databases = {name: f"bank{number}{name[-1]}" for name in servers}
        self.coordinators: list[CoordinatorProcess] = []
        self.group = group
        count = (group or nodes) + spare
        self._ports = {node: (self._host(node), free_port()) for node in [f"c{n + 1}" for n in range(count)]}
        self._options = options
        for node in list(self._ports)[: group or nodes]:
            members = list(self._ports)[:group]
            self.coordinators.append(self._coordinator(node, log, members))
        self.coordinator = self.coordinators[0]
        self.addresses = ",".join(f"{host}:{port}" for host, port in self._ports.values())
        self.urls = {name: server.create_database(self.databases[name]) for name, server in servers.items()}
        self.services = {name: Service(self, name, url, decides=name == decides) for name, url in self.urls.items()}

    def _host(self, node: str) -> str:
        place = self.places.get(node)
        return place.address if place else "127.0.0.1"

    def _coordinator(self, node: str, log: str, members: Sequence[str]) -> CoordinatorProcess:
        named = ",".join(f"{name}={self._ports[name][0]}:{self._ports[name][1]}" for name in members)
        host, port = self._ports[node]
        place = self.places.get(node)
        return CoordinatorProcess(
            self.folder,
            log=f"sqlite:///{self.folder / node}.db" if members else log,
            node=node,
            options=["--ack-wait-s", "15", *(["--members", named] if members else []), *self._options],
            host=host,
            port=port,
            launch=place.launch if place else (),
        )

    def newcomer(self, node: str) -> CoordinatorProcess:
        """Start one of the spare members, which waits until it is added."""
        members = [each.name for each in self.coordinators if each.running]
        one = self._coordinator(node, "", [*members, node])
        self.coordinators.append(one)
        one.launch()
        return one

    def start(self, **failpoints: str) -> None:
        """Start everything; *failpoints* by process name, with _ for -."""
        for child in (*self.coordinators, *self.services.values()):
            armed = failpoints.pop(child.name.replace("-", "_"), None)
            child.arm(armed or "")
        assert not failpoints
        # At once, for the members of a group wait for each other; else in order, for the first one is to lead.
        with ThreadPoolExecutor(len(self.coordinators) if self.group else 1) as pool:
            list(pool.map(CoordinatorProcess.start, self.coordinators))
        for service in self.services.values():
            service.start()

    def stop(self) -> None:
        for child in (*self.services.values(), *self.coordinators):
            child.kill()
        for bank, server in self.servers.items():
            if not server.running:
                server.restart()
            database = self.databases[bank]
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
            for (gid,) in server.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{database}'"):
                quoted = gid.replace("'", "''")
                server.execute(f"ROLLBACK PREPARED '{quoted}'", database)
            server.execute(f"DROP DATABASE {database}")

    def ask(self, query: str) -> list[list[tuple[Any, ...]]]:
        """The answers of both banks' databases."""
        return [server.execute(query, self.databases[name]) for name, server in self.servers.items()]

    def teller(self) -> Teller:
        return Teller([service.address for service in self.services.values()])

    # ------------------------------------------------------------------------------------------------- looking at it

    def money(self) -> list[int]:
        """What account 0000 of each bank has, according to the databases themselves."""
        return [int(rows[0][0]) for rows in self.ask("SELECT cents FROM account WHERE name = '0000'")]

    def total(self) -> int:
        return sum(int(rows[0][0]) for rows in self.ask("SELECT sum(cents) FROM account"))

    def prepared(self) -> list[int]:
        query = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
        return [int(rows[0][0]) for rows in self.ask(query)]

    def journals(self) -> list[dict[str, int]]:
        found = self.ask("SELECT xid, sum(cents) FROM journal GROUP BY xid")
        return [{xid: int(cents) for xid, cents in rows} for rows in found]

    def locks(self) -> int:
        """Transactions that hold locks on accounts."""
        query = "SELECT count(*) FROM pg_locks WHERE relation = 'account'::regclass"
        return sum(int(rows[0][0]) for rows in self.ask(query))

    def status(self, coordinator: CoordinatorProcess | None = None) -> dict[str, Any]:
        """What `txrpc status --json` prints."""
        return overview.as_dict(overview.ask(Reach((coordinator or self.coordinator).address), 1_000, 10))

    def at_rest(self, timeout_s: float = 40.0) -> None:
        """Wait until nothing is prepared and nothing holds locks."""
        eventually(lambda: not any(self.prepared()) and not self.locks(), timeout_s, self.evidence)

    def evidence(self) -> str:
        logs = [f"--- {c.name}\n{c.output.read_text()[-3000:]}" for c in (*self.coordinators, *self.services.values())]
        return f"prepared {self.prepared()}, locks {self.locks()}\n" + "\n".join(logs)

    def revive(self, child: Child) -> threading.Thread:
        """In the background: wait until *child* has died of its failpoint, and start it again."""

        def wait_and_start() -> None:
            with suppress(Exception):
                child.wait(30)
                time.sleep(0.2)
                child.arm("")
                child.start()

        thread = threading.Thread(target=wait_and_start, daemon=True)
        thread.start()
        return thread
