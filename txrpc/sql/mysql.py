"""What MySQL and MariaDB need: the verbs of a branch as functions of a synchronous `Connection`.

How to think of it
    A branch is a transaction of XA's.  ``XA START`` is the first that is said on its connection, before the coordinator's
    identifier of the branch is final; so it gets a *number* of its own, which begins with the time when it was made.

    At its end the branch writes a row under that number, the *marker*, with the coordinator's identifier.  The row is there if and
    only if the branch has committed, which nothing else in these databases tells.  And while it is prepared, ``XA RECOVER`` has the
    number, and the row, which a dirty read sees, what the coordinator calls it.  As the branch has always written something, none
    is prepared that wrote nothing, which would be lost with its connection.

    While the connection lives on which a branch was prepared, no other one can finish it.  And while MariaDB closes it, there is a
    moment in which it agrees to end the branch for another one, and does not (`trans_xa_detach` in its sql/xa.cc comes before
    `innobase_close_connection`).  So the connection leaves its pool, and the branch is finished on it (`txrpc.sql.kept`).  Another
    process ends that connection first, whose number is in the row; and what the server says then counts only if the row agrees.
    MySQL lets go of the branch when it is prepared, unless ``xa_detach_on_prepare`` is off.

    Inside ``XA START`` the server refuses whatever else would end the transaction: COMMIT, ROLLBACK, and every statement that
    commits as a side effect.  ``XA END`` with the number proves at the end that this is the transaction which worked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.ids import Gid
from txrpc.sql.markers import Marker
from txrpc.sql.mysql_errors import OUTSIDE, classify, code_of, connection_lost, no_connection, refused, sentence
from txrpc.sql.mysql_finishing import branch_name, clean, finish, in_doubt, one_phase_result, prepare_table
from txrpc.sql.mysql_preflight import preflight
from txrpc.sql.mysql_register import open_register
from txrpc.sql.mysql_sessions import Session, hides_backends, interrupt, is_gone, session_of

__all__ = [
    "ALWAYS_MARKS",
    "FINISHES_WHERE_PREPARED",
    "ROLLBACK_IS_REFUSED",
    "abandon",
    "begin",
    "bound_connecting",
    "check_pooler",
    "classify",
    "clean",
    "commit",
    "ends_the_transaction",
    "finish",
    "hides_backends",
    "in_doubt",
    "in_transaction",
    "interrupt",
    "is_bound",
    "is_gone",
    "new_marker",
    "no_connection",
    "one_phase_result",
    "open_register",
    "preflight",
    "prepare",
    "prepare_table",
    "refused",
    "sentence",
    "set_read_only",
    "set_writable",
    "speaks_behind_the_transaction",
    "starting",
    "token_to_end",
    "undo",
    "writes",
]

ALWAYS_MARKS: Final = True
"""Nothing else tells how a transaction has ended."""

FINISHES_WHERE_PREPARED: Final = True
"""On the connection that has prepared a branch, if it `is_bound`: see above."""

ROLLBACK_IS_REFUSED: Final = True
"""In a transaction of XA's, which `undo` must end before SQLAlchemy, or a pool, says ROLLBACK."""

_INFO: Final = "txrpc-xa"
_COMMENTS: Final = r"(?:\s|/\*.*?\*/|--[^\n]*\n|#[^\n]*\n)*"
_ENDS: Final = re.compile(
    _COMMENTS
    + r"(commit|rollback(?!\s+(?:work\s+)?to\b)|begin(?!\s+not\s+atomic\b)|start\s+transaction|xa|(?:un)?lock\s+tables?)\b",
    re.IGNORECASE | re.DOTALL,
)
_READS: Final = re.compile(
    _COMMENTS + r"\(?\s*(select|show|explain|describe|desc|values|table|set|savepoint|release|rollback)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Xa:
    """A branch that is open on a connection: its *number* in hexadecimal digits."""

    number: str
    read_only: bool

    @property
    def name(self) -> str:
        return branch_name(self.number)


# ------------------------------------------------------------------------------------------------------------ verbs


def begin(connection: Connection, read_only: bool, asks: bool, _decides: bool) -> Session:
    """Begin a branch; *asks*: the driver does not know the number of its session."""
    number = int(time.time() * 1000).to_bytes(6, "big").hex() + os.urandom(8).hex()
    xa = _Xa(number, read_only)
    try:
        _start(connection, xa)
    except DBAPIError as error:
        if code_of(error) != OUTSIDE:
            raise
        connection.exec_driver_sql("ROLLBACK")  # a program may ask something whenever it is given a connection
        _start(connection, xa)
    connection.info[_INFO] = xa
    return Session(session_of(connection, asks), time.monotonic())


def _start(connection: Connection, xa: _Xa) -> None:
    if xa.read_only:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    connection.exec_driver_sql(f"XA START {xa.name}")


def set_read_only(_connection: Connection) -> None:
    """The server has no such thing for a part of a transaction: what would write is refused here, see `writes`."""


def set_writable(_connection: Connection) -> None:
    """End `set_read_only`."""


def abandon(_connection: Connection) -> None:
    """A connection is about to be closed, and the server will roll back what is open on it."""


def undo(connection: Connection) -> None:
    """Roll back what is open on *connection*.

    On the driver's own cursor: SQLAlchemy's transaction is about to end, perhaps because of an error.
    """
    xa: _Xa | None = connection.info.pop(_INFO, None)
    if xa is None:
        return
    try:
        with closing(connection.connection.cursor()) as cursor:
            with suppress(Exception):  # a deadlock has ended it already
                cursor.execute(f"XA END {xa.name}")
            cursor.execute(f"XA ROLLBACK {xa.name}")
    except Exception:
        connection.invalidate()


def new_marker(table: str) -> Marker:
    """Return the marker of the branch that is open: its row has the branch's number."""
    return Marker(table, "")


def _own(connection: Connection) -> _Xa:
    xa: _Xa | None = connection.info.get(_INFO)
    if xa is None:
        raise ResourceUnavailable("the connection of a branch was replaced by another one, and its work was lost")
    return xa


def _mark(connection: Connection, xa: _Xa, gid: str, pid: int, table: str) -> None:
    """Write the row of the branch, in the session *pid* alone: in another one it could be committed without the work."""
    statement = (
        f"INSERT INTO {table} (branch, gid, session) "  # noqa: S608 - ours, and checked
        f"SELECT X'{xa.number}', '{gid}', CONNECTION_ID() FROM DUAL WHERE CONNECTION_ID() = {int(pid)}"
    )
    if connection.exec_driver_sql(statement).rowcount != 1:
        raise ResourceUnavailable(
            f"the connection of a branch was moved from session {pid} to another one, and its work was lost: a proxy between here "
            "and the database must keep a transaction's connection"
        )


def token_to_end(connection: Connection, pid: int, _always: bool, marker: Marker | None = None) -> str:
    """The number of the branch, whose row is written here; "" if the branch may only read.

    Raises `ResourceUnavailable` if the transaction is not the one that worked.
    """
    xa = _own(connection)
    if xa.read_only:
        return ""
    assert marker is not None
    _mark(connection, xa, "", pid, marker.table)
    return f"xa-{xa.number}"


def prepare(
    connection: Connection, gid: Gid, pid: int, _always: bool, marker: Marker | None = None, early: bool = False
) -> str | None:
    """Prepare the branch under *gid* and return its token; "" if it may only read, and is not prepared.

    *early*: the work elsewhere is not done.  None, and nothing is done: what was read is to stay as it was.
    """
    xa = _own(connection)
    if xa.read_only:
        return None if early else ""
    assert marker is not None
    _mark(connection, xa, str(gid), pid, marker.table)
    connection.exec_driver_sql(f"XA END {xa.name}")
    connection.exec_driver_sql(f"XA PREPARE {xa.name}")
    connection.info.pop(_INFO)  # from here on nothing here may undo it
    return f"xa-{xa.number}"


def is_bound(connection: Connection) -> bool:
    """Return whether the branch that was just prepared on *connection* keeps it from other work."""
    if getattr(connection.dialect, "is_mariadb", False):
        return True
    try:
        connection.exec_driver_sql("ROLLBACK")
    except Exception:  # or it is broken: the branch is prepared all the same
        return True
    return False


def commit(_transaction: Any, connection: Connection) -> bool:
    """Commit the branch at once; as durable as the server is configured to be."""
    xa = _own(connection)
    connection.exec_driver_sql(f"XA END {xa.name}")
    connection.exec_driver_sql(f"XA COMMIT {xa.name} ONE PHASE")
    connection.info.pop(_INFO)
    return True


# --------------------------------------------------------------------------------------------------------- statements


def ends_the_transaction(statement: str) -> str:
    """The verb, if *statement* would end the transaction, which the server refuses; "" otherwise."""
    found = _ENDS.match(statement)
    return found[1].upper() if found else ""


def writes(statement: str) -> bool:
    """Return whether *statement* may write, as far as its beginning tells: a function that it calls may, too."""
    return _READS.match(statement) is None


def speaks_behind_the_transaction(_statement: str) -> bool:
    """There is nothing like NOTIFY."""
    return False


def in_transaction(_connection: Connection) -> bool:
    """The server lets none but XA end one of XA's, and XA END proves at its end that it is the same."""
    return True


# -------------------------------------------------------------------------------------------------- the server's end


def bound_connecting(_driver: str, arguments: dict[str, Any], seconds: int) -> None:
    """Bound one attempt to connect in order to finish or to ask, unless its *arguments* do."""
    arguments.setdefault("connect_timeout", seconds)


def check_pooler(_connection: Connection, _engine: Engine, _resource: str) -> None:
    """The drivers make no prepared statements."""


@contextmanager
def starting(resource: str) -> Iterator[None]:
    """Return what the database says to the first transaction as an error of ours."""
    try:
        yield
    except DBAPIError as error:
        text = f"the database of resource {resource!r} cannot be used: {sentence(error)}"
        if connection_lost(error):
            raise ResourceUnavailable(text) from error
        raise ConfigurationError(text) from error
