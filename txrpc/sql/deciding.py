"""The last resource: committing a branch together with the decision about its transaction, and learning what was decided.

These are flows, for both halves of `txrpc.sql`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sqlalchemy.engine import Connection

from txrpc._client.flow import Flow
from txrpc._failpoints import failpoint
from txrpc._protocol.outcomes import Found
from txrpc.ids import RegisterId, Xid
from txrpc.sql.common import BranchWork, ServerEnd, check_whole
from txrpc.sql.register import Register, Row, Verdict

__all__ = ["Decided", "Hands", "decide", "settle"]


class Decided(enum.Enum):
    """What has come of an order to decide."""

    COMMITTED = "committed"
    ABORTED = "aborted"  # another one had claimed it
    REFUSED = "refused"  # too late, or the wrong register: nothing was said here about the transaction, and its work is undone
    LOST = "lost"  # it may have been decided, and the register does not know that any more


@dataclass(frozen=True, slots=True)
class Hands:
    """What a flow does to the branch's connection and beside it; each may be a coroutine function.

    on_branch: ``(work, verb, *arguments)`` calls *verb* with the branch's connection.
    let_go: ``(work, spoiled)`` gives that back, which undoes what is not committed.
    aside: ``(verb, *arguments)`` calls *verb* with a connection of its own, in AUTOCOMMIT.
    break_off: ends a backend.
    dialect: the database's verbs.
    """

    on_branch: Callable[..., Any]
    let_go: Callable[[BranchWork, bool], Any]
    aside: Callable[..., Any]
    break_off: Callable[[ServerEnd], Any]
    dialect: ModuleType


def decide(
    hands: Hands,
    register: Register,
    resource: str,
    work: BranchWork,
    xid: Xid,
    under: RegisterId,
    branches: bytes,
) -> Flow[Decided | None]:
    """Commit *work* with the decision that *xid* is COMMITTED; return what is true then.

    *under*: the register that the transaction began under.  If its database has failed over since, a claim of ABORTED may be lost.
    None: that is not known yet, and `settle` is to be called in a moment, until it knows.  From the first statement on only the
    register may say that the transaction is aborted.  Raises `ResourceUnavailable` or `IllegalState`, before that, if *work* is not
    all that its users did.
    """
    check_whole(work, resource, hands.dialect)
    work.ours = True
    if under != register.id:
        yield hands.let_go, (work, False)
        return Decided.REFUSED
    failpoint("participant.before_insert_decision")
    try:
        verdict: Verdict = yield hands.on_branch, (work, register.decide, xid, branches, work.pid)
    except Exception:
        # Undone for certain: COMMIT was not sent.  But the same order may have come twice.
        yield hands.let_go, (work, False)
        return (yield from settle(hands, register, work, xid, under))
    if verdict is not Verdict.DECIDED:
        yield hands.let_go, (work, False)
        return Decided.REFUSED if verdict is Verdict.REFUSED else (yield from settle(hands, register, work, xid, under))
    failpoint("participant.after_insert_decision")
    try:
        durable: bool = yield hands.on_branch, (work, _commit, hands.dialect, work)
    except Exception as error:
        # The database may have refused it (a deferred constraint), or the answer was lost, or the order.
        work.left_behind = not hands.dialect.refused(error)
        yield hands.let_go, (work, work.left_behind)
        return (yield from settle(hands, register, work, xid, under))
    except BaseException:
        yield hands.let_go, (work, True)
        raise
    yield hands.let_go, (work, False)
    # None: not on the standby that its owner wants it to be on (rule 22).  The register says so when it is.
    return Decided.COMMITTED if durable else None


def _commit(connection: Connection, dialect: ModuleType, work: BranchWork) -> bool:
    return bool(dialect.commit(getattr(work.transaction, "sync_transaction", work.transaction), connection))


def settle(hands: Hands, register: Register, work: BranchWork, xid: Xid, under: RegisterId) -> Flow[Decided | None]:
    """Learn what is true about *xid* after `decide`, by claiming it; None if that is not known yet.

    A backend that a broken connection has left behind holds the key for as long as it lives, and may never have heard of its
    COMMIT: it is ended, unless it waits for a synchronous standby.
    """
    try:
        if work.left_behind and work.backend is not None:
            yield hands.break_off, (work.backend,)
        row: Row = yield hands.aside, (register.ask, under, xid, True)
    except Exception:
        return None  # the database is not back yet, or it still decides
    return _SAID.get(row.found, Decided.LOST)


_SAID = {Found.COMMITTED: Decided.COMMITTED, Found.ABORTED: Decided.ABORTED}
