"""The resource manager over a SQLAlchemy `Engine`."""

# Written by scripts/twins.py from resource_async.py: change that one.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from txrpc._client.flow import run
from txrpc._context import current
from txrpc._protocol.messages import FinishResult, Outcome, ResourceInfo
from txrpc.errors import Reason, ResourceUnavailable
from txrpc.ids import Gid
from txrpc.resource import Prepared, ReadOnly
from txrpc.sql.commit_status import ask_once, terminate_backend
from txrpc.sql.common import (
    BranchWork,
    Guard,
    ServerEnd,
    branch_of,
    broken,
    capacity_of,
    check_engine,
    check_options,
    check_whole,
    cutter,
    dialect_of,
    exhausted,
    info_of,
    interrupt,
    lost,
    patience_of,
    side_engine,
)
from txrpc.sql.decider import Decider
from txrpc.sql.deciding import Hands
from txrpc.sql.kept import Kept
from txrpc.sql.markers import Marker
from txrpc.sql.outside import check_outside, refuse_outside
from txrpc.sql.places import Places
from txrpc.sql.sessions import check_session_commit, watch_session

__all__ = ["ResourceManager"]


class ResourceManager:
    """A SQL database as a resource: ``session()`` and ``connection()`` are bound to the current transaction.

    name: of the resource, the same in every process that reaches this database, and of this database only.
    engine: yours; it stays usable for everything else.
    session_options: for the `Session` objects that ``session()`` makes, e.g. ``expire_on_commit=False``; ``session_class`` for
        another class than `Session`.
    always_prepare: prepare also branches that seem to have written nothing.  NOTIFY in a function or a trigger is not seen, and
        would be lost in silence; with this it is refused.
    outside: what ``session()`` and ``connection()`` do where there is no transaction: begin and commit one of the database's own
        ("local"), or raise `NoTransaction` ("refuse").  By default they refuse in a process with server interceptors.
    markers: each branch that wrote adds a row to the table ``txrpc_branch``, which proves after a fail-over or a restore whether it
        has committed.  One INSERT a branch.
    decides: whether transactions may be decided in this database (``transaction(decide_in=...)``), in its tables ``txrpc_decision``
        and ``txrpc_register``.
    session_commit: what ``commit()`` of such a session does in a transaction: raise `IllegalState` ("refuse"), or flush and log a
        warning ("flush"), for code that cannot be changed yet.

    Safe to use from any number of threads.  Give it to `txrpc.connect`.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        session_class: type[Session] = Session,
        always_prepare: bool = False,
        outside: Literal["local", "refuse"] | None = None,
        markers: bool = False,
        decides: bool = False,
        session_commit: Literal["refuse", "flush"] = "refuse",
        **session_options: Any,
    ) -> None:
        self.name = check_engine(name, engine, Engine, "a ResourceManager takes a SQLAlchemy Engine")
        self.engine = engine
        self._dialect = dialect_of(engine)
        self.kind: str = engine.dialect.name
        self._session_class = session_class
        self._always_prepare = always_prepare
        self._outside = check_outside(name, outside)
        self._session_commit = check_session_commit(name, session_commit)
        self._wants_markers = markers or self._dialect.ALWAYS_MARKS
        self._markers = ""
        """The qualified name of the table of marker rows, if they are wanted."""
        self.user: Any = None
        """The manager that was connected with it."""
        self._session_options = check_options(name, session_options)
        side = side_engine(engine)
        self._side = side
        self._places = Places(capacity_of(engine))
        self._kept = Kept()
        self._guard = Guard(engine, side, self._dialect, self._kept.spare)
        self._asks_for_pid = False
        hands = Hands(self._on_branch, self._let_go, self._aside, self._break_off, self._dialect)
        self.decider = Decider(self.name, hands) if decides else None
        """See `txrpc.resource.Decides`."""

    # ------------------------------------------------------------------------------------------------- for users

    @contextmanager
    def session(self, binds: Mapping[Any, ResourceManager] | None = None) -> Iterator[Session]:
        """A `Session` in the current transaction's branch: flushed at the end of the block, committed with the transaction.

        binds: other resources of this program, by the mapped classes, tables or declarative bases that are in them: one session
            over several databases, which only a transaction can hold together.

        Outside a transaction, where that is allowed (see *outside*): an ordinary one that commits at the end of the block and
        rolls back on an exception; with *binds* it raises `NoTransaction`.
        """
        if current() is None:
            refuse_outside(self, self._outside, bool(binds))
            with self._session_class(self.engine, **self._session_options) as session, session.begin():
                yield session
            return
        others = dict(binds or {})
        with ExitStack() as stack:
            connections: dict[ResourceManager, Connection] = {}
            for each in sorted({self, *others.values()}, key=lambda each: each.name):
                connections[each] = stack.enter_context(each.connection())
            options = {**self._session_options, "join_transaction_mode": "rollback_only"}
            bound: dict[Any, Any] = {key: connections[each] for key, each in others.items()}
            with self._session_class(connections[self], binds=bound, **options) as session:
                for each, connection in connections.items():
                    watch_session(session, connection.info, each._dialect, self._session_commit)
                yield session
                session.flush()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A `Connection` in the current transaction's branch; the rest is as for `session`."""
        handle = current()
        if handle is None:
            refuse_outside(self, self._outside)
            with self.engine.begin() as connection:
                yield connection
            return
        with branch_of(handle, self, AbstractContextManager) as work:
            try:
                if handle.read_only and not work.read_only:
                    # A savepoint's own READ ONLY ends with it, and the rest of the transaction may write.
                    with work.connection.begin_nested():
                        self._dialect.set_read_only(work.connection)
                        work.read_only = True
                        try:
                            yield work.connection
                        finally:
                            work.read_only = False
                            with suppress(SQLAlchemyError):  # the connection may be gone, with whatever was said on it
                                self._dialect.set_writable(work.connection)
                else:
                    yield work.connection
            except BaseException:
                if work.doom is not None:
                    handle.set_rollback_only(work.doom)
                raise
            if (reason := lost(work, self.name, self._dialect)) is not None:
                handle.set_rollback_only(reason)

    # --------------------------------------------------------------------------------- for the manager (the port)

    def start(self) -> ResourceInfo:
        """See `txrpc.resource.Resource.start`."""
        capacity = capacity_of(self.engine)
        with self._dialect.starting(self.name):
            self._asks_for_pid = self._on(self.engine, self._dialect.hides_backends)
            if self._asks_for_pid:
                self._aside(self._dialect.check_pooler, self.engine, self.name)
            identity, warnings = self._on(
                self.engine, self._dialect.preflight, self.name, capacity, self.decider is not None
            )
            if self._wants_markers:
                self._markers = self._aside(self._dialect.prepare_table, self.name)
            register = self.decider.open() if self.decider is not None else None
        return info_of(self.name, self.kind, identity, warnings, register)

    @property
    def capacity(self) -> int | None:
        """See `txrpc.resource.Bounded`."""
        return capacity_of(self.engine)

    def close(self) -> None:
        """See `txrpc.resource.Resource.close`."""
        self._guard.remove()
        self._kept.close()
        self._side.dispose()

    def begin(self, read_only: bool, within_s: float | None = None) -> BranchWork:
        """See `txrpc.resource.Resource.begin`."""
        engine = self.engine
        if not self._places.acquire(patience_of(engine, within_s)):
            raise ResourceUnavailable(exhausted(self.name, engine, within_s))
        try:
            with self._errors():
                work = BranchWork(self.engine.connect(), self._places.release)
        except BaseException:
            self._places.release()
            raise
        with self._errors():
            try:
                work.transaction = work.connection.begin()
                work.backend = self._dialect.begin(
                    work.connection, read_only, self._asks_for_pid, self.decider is not None
                )
                work.read_only = read_only
                self._guard.watch(work.connection, work)
            except BaseException:
                self._let_go(work)
                raise
            return work

    def prepare(self, work: BranchWork, gid: Gid) -> Prepared | ReadOnly:
        """See `txrpc.resource.Resource.prepare`."""
        check_whole(work, self.name, self._dialect)
        work.ours = True
        token: str = self._dialect.prepare(work.connection, gid, *self._to_end(work))
        return self._voted(work, gid, token)

    def prepare_early(self, work: BranchWork, gid: Gid) -> Prepared | ReadOnly | None:
        """See `txrpc.resource.KeepsReads.prepare_early`."""
        check_whole(work, self.name, self._dialect)
        work.ours = True
        token: str | None = self._dialect.prepare(work.connection, gid, *self._to_end(work), True)
        if token is None:
            work.ours = False
            return None
        return self._voted(work, gid, token)

    def _voted(self, work: BranchWork, gid: Gid, token: str) -> Prepared | ReadOnly:
        if token and self._dialect.FINISHES_WHERE_PREPARED and self._dialect.is_bound(work.connection):
            self._kept.keep(gid, token, work, self._guard)
        else:
            self._let_go(work)
        return Prepared(token) if token else ReadOnly()

    def commit_one_phase(self, work: BranchWork, committing: Callable[[str], None]) -> Outcome | None:
        """See `txrpc.resource.Resource.commit_one_phase`."""
        check_whole(work, self.name, self._dialect)
        work.ours = True
        work.token = self._dialect.token_to_end(work.connection, *self._to_end(work))
        if work.token:
            committing(work.token)
        try:
            durable: bool = self._commit(work.connection, work)
        except Exception as error:
            if self._dialect.refused(error):
                raise
            work.left_behind = True
            self._let_go(work, spoiled=True)
            return None
        except BaseException:
            # Broken off by the user: SQLAlchemy's transaction has ended, perhaps before the database heard of it.
            self._let_go(work, spoiled=True)
            raise
        self._let_go(work)
        return Outcome.COMMITTED if durable else Outcome.UNKNOWN

    def _commit(self, connection: Connection, work: BranchWork) -> bool:
        durable: bool = self._dialect.commit(work.transaction, connection)
        return durable

    def how_it_ended(self, work: BranchWork) -> Outcome | None:
        """See `txrpc.resource.AsksLater.how_it_ended`."""
        if not work.token:
            return Outcome.COMMITTED if self.terminate(work) else None
        return run(ask_once(self.one_phase_result, self._break_off, work.token, work.backend))

    def rollback(self, work: BranchWork) -> None:
        """See `txrpc.resource.Resource.rollback`."""
        work.left_behind = work.left_behind or broken(work)
        self._let_go(work)

    def terminate(self, work: BranchWork) -> bool:
        """See `txrpc.resource.Terminates.terminate`."""
        return run(terminate_backend(self._break_off, self._gone, work))

    def interrupt(self, work: BranchWork) -> None:
        """See `txrpc.resource.Resource.interrupt`."""
        if work is None or work.backend is None:
            return
        cut, again = cutter(work), work.interrupted
        try:
            self._aside(interrupt, self._dialect, work)
        except BaseException:
            cut()
            raise
        if again:
            cut()  # the server's end has been ended before, and its word has not come through

    def commit_prepared(self, gid: Gid, token: str) -> FinishResult:
        """See `txrpc.resource.Resource.commit_prepared`."""
        return self._finish(True, gid, token)

    def rollback_prepared(self, gid: Gid, token: str) -> FinishResult:
        """See `txrpc.resource.Resource.rollback_prepared`."""
        return self._finish(False, gid, token)

    def _finish(self, commit: bool, gid: Gid, token: str) -> FinishResult:
        if self._kept.finish(commit, gid):
            return FinishResult.DONE
        result: FinishResult = self._aside(self._dialect.finish, commit, gid, token, self._markers)
        return result

    def in_doubt(self, group: str) -> Sequence[tuple[Gid, int]]:
        """See `txrpc.resource.Resource.in_doubt`."""
        found: Sequence[tuple[Gid, int]] = self._aside(self._dialect.in_doubt, group, self.name)
        if self._markers:
            self._aside(self._dialect.clean, self._markers)
        return found

    def one_phase_result(self, token: str) -> Outcome | None:
        """See `txrpc.resource.Resource.one_phase_result`."""
        result: Outcome | None = self._aside(self._dialect.one_phase_result, token, self._markers)
        return result

    def classify(self, error: BaseException) -> Reason | None:
        """See `txrpc.resource.Resource.classify`."""
        reason: Reason | None = self._dialect.classify(error)
        return reason

    # --------------------------------------------------------------------------------------------------- under it

    def _to_end(self, work: BranchWork) -> tuple[int, bool, Marker | None]:
        """Return what the dialect must know to prove what *work* is, and to have it proven later."""
        marker: Marker | None = self._dialect.new_marker(self._markers) if self._markers else None
        return work.pid, work.notifies or self._always_prepare, marker

    def _let_go(self, work: BranchWork, spoiled: bool = False) -> None:
        """Return the connection to its pool, which rolls back whatever is still open on it.  Never raises."""
        clean = work.give_back()
        with suppress(Exception):
            if spoiled or not clean or work.doom is not None:
                # Doomed: its user has ended SQLAlchemy's transaction, which now would return the connection as it is.
                with suppress(Exception):
                    self._dialect.abandon(work.connection)
                work.connection.invalidate()
            self._guard.release(work.connection)
        try:
            work.connection.close()
        except Exception:  # what is open on it cannot be rolled back
            with suppress(Exception):
                work.connection.invalidate()

    def _on_branch(self, work: BranchWork, verb: Callable[..., Any], *arguments: Any) -> Any:
        return verb(work.connection, *arguments)

    def _break_off(self, backend: ServerEnd) -> None:
        self._aside(self._dialect.interrupt, backend)

    def _gone(self, backend: ServerEnd) -> bool:
        gone: bool = self._aside(self._dialect.is_gone, backend)
        return gone

    def _aside(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        """Run *verb* on a connection of its own, in AUTOCOMMIT."""
        return self._on(self._side, verb, *arguments)

    def _on(self, engine: Engine, verb: Callable[..., Any], *arguments: Any) -> Any:
        """Run *verb* on a connection of *engine*; once more if a pooled connection turned out to be dead."""
        for again in (True, False):
            try:
                pool = engine.pool
                with self._errors(), engine.connect() as connection:
                    try:
                        return verb(connection, *arguments)
                    finally:
                        # Closed before or meanwhile: the pool would keep the connection, and give it to no user.
                        if self._kept.closed or engine.pool is not pool:
                            connection.invalidate()
            except DBAPIError as error:
                if not (again and error.connection_invalidated):
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Not getting a connection at all is a `ResourceUnavailable`."""
        try:
            yield
        except PoolTimeout:
            raise ResourceUnavailable(exhausted(self.name, self.engine)) from None
        except DBAPIError as error:
            if getattr(error, "statement", None) is None and self._dialect.no_connection(error):
                text = f"the database of resource {self.name!r} is out of reach: {self._dialect.sentence(error)}"
                raise ResourceUnavailable(text) from error
            raise
