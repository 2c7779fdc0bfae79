"""The server's end of a connection to MySQL or MariaDB: which it is, and ending it without ever hitting another one."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc.sql.mysql_preflight import one

__all__ = ["Session", "hides_backends", "interrupt", "is_gone", "session_of"]


@dataclass(frozen=True, slots=True)
class Session:
    """The server's end of a connection by its number, which it had at monotonic time *seen_s*.

    A server counts from 1 each time it starts.
    """

    pid: int
    seen_s: float


def session_of(connection: Connection, asks: bool) -> int:
    """The number of the server's end of *connection*; costs no round trip, unless the server must be *asked*."""
    driver: Any = connection.connection.driver_connection
    if not asks and hasattr(driver, "thread_id"):
        return int(driver.thread_id())
    return int(one(connection, "SELECT CONNECTION_ID()")[0])


def hides_backends(connection: Connection) -> bool:
    """Return whether a proxy tells clients other numbers of sessions than the server has."""
    return session_of(connection, False) != session_of(connection, True)


def interrupt(connection: Connection, session: Session) -> None:
    """End *session*, whatever it is doing: its transaction is rolled back and its locks are free."""
    if not is_gone(connection, session):
        with suppress(DBAPIError):  # gone meanwhile
            connection.exec_driver_sql(f"KILL {int(session.pid)}")


def is_gone(connection: Connection, session: Session) -> bool:
    """Return whether *session* has gone: the server does not have it, or has been started since."""
    uptime_s = int(one(connection, "SHOW GLOBAL STATUS LIKE 'Uptime'")[1])
    if uptime_s + 2 < (time.monotonic() - session.seen_s) * 0.9:
        return True
    listed = f"SELECT 1 FROM information_schema.processlist WHERE id = {int(session.pid)}"  # noqa: S608
    return one(connection, listed) is None
