"""The processes that are compared, all running side by side: two PostgreSQL clusters, and services of each kind over them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.services import SCHEMA
from txrpc.testing.postgres import PostgresServer
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

__all__ = ["Form", "Run", "World"]

BANKS = ("bank-a", "bank-b")


@dataclass(frozen=True)
class Form:
    """One way to do the work.

    name: as in `benchmarks.clients`.
    label: for people.
    services: the kind of services that it calls, if any.
    base: the form that it is compared with.
    styles: sync, asyncio.
    """

    name: str
    label: str
    services: str
    base: str
    styles: tuple[str, ...] = ("sync", "asyncio")


@dataclass
class Run:
    """What one measurement found."""

    form: str
    style: str
    clients: int
    seconds: float
    took_s: list[float]
    cpu_s: dict[str, float] = field(default_factory=dict)
    wal_syncs: int = 0
    messages: int = 0
    batches: int = 0
    decisions: int = 0
    log_writes: int = 0
    statements: list[int] = field(default_factory=list)
    """Of each database, if they were counted."""

    @property
    def rate(self) -> float:
        """Transfers a second."""
        return len(self.took_s) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Milliseconds that so many percent of the transfers took at most."""
        ordered = sorted(self.took_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000 if ordered else 0.0


class World:
    """Everything that the measurements of one benchmark share.  As a context manager it is stopped at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._postgres: list[PostgresServer] = []
        self._databases: list[str] = []
        self._addresses: dict[tuple[str, str], list[str]] = {}
        self._pids: dict[str, int] = {}
        self._coordinators: dict[str, str] = {}

    def __enter__(self) -> Self:
        for name in BANKS:
            server = self._stack.enter_context(
                PostgresServer.start_new(max_connections=500, max_prepared_transactions=200)
            )
            self._databases.append(server.create_database("bench"))
            for statement in SCHEMA:
                server.execute(statement, "bench")
            self._postgres.append(server)
            self._pids[f"postgres {name}"] = server.pid
        self._postgres[0].create_database("dbos")
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def statements(self, form: Form, style: str) -> list[float]:
        """Count, apart from what is timed, how many statements each database executes for a transfer."""
        self._log_statements("all")
        try:
            run = self.run(form, style, 1, 1.0, [server.folder / "server.log" for server in self._postgres])
        finally:
            self._log_statements("none")
        return [number / max(1, len(run.took_s)) for number in run.statements]

    def _log_statements(self, which: str) -> None:
        for server in self._postgres:
            server.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
            server.execute("SELECT pg_reload_conf()")

    def run(self, form: Form, style: str, clients: int, seconds: float, logs: Sequence[Path] = ()) -> Run:
        """Measure *form* in a process of its own, beside services that stay; raises `RuntimeError` with what it wrote."""
        watched = {name: pid for name, pid in self._pids.items() if name.startswith("postgres")}
        arguments = ["--form", form.name, "--style", style, "--clients", str(clients), "--seconds", str(seconds)]
        for database in self._databases:
            arguments += ["--database", database]
        kind = form.services or ("txrpc" if form.name == "local" else "")
        if kind:
            arguments += ["--coordinator", self._coordinator(kind)]
            if kind == "txrpc":
                arguments += ["--counting", self._coordinator(kind)]
            for address in self._services(kind, style) if form.services else ():
                arguments += ["--service", address]
            watched |= {
                name: pid for name, pid in self._pids.items() if name.startswith((f"{kind} {style}", f"{kind} c"))
            }
        for log in logs:
            arguments += ["--log", str(log)]
        for name, pid in watched.items():
            arguments += ["--watch", f"{name}={pid}"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.clients", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds * 3 + 120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{form.name} {style} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Run(form.name, style, clients, seconds, **found)

    def _coordinator(self, kind: str) -> str:
        if kind == "plain":
            return ""
        if kind not in self._coordinators:
            if kind == "txrpc":
                process: Child = CoordinatorProcess(self._folder)
                address = process.address  # type: ignore[attr-defined]
            else:
                address = f"127.0.0.1:{free_port()}"
                process = self._child(
                    "benchmarks.textbook", "textbook", ["--listen", address, "--log", str(self._folder / "log")]
                )
            self._enter(process)
            self._coordinators[kind] = address
            self._pids[f"{kind} coordinator"] = process.pid
        return self._coordinators[kind]

    def _services(self, kind: str, style: str) -> list[str]:
        if (kind, style) not in self._addresses:
            self._addresses[kind, style] = []
            for name, database in zip(BANKS, self._databases, strict=True):
                address = f"127.0.0.1:{free_port()}"
                arguments = ["--form", kind, "--style", style, "--name", name, "--listen", address]
                arguments += ["--database", database, "--coordinator", self._coordinator(kind)]
                service = self._child("benchmarks.services", f"{kind}-{style}-{name}", arguments)
                self._enter(service)
                self._addresses[kind, style].append(address)
                self._pids[f"{kind} {style} {name}"] = service.pid
        return self._addresses[kind, style]

    def _enter(self, process: Child) -> None:
        process.environment.pop("TXRPC_FAILPOINTS", None)  # what users do not have is not measured
        self._stack.enter_context(process)

    def _child(self, module: str, name: str, arguments: list[str]) -> Child:
        command = [sys.executable, "-m", module, *arguments]
        return Child(command, name=name, output=self._folder / f"{name}.log", ready="serving")
