"""What any process can do about a branch in MySQL or MariaDB that another one has begun: finish it, or ask how it ended.

See `txrpc.sql.mysql` for how to think of it.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import ResourceUnavailable
from txrpc.ids import Gid
from txrpc.sql.mysql_errors import NO_SUCH_XA, code_of, is_locked
from txrpc.sql.mysql_preflight import FORMAT, MARKERS, one, recover

__all__ = [
    "CLOSING_S",
    "branch_name",
    "clean",
    "finish",
    "finish_here",
    "free",
    "hang_up",
    "in_doubt",
    "one_phase_result",
    "prepare_table",
    "take_out",
]

_KEPT_MS: Final = 7 * 24 * 3_600_000
_FORGET_AT_ONCE: Final = 1_000
_TRIES: Final = 20
CLOSING_S: Final = 0.1
"""Longer than MariaDB takes, as a rule, from the moment in which it would agree to end a branch to the one in which it would."""
_LOOKS: Final = 20
_TOKEN: Final = re.compile(r"xa-([0-9a-f]{28})")


def branch_name(number: str) -> str:
    """A branch in SQL, where it is no parameter; a hexadecimal literal has nothing to escape."""
    return f"X'{number}',X'01',{FORMAT}"


def take_out(connection: Connection) -> Any:
    """Take *connection*, on which a branch is prepared, out of its pool; return the driver's own."""
    connection.detach()
    return connection.connection.dbapi_connection


def finish_here(connection: Connection, commit: bool, token: str) -> None:
    """XA COMMIT or XA ROLLBACK on the connection that has prepared the branch; raises if it is not known to have ended so."""
    connection.exec_driver_sql(f"XA {'COMMIT' if commit else 'ROLLBACK'} {branch_name(token.removeprefix('xa-'))}")


def free(connection: Any, driver: Any) -> Any:
    """Let go of a *connection* of either half, whose branch is finished, and return what `take_out` has, as good as new.

    None if it is of no use any more: then it is closed.
    """
    sync = getattr(connection, "sync_connection", connection)
    dialect, options = sync.dialect, sync.get_execution_options()
    with suppress(Exception):
        sync.invalidate()
        if dialect.do_ping(driver):
            if "isolation_level" in options:  # which the pool would have reset
                dialect.reset_isolation_level(driver)
            return driver
    with suppress(Exception):
        dialect.do_close(driver)
    return None


def hang_up(connection: Connection, driver: Any) -> None:
    """Close what `take_out` has returned."""
    with suppress(Exception):
        connection.invalidate()  # or SQLAlchemy would say ROLLBACK, which is refused while the branch is prepared
    connection.dialect.do_close(driver)


def finish(connection: Connection, commit: bool, gid: Gid, token: str, markers: str = "") -> FinishResult:
    """XA COMMIT or XA ROLLBACK, on a connection in AUTOCOMMIT.  Idempotent; raises if it must be tried again."""
    found = _TOKEN.fullmatch(token)
    number = found[1] if found is not None else _number(connection, gid, markers)
    if number is None:
        return FinishResult.NOT_HERE
    for _ in range(_TRIES):
        try:
            connection.exec_driver_sql(f"XA {'COMMIT' if commit else 'ROLLBACK'} {branch_name(number)}")
        except DBAPIError as error:
            if code_of(error) != NO_SUCH_XA:
                raise
        else:
            # MariaDB says so, too, while it closes the connection of the branch, forgets the name, and leaves the branch as it is
            # (seen with 10.11: 1 in 2,500, on a busy machine).
            proof = _who_ended_it(connection, commit, number, markers)
            return proof if proof in (FinishResult.LOST, FinishResult.HEURISTIC) else FinishResult.DONE
        if number not in recover(connection):
            return _who_ended_it(connection, commit, number, markers)
        # It is prepared, and its own connection is still open: it is being closed, or its process was stopped before that.
        row = _dirty(connection, f"branch = X'{number}'", markers)
        if row is not None:
            with suppress(DBAPIError):  # gone meanwhile
                connection.exec_driver_sql(f"KILL {int(row[2])}")
        connection.exec_driver_sql(f"DO SLEEP({CLOSING_S})")
    raise ResourceUnavailable(f"branch {gid} is prepared, and the connection that did so cannot be ended")


def _number(connection: Connection, gid: Gid, markers: str) -> str | None:
    row = _dirty(connection, f"gid = '{gid}'", markers)
    return None if row is None else bytes(row[0]).hex()


def _dirty(connection: Connection, where: str, table: str) -> Any:
    """Return branch, identifier and session of a row, whether it has been committed or not."""
    connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
    return one(connection, f"SELECT branch, gid, session FROM {table or MARKERS} WHERE {where}")  # noqa: S608


def _who_ended_it(connection: Connection, commit: bool, number: str, markers: str) -> FinishResult:
    """There is no such prepared branch (any more): did it end as it should have (rule 16)?"""
    for _ in range(_LOOKS):  # others who ask hold its row for a moment
        committed = _committed(connection, number, markers)
        if committed is not None:
            break
        connection.exec_driver_sql("DO SLEEP(0.01)")
    else:
        raise ResourceUnavailable(
            f"branch {number} is being finished at this moment; or it has not ended, though the server has said so, and cannot be "
            "found by its name: then it keeps its locks until the server is restarted, which finds it again"
        )
    if committed:
        return FinishResult.ALREADY if commit else FinishResult.HEURISTIC
    if not _is_remembered(number):
        return FinishResult.NOT_HERE
    # It had been prepared.  Rolled back by hand and lost in a fail-over look alike.
    return FinishResult.LOST if commit else FinishResult.ALREADY


def _committed(connection: Connection, number: str, markers: str) -> bool | None:
    """Return whether the branch has committed; None while its row is there and not committed."""
    query = f"SELECT 1 FROM {markers or MARKERS} WHERE branch = X'{number}' FOR UPDATE NOWAIT"  # noqa: S608
    try:
        return one(connection, query) is not None
    except DBAPIError as error:
        if is_locked(error):
            return None
        raise


def _is_remembered(number: str) -> bool:
    return time.time() * 1000 - int(number[:12], 16) < _KEPT_MS / 2


def one_phase_result(connection: Connection, token: str, markers: str = "") -> Outcome | None:
    """Return how the branch *token* ended; None while it is in progress; UNKNOWN if this database cannot tell."""
    found = _TOKEN.fullmatch(token)
    if found is None:
        return Outcome.UNKNOWN
    committed = _committed(connection, found[1], markers)
    if committed is None:
        return None
    if committed:
        return Outcome.COMMITTED
    return Outcome.ABORTED if _is_remembered(found[1]) else Outcome.UNKNOWN


def in_doubt(connection: Connection, group: str, resource: str) -> list[tuple[Gid, int]]:
    """The prepared branches of *group* and *resource* in this database, and how many milliseconds old each is."""
    found = []
    for number in recover(connection):
        row = _dirty(connection, f"branch = X'{number}'", "")
        text = row[1].decode() if row is not None and isinstance(row[1], bytes) else row and row[1]
        gid = Gid.parse(text) if text else None
        if gid is not None and gid.group == group and gid.resource == resource:
            found.append((gid, max(0, int(time.time() * 1000) - int(number[:12], 16))))
    return found


def prepare_table(connection: Connection, _resource: str) -> str:
    """The qualified name of the table of markers, which `preflight` has made."""
    database = one(connection, "SELECT DATABASE()")[0]
    return f"`{str(database).replace('`', '``')}`.{MARKERS}"


def clean(connection: Connection, table: str) -> None:
    """Delete rows that no process will ask for any more."""
    old = int(time.time() * 1000 - _KEPT_MS).to_bytes(6, "big").hex()
    # Looked for first: the row of a branch that is still prepared is not seen, and would be waited for.
    query = f"SELECT branch FROM {table} WHERE branch < X'{old}' LIMIT {_FORGET_AT_ONCE}"  # noqa: S608
    over = ", ".join(f"X'{bytes(branch).hex()}'" for (branch,) in connection.exec_driver_sql(query))
    if over:
        with suppress(DBAPIError):  # another process is at it
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE branch IN ({over})")  # noqa: S608
