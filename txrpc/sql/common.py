"""What the synchronous and the asyncio resource manager share."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import QueuePool

from txrpc._protocol.messages import ResourceInfo
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, Reason, ResourceUnavailable
from txrpc.ids import RESOURCE_MAX, RegisterId, check_name
from txrpc.sql import mysql, postgresql, sqlite

__all__ = [
    "BranchWork",
    "Guard",
    "ServerEnd",
    "branch_of",
    "broken",
    "capacity_of",
    "check_engine",
    "check_options",
    "check_whole",
    "cutter",
    "dialect_of",
    "exhausted",
    "info_of",
    "interrupt",
    "lost",
    "patience_of",
    "side_engine",
    "work_of",
]

logger = logging.getLogger("txrpc.sql")

_DIALECTS: dict[str, ModuleType] = {"postgresql": postgresql, "mysql": mysql, "mariadb": mysql, "sqlite": sqlite}

CONNECT_TIMEOUT_S = 10
"""For one attempt to connect to finish a branch, or to ask; the drivers' own are a minute and more."""

_INFO = "txrpc"


@dataclass(slots=True)
class Tries:
    """How often something was tried, and how often that failed."""

    made: int = 0
    failed: int = 0


class ServerEnd(Protocol):
    """What a branch's work is broken off at: a backend of PostgreSQL's, or an open file of SQLite's."""

    @property
    def pid(self) -> int:
        """The process that does the work, or 0 if it is this one."""


class BranchWork:
    """The work of one branch: a connection pinned to it, with an open transaction."""

    __slots__ = (
        "backend",
        "began",
        "connection",
        "doom",
        "given_back",
        "interrupted",
        "leave",
        "left_behind",
        "lock",
        "notifies",
        "ours",
        "read_only",
        "terminating",
        "token",
        "transaction",
    )

    def __init__(self, connection: Any, leave: Callable[[], Any]) -> None:
        self.connection = connection
        self.leave = leave
        """Gives back its place among those that may have a connection."""
        self.transaction: Any = None
        self.read_only = False
        """Whether the server refuses what would write, for as long as the branch is open."""
        self.backend: ServerEnd | None = None
        self.began = False
        """Whether a statement has been executed, so that the server has a transaction."""
        self.ours = False
        """Set while txrpc itself ends the transaction."""
        self.lock = threading.Lock()
        """Guards the two sides of giving the connection back: an interrupt must not reach its next user."""
        self.given_back = False
        self.interrupted = False
        """Whether its backend is being ended, or has been: the connection is good for nothing more."""
        self.left_behind = False
        """Whether its connection broke, so that its backend may still be there, with all its locks."""
        self.terminating = Tries()
        self.notifies = False
        self.token = ""
        """By which the database can tell how its commit in one phase ended; "" if it wrote nothing."""
        self.doom: Reason | None = None
        """Why the user's code made it impossible to commit."""

    @property
    def pid(self) -> int:
        """The process id of its backend."""
        return self.backend.pid if self.backend is not None else 0

    def give_back(self) -> bool:
        """From now on no interrupt reaches it, and its place is free; return whether its connection may be used again."""
        with self.lock:
            if not self.given_back:
                self.leave()
            self.ours = self.given_back = True
            return not self.interrupted


_BEHIND = (
    "the transaction of a branch was ended on the driver's own connection: if that was a commit, what it had done stays"
)
_LOST = "the connection of a branch in {} was lost, or a statement on it was cancelled, and its work with it"


def lost(work: BranchWork, resource: str, dialect: ModuleType) -> Reason | None:
    """Return why *work* cannot be whole any more, or None.

    After a rollback SQLAlchemy would carry on with another transaction, maybe on another connection; without what was done
    before, that is not the branch (rule 8).
    """
    if not work.connection.invalidated and work.transaction.is_active:
        if work.doom is None and ended_behind(
            getattr(work.connection, "sync_connection", work.connection), work, dialect
        ):
            work.doom = Reason(AbortCode.STATEMENT_FAILED, _BEHIND)
        return work.doom
    return work.doom or Reason(AbortCode.RESOURCE_UNAVAILABLE, _LOST.format(resource))


def broken(work: BranchWork) -> bool:
    """Return whether the connection of *work* was lost."""
    return work.connection.invalidated or not (work.ours or work.doom or work.transaction.is_active)


def ended_behind(connection: Connection, work: BranchWork, dialect: ModuleType) -> bool:
    """Return whether the transaction has been ended on the driver's own connection, which SQLAlchemy does not see."""
    return work.began and not work.ours and not connection.closed and not dialect.in_transaction(connection)


def check_whole(work: BranchWork, resource: str, dialect: ModuleType) -> None:
    """Raise `ResourceUnavailable` or `IllegalState` unless *work* is all that its users did."""
    reason = lost(work, resource, dialect)
    if reason is None:
        return
    if reason.code is AbortCode.RESOURCE_UNAVAILABLE:
        raise ResourceUnavailable(reason.text)
    raise IllegalState(reason.text)


def interrupt(connection: Connection, dialect: ModuleType, work: BranchWork) -> None:
    """Break *work* off, unless its connection is being given back: that may be another branch's by now."""
    with work.lock:
        if work.backend is None or work.given_back:
            return
        work.interrupted = True
    dialect.interrupt(connection, work.backend)


def cutter(work: BranchWork) -> Callable[[], None]:
    """Return what shuts the socket of *work*'s connection down, if that is then still the same one.

    For a database that cannot be reached by any other connection: what waits for its answer must not wait for ever.
    """
    connection = getattr(work.connection, "sync_connection", work.connection)
    with suppress(Exception):
        descriptor = connection.connection.driver_connection.fileno()
        number = os.fstat(descriptor).st_ino

        def cut() -> None:
            with work.lock, suppress(OSError):
                if not work.given_back and os.fstat(descriptor).st_ino == number:
                    with socket.socket(fileno=os.dup(descriptor)) as other_end:
                        other_end.shutdown(socket.SHUT_RDWR)

        return cut
    return lambda: None  # a driver without a socket that can be seen


def branch_of(handle: Any, resource: Any, wanted: type) -> Any:
    """``handle.use(resource)``; raises `IllegalState` if one is synchronous and the other asyncio."""
    block = handle.use(resource)
    if not isinstance(block, wanted):
        text = "belongs to a synchronous program: use txrpc.sql.ResourceManager in it"
        if wanted is AbstractContextManager:
            text = "belongs to an asyncio program: use txrpc.sql.AsyncResourceManager in it"
        raise IllegalState(f"resource {resource.name!r} does not fit its transaction: transaction {handle.xid} {text}")
    return block


def dialect_of(engine: Engine) -> ModuleType:
    """The verbs of *engine*'s database; raises `ConfigurationError` if there are none."""
    name = engine.dialect.name
    if name not in _DIALECTS:
        raise ConfigurationError(f"txrpc.sql supports {', '.join(sorted(_DIALECTS))}; {name!r} is not among them")
    return _DIALECTS[name]


def check_engine(name: str, engine: Any, wanted: type, instead: str) -> str:
    """*name*, if it and *engine* are what a resource manager needs."""
    if not isinstance(engine, wanted):
        raise ConfigurationError(f"resource {name!r}: {instead}, not {type(engine).__name__}")
    return check_name("resource", name, RESOURCE_MAX)


def check_options(name: str, session_options: Mapping[str, Any]) -> dict[str, Any]:
    """*session_options* as they are; raises `ConfigurationError` for sessions that would prepare by themselves."""
    if session_options.get("twophase"):
        raise ConfigurationError(
            f"resource {name!r}: leave twophase=True away: outside a transaction such sessions prepare without a log, and "
            "inside one it is txrpc that prepares"
        )
    if "binds" in session_options:
        raise ConfigurationError(
            f"resource {name!r}: what another database holds is said where the session is made, with the resource that it is: "
            "session(binds={Class: resource})"
        )
    return dict(session_options)


def side_engine(engine: Engine) -> Engine:
    """An engine for finishing and asking: the same database, another pool, AUTOCOMMIT.

    Branches at work may hold every connection of the user's pool while they wait for locks of a branch that only wants its
    ``COMMIT PREPARED``.  That one must never queue behind them.
    """
    pool = engine.pool.recreate()
    # Once for each connection: at each use it costs some drivers a round trip, whose errors SQLAlchemy does not take for its own.
    event.listen(pool, "connect", lambda driver, _record: engine.dialect.set_isolation_level(driver, "AUTOCOMMIT"))
    return Engine(pool, engine.dialect, engine.url)


def capacity_of(engine: Engine) -> int | None:
    """Return how many connections the engine's pool may open; None if there is no bound."""
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool._max_overflow < 0:
        return None
    return pool.size() + pool._max_overflow


def patience_of(engine: Engine, within_s: float | None) -> float | None:
    """Return how long to wait for a connection, in seconds: as long as the pool would, and no longer than the transaction has."""
    pool = engine.pool
    own_s: float | None = pool._timeout if isinstance(pool, QueuePool) else None
    return min((limit_s for limit_s in (own_s, within_s) if limit_s is not None), default=None)


def exhausted(name: str, engine: Engine, within_s: float | None = None) -> str:
    """Return what to say when the pool has no connection left; *within_s*: the transaction's time, if that was up."""
    pool: Any = engine.pool
    in_time = (
        "" if within_s is None else f", and none became free in the {within_s:.1f} s that the transaction had left"
    )
    return (
        f"every connection of resource {name!r} is in use (pool_size={pool.size()}, max_overflow={pool._max_overflow}){in_time}: "
        "give create_engine a greater pool_size, or the server fewer worker threads"
    )


def info_of(
    name: str, kind: str, identity: str, warnings: Iterable[str], register: RegisterId | None = None
) -> ResourceInfo:
    """The outcome of a preflight, with its warnings logged."""
    for warning in warnings:
        logger.warning("resource %s: %s", name, warning)
    return ResourceInfo(name, kind, identity, register=register)


def work_of(info: Mapping[Any, Any]) -> BranchWork | None:
    """Return the branch's work whose connection has *info*, or None."""
    return info.get(_INFO)


class Guard:
    """Watches an engine's branches: only txrpc may end their transactions.

    The listeners are the engine's, once; what they watch is marked in the connection's ``info``.
    """

    def __init__(self, engine: Engine, side: Engine, dialect: ModuleType, spare: Callable[[], Any]) -> None:
        """*spare*: a connection of the driver's that needs not be made, or None."""
        self._dialect = dialect
        self._engine = engine
        self._side = side
        self._spare = spare
        self._listeners = (
            ("commit", self._on_commit),
            ("rollback", self._on_rollback),
            ("before_cursor_execute", self._on_statement),
            ("after_cursor_execute", self._after_statement),
            ("do_connect", self._on_connect),
        )
        for name, listener in self._listeners:
            event.listen(engine, name, listener)

    def remove(self) -> None:
        """Stop watching."""
        for name, listener in self._listeners:
            if event.contains(self._engine, name, listener):
                event.remove(self._engine, name, listener)

    def _on_connect(self, _dialect: object, record: object, _cargs: object, cparams: dict[str, Any]) -> Any:
        """Bound the side engine's attempts to connect, unless the user has: a dead host must not keep the few that finish branches.
        The user's engine gets a spare connection, if there is one.

        The listeners are the dialect's, which both engines share; the record's pool tells whose connection it is.
        """
        pool = getattr(record, "_ConnectionRecord__pool", None)
        if pool is self._side.pool:
            self._dialect.bound_connecting(self._engine.dialect.driver, cparams, CONNECT_TIMEOUT_S)
        return self._spare() if pool is self._engine.pool else None

    @staticmethod
    def watch(connection: Connection, work: BranchWork) -> None:
        """From now on *connection* belongs to *work*."""
        connection.info[_INFO] = work

    def release(self, connection: Connection) -> None:
        """The branch is done with *connection*."""
        if not connection.closed and not connection.invalidated:
            work: BranchWork | None = connection.info.pop(_INFO, None)
            if work is not None and work.read_only:
                self._dialect.set_writable(connection)

    def _on_commit(self, connection: Connection) -> None:
        work: BranchWork | None = connection.info.get(_INFO)
        if work is not None and not work.ours:
            work.doom = work.doom or Reason(AbortCode.STATEMENT_FAILED, "commit() was called on a branch's connection")
            raise IllegalState(
                "commit() inside a transaction: the branch ends with its transaction; leave the block instead, or use a "
                "connection of your own for what must stay"
            )

    def _on_rollback(self, connection: Connection) -> None:
        if connection.invalidated:
            return
        work: BranchWork | None = connection.info.get(_INFO)
        if work is not None and not work.ours:
            # A session rolls back by itself when its flush fails; then the error, which is being handled here, is the reason.
            error = sys.exception()
            reason = self._dialect.classify(error) if error is not None else None
            work.doom = (
                work.doom or reason or Reason(AbortCode.REQUESTED, "rollback() was called on a branch's connection")
            )
        if self._dialect.ROLLBACK_IS_REFUSED:
            self._dialect.undo(connection)

    def _on_statement(self, connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        work: BranchWork | None = connection.info.get(_INFO)
        if work is None or work.ours:
            return
        if ended_behind(connection, work, self._dialect):
            work.doom = work.doom or Reason(AbortCode.STATEMENT_FAILED, _BEHIND)
            raise IllegalState(_BEHIND)
        if verb := self._dialect.ends_the_transaction(statement):
            work.doom = work.doom or Reason(AbortCode.STATEMENT_FAILED, f"{verb} was executed on a branch's connection")
            raise IllegalState(
                f"{verb} inside a transaction: the branch ends with its transaction; leave the block instead"
            )
        if work.read_only and self._dialect.writes(statement):
            raise IllegalState("this code may only read here (read_only=True), and the statement would write")
        if not work.notifies:
            work.notifies = self._dialect.speaks_behind_the_transaction(statement)

    def _after_statement(self, connection: Connection, *_: Any) -> None:
        """A script of several statements may have ended the transaction; what follows would be another one."""
        work: BranchWork | None = connection.info.get(_INFO)
        if work is None or work.ours:
            return
        work.began = True
        if self._dialect.in_transaction(connection):
            return
        text = "a script that was executed on a branch's connection ended the transaction"
        work.doom = work.doom or Reason(AbortCode.STATEMENT_FAILED, text)
        raise IllegalState(f"{text}: if it committed, what was done until then stays; leave the block instead")
