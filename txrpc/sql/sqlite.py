"""What SQLite needs: the verbs of a branch as functions of a synchronous `Connection`, and its errors.

How to think of it
    SQLite cannot prepare.  A branch in it commits in one phase, alone in its transaction; or it decides the transaction
    (`txrpc.sql.sqlite_register`), and the branches elsewhere follow.

    One program writes at a time.  A branch takes the right to write when it begins (``BEGIN IMMEDIATE``), because one that read
    first could find later that it must not write any more; one that may only read takes none, and the file refuses its writes.

    There is no server whose process id could prove that the transaction at the end is the one that worked, so the branch sets a
    savepoint at its beginning, and releases it at its end: in any other transaction there is none of that name.  Nor does SQLite
    number its transactions; so the branch writes a row of its own, the *marker*.  A question how it has ended takes the right to
    write first: by then the branch has ended, and its row is there if it has committed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import AbortCode, ConfigurationError, Reason, ResourceUnavailable
from txrpc.ids import Gid
from txrpc.sql.markers import Marker
from txrpc.sql.sqlite_file import (
    DURABLY,
    MARKERS,
    driver_of,
    in_writing,
    incarnation,
    is_busy,
    name_of,
    preflight,
    prove,
    set_proof,
)
from txrpc.sql.sqlite_register import open_register

__all__ = [
    "ALWAYS_MARKS",
    "FINISHES_WHERE_PREPARED",
    "ROLLBACK_IS_REFUSED",
    "abandon",
    "begin",
    "bound_connecting",
    "classify",
    "clean",
    "commit",
    "ends_the_transaction",
    "finish",
    "hides_backends",
    "in_doubt",
    "in_transaction",
    "interrupt",
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
    "writes",
]

ALWAYS_MARKS: Final = True
"""Nothing else tells how a transaction has ended."""

FINISHES_WHERE_PREPARED: Final = False
ROLLBACK_IS_REFUSED: Final = False
"""ROLLBACK undoes whatever is open."""

_KEPT_MS: Final = 7 * 24 * 3_600_000
_FORGET_AT_ONCE: Final = 1_000
_CANNOT: Final = (
    "SQLite cannot prepare: let this database decide the transaction (decides=True and transaction(decide_in=...)), use it in "
    "transactions that use nothing else, or only read in it (read_only=True)"
)
_TOKEN: Final = re.compile(r"file-([0-9a-f]{1,16})-([0-9a-f]{12})([0-9a-f]{16})")
_ENDS: Final = re.compile(
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*(commit|end|rollback(?!\s+(?:transaction\s+)?to\b))\b", re.IGNORECASE | re.DOTALL
)


class _CannotPrepareError(Exception):
    """The branch wrote, and others take part."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A connection of SQLite's own, as it was when a branch began: what can be interrupted."""

    driver: Any
    pid: int = 0


# ------------------------------------------------------------------------------------------------------------ verbs


def begin(connection: Connection, read_only: bool, _asks: bool, decides: bool) -> OpenFile:
    """Begin a branch; *decides*: its COMMIT may be a decision, which no crash may undo."""
    driver = driver_of(connection)
    if not driver.in_transaction:  # a program may have SQLAlchemy's event "begin" say BEGIN
        if decides:
            connection.exec_driver_sql(DURABLY)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
    set_proof(connection)
    if read_only:
        set_read_only(connection)
    return OpenFile(driver)


def set_read_only(connection: Connection) -> None:
    """From now on the connection refuses what would write."""
    connection.exec_driver_sql("PRAGMA query_only = ON")


def set_writable(connection: Connection) -> None:
    """End `set_read_only`."""
    connection.exec_driver_sql("PRAGMA query_only = OFF")


def abandon(connection: Connection) -> None:
    """A connection is about to be closed: roll back, because SQLite lets it live on for as long as a cursor of it does."""
    connection.connection.rollback()


def new_marker(table: str) -> Marker:
    """Return a marker whose number says when it was made."""
    return Marker(table, int(time.time() * 1000).to_bytes(6, "big").hex() + os.urandom(8).hex())


def token_to_end(connection: Connection, _pid: int, _always: bool, marker: Marker | None = None) -> str:
    """The file and the *marker* that is written here; "" if the branch may only read.

    Raises `ResourceUnavailable` if the transaction is not the one that worked.
    """
    prove(connection)
    if connection.exec_driver_sql("PRAGMA query_only").scalar():
        return ""
    assert marker is not None
    connection.exec_driver_sql(f"INSERT INTO {marker.table} (branch) VALUES (?)", (bytes.fromhex(marker.number),))  # noqa: S608
    return f"file-{incarnation(connection)}-{marker.number}"


def prepare(
    connection: Connection, _gid: Gid, _pid: int, _always: bool, _marker: Marker | None = None, early: bool = False
) -> str | None:
    """Return "" if the branch may only read, so that there is nothing to prepare; otherwise it cannot be done.

    *early*: the work elsewhere is not done.  None: what was read is to stay as it was.
    """
    if not connection.exec_driver_sql("PRAGMA query_only").scalar():
        raise _CannotPrepareError(_CANNOT)
    if early:
        return None
    prove(connection)
    return ""


def commit(transaction: Any, _connection: Connection) -> bool:
    """COMMIT; as durable as the file is configured to be."""
    transaction.commit()
    return True


def finish(_connection: Connection, _commit: bool, _gid: Gid, _token: str, _markers: str = "") -> FinishResult:
    """Nothing is ever prepared here."""
    return FinishResult.NOT_HERE


def in_doubt(_connection: Connection, _group: str, _resource: str) -> list[tuple[Gid, int]]:
    """Nothing is ever prepared here."""
    return []


def one_phase_result(connection: Connection, token: str, markers: str = "") -> Outcome | None:
    """Return how the branch *token* ended; None while others write; UNKNOWN if this file cannot tell."""
    found = _TOKEN.fullmatch(token)
    if found is None:
        return Outcome.UNKNOWN
    file, made, rest = found.groups()
    try:
        with in_writing(connection):  # the branch had that right until its end
            row = connection.exec_driver_sql(
                f"SELECT 1 FROM {markers} WHERE branch = ?",  # noqa: S608 - ours
                (bytes.fromhex(made + rest),),
            ).scalar()
    except DBAPIError as error:
        if is_busy(error):
            return None
        raise
    if row is not None:
        return Outcome.COMMITTED
    # In a file that was put in the place of that one, or after its row may have been forgotten, its absence proves nothing.
    is_known = file == incarnation(connection) and time.time() * 1000 - int(made, 16) < _KEPT_MS / 2
    return Outcome.ABORTED if is_known else Outcome.UNKNOWN


def prepare_table(_connection: Connection, _resource: str) -> str:
    """The name of the table of markers, which `preflight` has made."""
    return MARKERS


def clean(connection: Connection, table: str) -> None:
    """Delete rows that no process will ask for any more, unless another one writes just now."""
    old = int(time.time() * 1000 - _KEPT_MS).to_bytes(6, "big")
    over = f"SELECT branch FROM {table} WHERE branch < ? LIMIT {_FORGET_AT_ONCE}"  # noqa: S608
    try:
        connection.exec_driver_sql(f"DELETE FROM {table} WHERE branch IN ({over})", (old,))  # noqa: S608
    except DBAPIError as error:
        if not is_busy(error):
            raise


def ends_the_transaction(statement: str) -> str:
    """The verb, if *statement* ends a transaction; "" otherwise.  Savepoints may be rolled back to; scripts are not executed."""
    found = _ENDS.match(statement)
    return found[1].upper() if found else ""


def speaks_behind_the_transaction(_statement: str) -> bool:
    """SQLite has nothing like NOTIFY."""
    return False


def writes(_statement: str) -> bool:
    """SQLite itself refuses what would write where it may only be read."""
    return False


def in_transaction(connection: Connection) -> bool:
    """Whether a transaction is open on *connection*."""
    return bool(driver_of(connection).in_transaction)


# ------------------------------------------------------------------------------------------------- there is no server


def bound_connecting(_driver: str, arguments: dict[str, Any], seconds: int) -> None:
    """Bound the wait for another program that writes, on a connection to finish or to ask, unless its *arguments* do.

    With ``autocommit=False`` (Python 3.12) the driver would have a transaction open all the time.
    """
    arguments.setdefault("timeout", seconds)
    arguments.pop("autocommit", None)


def hides_backends(_connection: Connection) -> bool:
    """There is no pooler."""
    return False


def interrupt(_connection: Connection, file: OpenFile) -> None:
    """Break off what is being executed; a statement that writes takes its transaction with it."""
    file.driver.interrupt()


def is_gone(_connection: Connection, _file: OpenFile) -> bool:
    """A connection that is closed leaves nothing behind."""
    return True


# ------------------------------------------------------------------------------------------------------------ errors


_REFUSALS: Final = frozenset({"SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CONSTRAINT", "SQLITE_READONLY"})
"""After these a COMMIT has not been done.  (After an error of the disk only the marker tells.)"""
_UNAVAILABLE: Final = frozenset(
    {"SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL", "SQLITE_NOMEM", "SQLITE_READONLY"}
)


def _primary(error: BaseException) -> str:
    """``SQLITE_CONSTRAINT`` of ``SQLITE_CONSTRAINT_UNIQUE``."""
    return "_".join(name_of(error).split("_")[:2])


def refused(error: BaseException) -> bool:
    """Return whether SQLite has said no, so that what was asked for has certainly not been done."""
    return _primary(error) in _REFUSALS


def no_connection(error: BaseException) -> bool:
    """Return whether the file could not be opened."""
    return _primary(error) == "SQLITE_CANTOPEN"


def classify(error: BaseException) -> Reason | None:
    """Return why *error* ends the branch, or None if it did not come from the database."""
    if isinstance(error, ResourceUnavailable):
        return Reason(AbortCode.RESOURCE_UNAVAILABLE, str(error))
    if isinstance(error, _CannotPrepareError):
        return Reason(AbortCode.CANNOT_PREPARE, str(error))
    if not isinstance(error, DBAPIError):
        return None
    return Reason(_code_of(error), sentence(error))


def _code_of(error: DBAPIError) -> AbortCode:
    if name_of(error) == "SQLITE_BUSY_SNAPSHOT":
        return AbortCode.SERIALIZATION_FAILURE
    if is_busy(error):
        return AbortCode.LOCK_TIMEOUT
    return AbortCode.RESOURCE_UNAVAILABLE if _primary(error) in _UNAVAILABLE else AbortCode.STATEMENT_FAILED


def sentence(error: BaseException) -> str:
    """Return what SQLite said, without any data in it: which columns a constraint is about is none, a statement's text may be."""
    origin: Any = getattr(error, "orig", None) or error
    name = name_of(error)
    if not name:
        return type(origin).__name__
    return name if name == "SQLITE_ERROR" else f"{origin} ({name})"


@contextmanager
def starting(resource: str) -> Iterator[None]:
    """Return what the file says to the first transaction as an error of ours."""
    try:
        yield
    except DBAPIError as error:
        text = f"the database file of resource {resource!r} cannot be used: {sentence(error)}"
        if is_busy(error):
            raise ResourceUnavailable(text) from error
        raise ConfigurationError(text) from error
