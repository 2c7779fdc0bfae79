"""What processes and databases spend between two moments.

Processor time is from /proc, forced writes are from PostgreSQL's own counters, messages, batches and
decisions from the coordinator's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psycopg
from sqlalchemy.engine import make_url

from txrpc.cli.overview import ask
from txrpc.cli.reach import Reach

__all__ = ["Watch"]

_STATEMENT = re.compile(rb"LOG:  (?:statement|execute [^:]+): ")
_TICKS = os.sysconf("SC_CLK_TCK")


def _cpu_s(pid: int, with_children: bool) -> float:
    """Processor seconds of a process; *with_children*: and of its children, those that have ended too."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    ticks = sum(map(int, fields[11:15] if with_children else fields[11:13]))
    spent_s = ticks / _TICKS
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split() if with_children else ():
        with suppress(FileNotFoundError):  # it has ended meanwhile
            spent_s += _cpu_s(int(child), False)
    return spent_s


class Watch:
    """*processes*: "NAME=PID"; a name that begins with "postgres" stands for a server and its backends.

    *coordinator*: the address of one, or "".  *logs*: those of database servers that write all statements into them.
    """

    COUNTED: Final = ("cpu_s", "wal_syncs", "messages", "batches", "decisions", "log_writes", "statements")

    def __init__(
        self, processes: Sequence[str], databases: Sequence[str], coordinator: str, logs: Sequence[Path] = ()
    ) -> None:
        self._pids = {name: int(pid) for name, _, pid in (each.partition("=") for each in processes)}
        self._urls = [
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False) for url in databases
        ]
        self.cpu_s: dict[str, float] = {}
        self.wal_syncs = self.messages = self.batches = self.decisions = self.log_writes = 0
        self.statements: list[int] = []
        self._coordinator = coordinator
        self._logs = logs
        self._read: list[int] = []

    def begin(self) -> None:
        """Note what has been spent so far."""
        self._count(-1)
        self.wal_syncs, self.cpu_s = -self._syncs(), {name: -spent for name, spent in self._spent().items()}
        self._read = [log.stat().st_size for log in self._logs]

    def end(self) -> None:
        """Set the attributes to what has been spent since `begin`."""
        read = zip(self._logs, self._read, strict=True)
        self.statements = [len(_STATEMENT.findall(log.read_bytes()[start:])) for log, start in read]
        self.cpu_s = {name: spent + self.cpu_s[name] for name, spent in self._spent().items()}
        self.wal_syncs += self._syncs()
        self._count(1)

    def _count(self, sign: int) -> None:
        if self._coordinator:
            reply = ask(Reach(self._coordinator), 1, 10)
            self.messages += sign * sum(reply.messages.values())
            self.batches += sign * sum(reply.batches.values())
            self.decisions += sign * reply.log_decisions
            self.log_writes += sign * reply.log_batches

    def _spent(self) -> dict[str, float]:
        return {name: _cpu_s(pid, name.startswith("postgres")) for name, pid in self._pids.items()}

    def _syncs(self) -> int:
        total = 0
        for url in self._urls:
            with psycopg.connect(url, autocommit=True) as connection:
                version = connection.info.server_version
                if version < 140000:
                    continue  # it does not count them
                query = (
                    b"SELECT wal_sync FROM pg_stat_wal"
                    if version < 180000
                    else b"SELECT sum(fsyncs)::bigint FROM pg_stat_io WHERE object = 'wal'"
                )
                row = connection.execute(query).fetchone()
                total += int(row[0]) if row else 0
        return total
