"""The port to whatever holds data: what a resource manager must do, and what a transaction offers it in return.

Everything that a resource of your own imports is here.

A resource is small on purpose: five verbs and two questions.  Everything about *when* they may be called is in
`txrpc._protocol.participant.machine`; a resource never decides.  There is one protocol for synchronous and one for asyncio
programs, with the same names.

`Work` is whatever a resource needs to remember about one open branch (for SQL: a connection with an open database
transaction).  It is opaque to everything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from txrpc._protocol.messages import FinishResult, Outcome, ResourceInfo
from txrpc._protocol.outcomes import Found
from txrpc.errors import Reason
from txrpc.ids import Gid, RegisterId, Xid

__all__ = [
    "AsksLater",
    "AsyncResource",
    "AsyncResourceUser",
    "Bounded",
    "Decider",
    "Decides",
    "FinishResult",
    "Found",
    "Gid",
    "KeepsReads",
    "Outcome",
    "Prepared",
    "ReadOnly",
    "Reason",
    "RegisterId",
    "Resource",
    "ResourceInfo",
    "ResourceUser",
    "Terminates",
    "Work",
    "Xid",
]

Work = Any


@dataclass(frozen=True, slots=True)
class Prepared:
    """The branch is prepared.  `token` is the database's own transaction id, by which `one_phase_result` can ask later."""

    token: str = ""


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """The branch wrote nothing and has ended already."""


class Resource(Protocol):
    """A resource manager for synchronous programs.

    Every method but `classify` may block and is called from a worker thread; calls about one branch never overlap.
    Unless said otherwise an exception means "not done": the caller maps it with `classify`.
    """

    name: str
    kind: str

    def start(self) -> ResourceInfo:
        """Check that the database is fit for txrpc (preflight) and say what it is.

        Raises `ConfigurationError` with one sentence that says what to change, `ResourceUnavailable` if it is out of reach.
        """

    def close(self) -> None:
        """Let go of what `start` took.  The user's engine stays the user's."""

    def begin(self, read_only: bool, within_s: float | None = None) -> Work:
        """Open the work of a new branch: for SQL, pin a connection and begin a database transaction.

        With *read_only* the resource refuses whatever would write.  *within_s*: the transaction's time left, which bounds the
        wait for a connection; then `ResourceUnavailable` is raised.
        """

    def prepare(self, work: Work, gid: Gid) -> Prepared | ReadOnly:
        """Make *work* survive any crash under *gid*, and release the connection; or end it if it wrote nothing.

        After an exception the branch may be prepared all the same (the connection broke while it was on its way): the
        caller then calls `rollback_prepared`, until that returns.
        """

    def commit_one_phase(self, work: Work, committing: Callable[[str], None]) -> Outcome | None:
        """Commit *work* at once.  Calls *committing* with the token before the point of no return, if there is anything to lose.

        Returns UNKNOWN only if the database can no longer tell; finding out may take several tries and reconnects.
        None, from a resource that is `AsksLater`: the connection broke, and how it ended is not known yet.
        """

    def rollback(self, work: Work) -> None:
        """Undo *work*, which is not prepared, and free its connection.  Never raises: a dead connection is as good."""

    def interrupt(self, work: Work) -> None:
        """Break off whatever *work* is doing in another thread, so that its locks and its connection become free."""

    def commit_prepared(self, gid: Gid, token: str) -> FinishResult:
        """Commit the prepared branch *gid*.  Idempotent, from any process that reaches the database."""

    def rollback_prepared(self, gid: Gid, token: str) -> FinishResult:
        """Roll the prepared branch *gid* back.  Idempotent, from any process that reaches the database."""

    def in_doubt(self, group: str) -> Sequence[tuple[Gid, int]]:
        """The prepared branches of this resource that belong to *group*, and for how many milliseconds each has been so."""

    def one_phase_result(self, token: str) -> Outcome | None:
        """Return how the database transaction *token* ended; None while it is still running."""

    def classify(self, error: BaseException) -> Reason | None:
        """Return why *error* ends the branch, or None if it is not an error of this resource (an application's own exception)."""


class AsksLater(Protocol):
    """What a `Resource` may have besides, if its `commit_one_phase` does not wait for a database to come back.

    Then the root's own thread calls it, without a worker's, and no worker sleeps between questions.
    """

    def how_it_ended(self, work: Work) -> Outcome | None:
        """After `Resource.commit_one_phase` returned None: ask once how it ended; None to be called again in a moment."""


class Terminates(Protocol):
    """What a `Resource` may have besides, if the server may keep its end of a connection that broke, and locks with it."""

    def terminate(self, work: Work) -> bool:
        """After `Resource.rollback`: end what the server still has of *work*.  True if that is gone, or taken for gone.

        False to be called again in a moment, for half a minute at most; meanwhile the branch is not reported as rolled back.
        """


class KeepsReads(Protocol):
    """What a `Resource` may have besides, if what a transaction has read is kept as it was by snapshots or locks."""

    def prepare_early(self, work: Work, gid: Gid) -> Prepared | ReadOnly | None:
        """`Resource.prepare` at the end of a final call, while the transaction goes on elsewhere.

        None, and *work* stays as it is, if it wrote nothing and its reads must be kept; `Resource.prepare` is called later.
        """


class Bounded(Protocol):
    """What a `Resource` may have besides, if its branches need something of which there is only so much: connections of a pool."""

    @property
    def capacity(self) -> int | None:
        """How many branches can be open at one time; None if there is no bound."""


class Decides(Protocol):
    """What a `Resource` may have besides, if transactions may be decided in its own database (``transaction(decide_in=...)``)."""

    @property
    def decider(self) -> Decider | None:
        """None if that is switched off.  With one, `Resource.start` says which register it is (`ResourceInfo`)."""


class Decider(Protocol):
    """A register of decisions in a resource's own database: a row for each transaction, written once and in one place.

    All but `decide` may be called for any transaction, in any process that reaches the database.  What goes wrong is raised, and
    leaves the register as it was, or as it was asked to be.  In an asyncio program each is a coroutine function.
    """

    def open(self) -> RegisterId:
        """Return which register it is now, and make it if it is not there.  Called again and again: a database may fail over."""

    def decide(self, work: Work, xid: Xid, register: RegisterId, branches: bytes) -> Outcome | None:
        """Commit *work* and the row that *xid* is COMMITTED, with *branches*, in one transaction of the database.

        ABORTED if that is what the register says, or if it refuses: nothing of *work* is left.  It refuses if it is not *register*,
        under which the others have voted, or has become another incarnation since: what was said about *xid* may be lost.
        UNKNOWN: it cannot be known.  None: not known yet.  An exception means that nothing was begun.
        """

    def how_it_was_decided(self, work: Work, xid: Xid, register: RegisterId) -> Outcome | None:
        """After `decide` returned None: ask once, and claim ABORTED if there is no row; None to be called again in a moment."""

    def ask(self, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None) -> tuple[Found, bytes]:
        """Return what *register* says about *xid*, which may be this one as it was before its database came back older.

        *claim*: if that is open, write that it is ABORTED; with *commit*, that it is COMMITTED, with these branches.
        """

    def undone(self) -> Sequence[tuple[Xid, bytes]]:
        """Return transactions that are COMMITTED, with their branches, and not marked as done."""

    def mark_done(self, xids: Collection[Xid]) -> None:
        """All branches of these have committed."""

    def forget(self) -> None:
        """Let go of rows that no branch can ask about any more."""


class AsyncResource(Protocol):
    """`Resource` for asyncio programs: the same verbs as coroutines, called on the manager's event loop."""

    name: str
    kind: str

    async def start(self) -> ResourceInfo: ...
    async def close(self) -> None: ...
    async def begin(self, read_only: bool, within_s: float | None = None) -> Work: ...
    async def prepare(self, work: Work, gid: Gid) -> Prepared | ReadOnly: ...
    async def commit_one_phase(self, work: Work, committing: Callable[[str], Awaitable[None]]) -> Outcome | None: ...
    async def rollback(self, work: Work) -> None: ...
    async def interrupt(self, work: Work) -> None: ...
    async def commit_prepared(self, gid: Gid, token: str) -> FinishResult: ...
    async def rollback_prepared(self, gid: Gid, token: str) -> FinishResult: ...
    async def in_doubt(self, group: str) -> Sequence[tuple[Gid, int]]: ...
    async def one_phase_result(self, token: str) -> Outcome | None: ...
    def classify(self, error: BaseException) -> Reason | None: ...


class ResourceUser(Protocol):
    """The side of a current transaction that a resource manager's own blocks (``session()``, ``connection()``) see."""

    @property
    def xid(self) -> Xid:
        """The transaction's identifier."""

    @property
    def read_only(self) -> bool:
        """True if the running code may only read.  Where its branch was begun to write, the resource refuses writes now."""

    def use(self, resource: Resource) -> AbstractContextManager[Work]:
        """Take the turn on this transaction's branch in *resource*, opening it on first use.

        Inside the block the work is the caller's alone; nested blocks of one call share the turn.  An exception that
        leaves the block and that the resource calls its own (`Resource.classify`) dooms the transaction.
        Raises `TransactionAborted` if the transaction can only roll back, `IllegalState` if it has ended.
        """

    def set_rollback_only(self, reason: Reason | str | None = None) -> None:
        """Doom the transaction: it can only roll back."""


class AsyncResourceUser(Protocol):
    """`ResourceUser` for asyncio programs."""

    @property
    def xid(self) -> Xid: ...
    @property
    def read_only(self) -> bool: ...
    def use(self, resource: AsyncResource) -> AbstractAsyncContextManager[Work]: ...
    def set_rollback_only(self, reason: Reason | str | None = None) -> None: ...
