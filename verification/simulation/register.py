"""The register of a simulated database, and what reaches it over the network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from txrpc._protocol.messages import Outcome
from txrpc._protocol.outcomes import Found
from txrpc._wire.deciding import decode_decision
from txrpc.errors import ResourceUnavailable, TxrpcError
from txrpc.ids import BranchId, RegisterId, Xid
from verification.simulation.history import History
from verification.simulation.scheduler import Promise

__all__ = ["Deciding", "Register", "SimDecider", "WrongIncarnation"]

Work = Any
"""An open transaction of the database."""


class WrongIncarnation(TxrpcError):
    """The register is not the one that was opened."""


class Deciding(Protocol):
    """A database, as far as its register is concerned."""

    register: Register

    def insert_decision(self, work: Work, register: RegisterId | None, xid: Xid, branches: bytes) -> bool:
        """The first half of a decision.  Raises `WrongIncarnation`."""

    def commit_decision(self, work: Work, xid: Xid) -> None:
        """The second half."""

    def cuts(self) -> bool:
        """Return whether a connection breaks at this moment."""

    def commits_later(self, work: Work, xid: Xid) -> None:
        """The second half is on its way."""


class Register:
    """The decisions that a database holds, as `txrpc.sql.register` keeps them; a row is there when it is committed."""

    def __init__(self, name: str, history: History) -> None:
        self._table = name.encode().ljust(16, b".")
        self.incarnation = 1
        self.rows: dict[Xid, tuple[bool, bytes]] = {}
        """Whether it is committed, and its branches; in the order in which they were written."""
        self.done: set[Xid] = set()
        self._inserted: dict[Xid, tuple[Work, bytes]] = {}
        """Of transactions that are open."""
        self._history = history

    @property
    def id(self) -> RegisterId:
        """Its identifier, with the incarnation."""
        return RegisterId(self._table + self.incarnation.to_bytes(8, "big"))

    def come_back_older(self, without: int) -> list[Xid]:
        """Another incarnation, which has never heard of the last decisions: *without* how many; return which."""
        self.incarnation += 1
        gone = list(self.rows)[len(self.rows) - without :]
        for xid in gone:
            del self.rows[xid]
            self.done.discard(xid)
        return gone

    def insert(self, xid: Xid, work: Work, branches: bytes) -> bool:
        """Write the row that *xid* is committed, in the open transaction of *work*."""
        if xid in self.rows or xid in self._inserted:
            return False
        self._inserted[xid] = work, branches
        return True

    def commit(self, xid: Xid, branch: BranchId | None) -> None:
        """The transaction that has inserted it commits."""
        _work, branches = self._inserted.pop(xid)
        self._decided(xid, branch, branches)

    def _decided(self, xid: Xid, branch: BranchId | None, branches: bytes) -> None:
        self.rows[xid] = True, branches
        decided = decode_decision(xid, branches)
        listed = [prepared.branch for prepared in decided.branches] if decided is not None else []
        self._history.note("registered", xid, branch, listed)
        if not listed:
            self.mark_done([xid])

    def let_go(self, work: Work) -> None:
        """Its transaction has ended."""
        for xid in [xid for xid, (owner, _) in self._inserted.items() if owner is work]:
            del self._inserted[xid]

    def ask(self, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None) -> tuple[Found, bytes]:
        """See `Decider.ask`."""
        if register.table != self._table:
            return Found.ELSEWHERE, b""
        if register != self.id and xid not in self.rows:
            return Found.LOST, b""
        if xid in self._inserted:
            if claim:
                raise ResourceUnavailable(f"{xid} is being decided at this moment")
            return Found.OPEN, b""
        if xid not in self.rows and commit is not None:
            self._decided(xid, None, commit)
        elif xid not in self.rows and claim:
            self.rows[xid] = False, b""
            self._history.note("refused", xid)
            self._history.line("register", "register", lambda: f"{xid} is claimed: aborted")
        committed, branches = self.rows.get(xid, (None, b""))
        return _FOUND[committed], branches

    def undone(self) -> list[tuple[Xid, bytes]]:
        """See `Decider.undone`."""
        return [(xid, row[1]) for xid, row in self.rows.items() if row[0] and xid not in self.done]

    def mark_done(self, xids: Collection[Xid]) -> None:
        """See `Decider.mark_done`."""
        for xid in xids:
            self.done.add(xid)
            self._history.note("done", xid)


_FOUND = {True: Found.COMMITTED, False: Found.ABORTED, None: Found.OPEN}


class SimDecider:
    """`txrpc.resource.Decider` over a database's register."""

    def __init__(self, ask: Callable[..., Promise], database: Deciding) -> None:
        """*ask* has the database do something."""
        self._ask = ask
        self._database = database
        self.opened: RegisterId | None = None
        """Which register it was when it was looked at last."""

    def open(self) -> Promise:
        """See `Decider.open`."""
        promise = self._ask(lambda: self._database.register.id)
        promise.then(self._was_opened)
        return promise

    def _was_opened(self, kept: Promise) -> None:
        if kept.error is None:
            self.opened = kept.value

    def decide(self, work: Work, xid: Xid, under: RegisterId, branches: bytes) -> Promise:
        """See `Decider.decide`: two statements, and between them anything may happen."""
        promise, ask, database = Promise(), self._ask, self._database
        register = under if under == self.opened else None

        def inserted(kept: Promise) -> None:
            if kept.value and database.cuts():
                # The connection breaks under COMMIT, which arrives all the same, some day, or never.
                database.commits_later(work, xid)
                promise.keep(None)
            elif kept.value:
                ask(database.commit_decision, work, xid).then(committed)
            elif isinstance(kept.error, WrongIncarnation):
                promise.keep(Outcome.ABORTED)
            else:
                promise.keep(None)  # whatever it was, the register knows

        def committed(kept: Promise) -> None:
            promise.keep(None if kept.error else Outcome.COMMITTED)

        ask(database.insert_decision, work, register, xid, branches).then(inserted)
        return promise

    def how_it_was_decided(self, _work: Work, xid: Xid, under: RegisterId) -> Promise:
        """See `Decider.how_it_was_decided`."""
        promise, register = Promise(), self._database.register
        asked = self._ask(register.ask, under, xid, True)
        asked.then(lambda kept: promise.keep(None if kept.error else _OUTCOMES.get(kept.value[0], Outcome.UNKNOWN)))
        return promise

    def ask(self, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None) -> Promise:
        """See `Decider.ask`."""
        return self._ask(self._database.register.ask, register, xid, claim, commit)

    def undone(self) -> Promise:
        """See `Decider.undone`."""
        return self._ask(self._database.register.undone)

    def mark_done(self, xids: Collection[Xid]) -> Promise:
        """See `Decider.mark_done`."""
        return self._ask(self._database.register.mark_done, xids)

    def forget(self) -> Promise:
        """See `Decider.forget`.  The horizon is longer than any run: `tests/sql` has what happens at it."""
        return self._ask(lambda: None)


_OUTCOMES = {Found.COMMITTED: Outcome.COMMITTED, Found.ABORTED: Outcome.ABORTED}
