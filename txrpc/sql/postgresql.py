"""What PostgreSQL needs: the verbs of two-phase commit as functions of a synchronous `Connection`, and its errors.

How to think of it
    The branch is an ordinary transaction that SQLAlchemy began.  ``PREPARE TRANSACTION`` takes it away from the connection;
    SQLAlchemy's own transaction is then rolled back, which by that time means nothing to the database, and the connection goes
    back to its pool.  SQLAlchemy's two-phase API is not used: closing its connection rolls a prepared branch back.

    ``pg_current_xact_id_if_assigned()`` tells whether a transaction wrote anything, with exceptions that `token_to_end` knows:
    read-only branches are not prepared.  The same identifier is the *token* with which ``pg_xact_status`` tells, after any
    crash, how the transaction ended.

    A transaction in which a statement failed answers PREPARE with ROLLBACK and no error; asking for the token first makes that
    an error.

Identifiers go into SQL text as literals, because these statements take no parameters; `txrpc.ids.check_name` leaves nothing to
escape in them.
"""

from __future__ import annotations

import logging
import os
import re
import time
from contextlib import closing, suppress
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.messages import FinishResult, Outcome
from txrpc._replication import watch_replication
from txrpc._sqlstate import connection_lost, refused, sqlstate
from txrpc.errors import ResourceUnavailable
from txrpc.ids import Gid
from txrpc.sql.backend import Backend, backend_pid, hides_backends, interrupt, is_gone
from txrpc.sql.markers import Marker, clean, holds, prepare_table
from txrpc.sql.pooling import check_pooler, starting
from txrpc.sql.postgresql_errors import classify, no_connection, sentence
from txrpc.sql.postgresql_preflight import current_token, preflight
from txrpc.sql.postgresql_register import open_register

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
    "connection_lost",
    "current_token",
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
    "sqlstate",
    "starting",
    "token_to_end",
    "writes",
]

logger = logging.getLogger("txrpc.sql")

_NOTIFY = re.compile(r"^\s*(?:listen|unlisten|notify)\b|\bpg_notify\s*\(", re.IGNORECASE)
_ENDS = re.compile(
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*"
    r"(commit|end|abort|rollback(?!\s+(?:(?:work|transaction)\s+)?to\b)|prepare\s+transaction)\b",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED = re.compile(
    r"""(?:\b[eE])'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|(\$\w*\$).*?\1|--[^\n]*|/\*.*?\*/""", re.DOTALL
)


# ------------------------------------------------------------------------------------------------------------ verbs


def bound_connecting(driver: str, arguments: dict[str, Any], seconds: int) -> None:
    """Bound one attempt of *driver* to connect in order to finish or to ask, unless its *arguments* do."""
    arguments.setdefault("timeout" if driver == "asyncpg" else "connect_timeout", seconds)


ALWAYS_MARKS: Final = False
"""The number of a transaction tells how it has ended."""

FINISHES_WHERE_PREPARED: Final = False
ROLLBACK_IS_REFUSED: Final = False
"""ROLLBACK undoes whatever is open."""


def begin(connection: Connection, read_only: bool, asks: bool, _decides: bool) -> Backend:
    """Begin a branch; *asks*: the driver does not know its backend."""
    if read_only:
        set_read_only(connection)
    return Backend(backend_pid(connection, asks), time.monotonic())


def set_read_only(connection: Connection) -> None:
    """Let the database refuse what would write, until the transaction ends, or the savepoint."""
    connection.exec_driver_sql("SET TRANSACTION READ ONLY")


def set_writable(_connection: Connection) -> None:
    """End `set_read_only`, which has ended with its savepoint or its transaction."""


def abandon(_connection: Connection) -> None:
    """A connection is about to be closed, and the server will roll back what is open on it."""


def new_marker(table: str) -> Marker:
    """Return a marker of its own."""
    return Marker(table, os.urandom(8).hex())


_TIMELINE: Final = "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
"""The history that this server is writing, in hexadecimal: promoting a standby and restoring a backup begin another one."""

_WORK: Final = (
    "SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid(), now() <> statement_timestamp(), "
    "EXISTS (SELECT FROM pg_foreign_server), left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), "
    "current_setting('transaction_isolation')"
)
"""What a vote rests on, in one round trip.  Outside a block a statement is its own transaction, so that its times are one."""

_TOKEN = re.compile(r"(\d{1,20})-([0-9A-F]{8})(?:-([0-9a-f]{16}))?")


def token_to_end(connection: Connection, pid: int, always: bool, marker: Marker | None = None) -> str:
    """The branch's transaction, the timeline that it is of, and its *marker*; "" if it is proven that it wrote nothing.

    No identifier is no proof by itself.  The connection may have been moved to another backend than *pid*, by a pooler or a
    proxy, whose transaction is not the branch's.  A foreign data wrapper writes elsewhere, and NOTIFY writes nowhere: where there
    are foreign servers, or if *always*, the transaction is given an identifier, so that PREPARE is executed, and says itself what
    it cannot prepare.

    Raises `ResourceUnavailable` if the transaction is not the one that worked.
    """
    return _token(_row(connection, _WORK), connection, pid, always, marker)


def _token(row: Any, connection: Connection, pid: int, always: bool, marker: Marker | None) -> str:
    number, backend, in_block, foreign, timeline, _isolation = row
    if backend != pid or not in_block:
        raise ResourceUnavailable(
            f"the connection of a branch was moved from backend {pid} to {backend}, and its work was lost: a pooler between here "
            "and PostgreSQL must keep a transaction's connection (pool_mode = session or transaction)"
        )
    if not number and (always or foreign):
        number = connection.exec_driver_sql("SELECT pg_current_xact_id()::text").scalar()
    if not number or marker is None:
        return f"{number}-{timeline}" if number else ""
    marker.write(connection)
    return f"{number}-{timeline}-{marker.number}"


def _row(connection: Connection, query: str) -> Any:
    """Return the one row of *query*, asked on the driver's own cursor, which takes a third of the time of SQLAlchemy's.

    What goes wrong is asked once more through SQLAlchemy, which knows what an error means for the connection.
    """
    with suppress(Exception), closing(connection.connection.cursor()) as cursor:
        cursor.execute(query)
        return cursor.fetchone()
    return connection.exec_driver_sql(query).one()


def prepare(
    connection: Connection, gid: Gid, pid: int, always: bool, marker: Marker | None = None, early: bool = False
) -> str | None:
    """Prepare the open transaction under *gid* and return its token; "" if it wrote nothing and there was nothing to prepare.

    *early*: the work elsewhere is not done.  None, and nothing is done, if it wrote nothing and its isolation level keeps what it
    has read as it was: a snapshot, or the predicate locks of a serializable transaction.
    For *pid*, *always*, *marker* and what is raised see `token_to_end`.
    """
    row = _row(connection, _WORK)
    token = _token(row, connection, pid, always, marker)
    if not token and early and row[-1] != "read committed":
        return None
    if token:
        with watch_replication(connection.connection.driver_connection) as cancelled:
            connection.exec_driver_sql(f"PREPARE TRANSACTION '{gid}'")
        if cancelled:
            raise ResourceUnavailable(cancelled[0])
    return token


def commit(transaction: Any, connection: Connection) -> bool:
    """COMMIT; whether it is as durable as it is configured to be (rule 22)."""
    with watch_replication(connection.connection.driver_connection) as cancelled:
        transaction.commit()
    return not cancelled


def finish(connection: Connection, commit: bool, gid: Gid, token: str, markers: str = "") -> FinishResult:
    """COMMIT PREPARED or ROLLBACK PREPARED, on a connection in AUTOCOMMIT.  Idempotent; raises if it must be tried again.

    *markers*: the table of marker rows, if there is one.
    """
    statement = f"{'COMMIT' if commit else 'ROLLBACK'} PREPARED '{gid}'"
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if sqlstate(error) == "42704":
            return _who_ended_it(connection, commit, gid, token, markers)
        if sqlstate(error) != "42501" or not _as_its_owner(connection, gid, statement):
            raise
    return FinishResult.DONE


def _as_its_owner(connection: Connection, gid: Gid, statement: str) -> bool:
    """Try again under the role that prepared *gid*, which a branch may have chosen with SET ROLE; False if that is our own."""
    query = f"SELECT quote_ident(owner) FROM pg_prepared_xacts WHERE gid = '{gid}' AND owner <> session_user"  # noqa: S608
    owner = connection.exec_driver_sql(query).scalar()
    if owner is None:
        return False
    try:
        connection.exec_driver_sql(f"SET ROLE {owner}")
        connection.exec_driver_sql(statement)
    finally:
        try:
            connection.exec_driver_sql("RESET ROLE")
        except DBAPIError:
            connection.invalidate()
    return True


def _who_ended_it(connection: Connection, commit: bool, gid: Gid, token: str, markers: str) -> FinishResult:
    """There is no such prepared transaction (any more): did it end as it should have (rule 16)?"""
    status = _status_of(connection, token, markers)
    if status == "in progress":
        # Not prepared and not ended: its PREPARE or its end is being executed at this very moment.
        raise ResourceUnavailable(f"transaction {token} of {gid.resource} is still at work in the database")
    if status in ("committed", "aborted"):
        return FinishResult.ALREADY if (status == "committed") == commit else FinishResult.HEURISTIC
    return FinishResult.LOST if status in (_AHEAD, _ELSEWHERE) else FinishResult.NOT_HERE


def one_phase_result(connection: Connection, token: str, markers: str = "") -> Outcome | None:
    """Return how the transaction *token* ended; None while it is in progress; UNKNOWN if this database cannot tell."""
    return _RESULTS.get(_status_of(connection, token, markers), Outcome.UNKNOWN)


_AHEAD: Final = "in the future"
_ELSEWHERE: Final = "on another timeline"


def _status_of(connection: Connection, token: str, markers: str) -> str:
    """Return what became of *token*: its marker row tells in any history, else the number in its own."""
    found = _TOKEN.fullmatch(token)
    status = _status_of_number(connection, token)
    if found is None or found[3] is None or not markers or status == "in progress":
        return status
    if holds(connection, markers, found[3]):
        return "committed"
    # Without its row, a committed transaction of that number is another one's: this is another history, whatever it is called.
    return status if status == "aborted" else _ELSEWHERE


def _status_of_number(connection: Connection, token: str) -> str:
    """Return what ``pg_xact_status`` says of *token*; "" if it has forgotten, or *token* is not one of PostgreSQL's.

    A number means something in its own history only: after a fail-over, or on a restored backup, it may be another transaction's.
    A number that this server has not come to proves that the server is older than its promise.
    """
    found = _TOKEN.fullmatch(token)
    if found is None or int(found[1]) >= 1 << 64:
        return ""
    number, timeline, _ = found.groups()
    try:
        present = connection.exec_driver_sql(_TIMELINE).scalar()
        if present != timeline:
            return _ELSEWHERE
        return connection.exec_driver_sql(f"SELECT pg_xact_status('{number}'::xid8)").scalar() or ""
    except DBAPIError as error:
        if sqlstate(error) == "22023":
            return _AHEAD
        raise


_RESULTS: Final[dict[str, Outcome | None]] = {
    "committed": Outcome.COMMITTED,
    "aborted": Outcome.ABORTED,
    "in progress": None,
}


def in_doubt(connection: Connection, group: str, resource: str) -> list[tuple[Gid, int]]:
    """The prepared transactions of *group* and *resource* in this database, and how many milliseconds old each is."""
    ours = " OR ".join(f"starts_with(gid, '{prefix}')" for prefix in Gid.prefixes(group))
    mine = f"database = current_database() AND ({ours})"
    age_ms = "(extract(epoch FROM clock_timestamp() - prepared) * 1000)::bigint"
    rows = connection.exec_driver_sql(f"SELECT gid, {age_ms} FROM pg_prepared_xacts WHERE {mine}")  # noqa: S608 - a checked name
    found = [(Gid.parse(text), age) for text, age in rows]
    return [(gid, max(0, age)) for gid, age in found if gid is not None and gid.resource == resource]


def speaks_behind_the_transaction(statement: str) -> bool:
    """Return whether *statement* is LISTEN, UNLISTEN or NOTIFY, as far as its text tells."""
    return _NOTIFY.search(statement) is not None


def ends_the_transaction(statement: str) -> str:
    """The verb, if *statement* begins as one that ends a transaction; "" otherwise.  (Savepoints may be rolled back to.)"""
    found = _ENDS.match(statement)
    if found is None and ";" in statement:
        # A script: what is in quotes, in a body, or in a comment is not executed as a statement of its own.
        bare = _QUOTED.sub(" ", statement)
        if "begin atomic" not in bare.lower():
            found = next(filter(None, map(_ENDS.match, bare.split(";")[1:])), None)
    return found[1].upper() if found else ""


def writes(_statement: str) -> bool:
    """The server itself refuses what would write where it may only be read."""
    return False


def in_transaction(connection: Connection) -> bool:
    """Whether a transaction is open at the server's end of *connection*, as far as its driver knows; costs no round trip."""
    driver: Any = connection.connection.driver_connection
    libpq = getattr(driver, "pgconn", None)
    if libpq is not None:  # psycopg, whose `info` is made anew each time
        return bool(libpq.transaction_status)  # 0 is idle
    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return bool(driver.is_in_transaction())
    info = getattr(driver, "info", None)
    return bool(getattr(info, "transaction_status", True))
