"""The server's end of a connection: which it is, and ending it without ever hitting another one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

__all__ = ["Backend", "backend_pid", "hides_backends", "interrupt", "is_gone"]


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend by its process id, which it had at monotonic time *seen_s*.

    Process ids are used again, at once in a container that restarts: a backend that was started after *seen_s* is another one.
    """

    pid: int
    seen_s: float

    @property
    def query(self) -> str:
        """SQL for whether a row of pg_stat_activity is this backend; the clock at the server is compared with itself alone."""
        age_s = max(0.0, time.monotonic() - self.seen_s) * 0.9  # clocks do not run alike, and never that differently
        return f"pid = {int(self.pid)} AND backend_start <= clock_timestamp() - make_interval(secs => {age_s:.3f})"


def interrupt(connection: Connection, backend: Backend) -> None:
    """End *backend*, whatever it is doing: its transaction is rolled back and its locks are free.

    But not one that has committed and waits for a synchronous standby: that would end the wait and not the commit (rule 22).
    """
    connection.exec_driver_sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {backend.query} "  # noqa: S608 - numbers only
        "AND wait_event IS DISTINCT FROM 'SyncRep'"
    )


def is_gone(connection: Connection, backend: Backend) -> bool:
    """Return whether *backend* has gone."""
    return not connection.exec_driver_sql(f"SELECT count(*) FROM pg_stat_activity WHERE {backend.query}").scalar()  # noqa: S608


def hides_backends(connection: Connection) -> bool:
    """Return whether something between here and the server (a pooler) tells clients other process ids than the server has."""
    return bool(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar() != backend_pid(connection))


def backend_pid(connection: Connection, ask: bool = False) -> int:
    """The process id of the server's end of *connection*; costs no round trip, unless the server must be *asked*."""
    driver: Any = connection.connection.driver_connection
    for attribute in () if ask else ("get_server_pid", "get_backend_pid"):  # asyncpg, psycopg2
        if hasattr(driver, attribute):
            pid: int = getattr(driver, attribute)()
            return pid
    told = 0 if ask else int(getattr(getattr(driver, "info", None), "backend_pid", 0))
    return told or int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar() or 0)
