"""The register: where a database holds the decisions about transactions that it decides itself.

How to think of it
    A decision is a row, and its key is the transaction's identifier: it is written once, by the first that inserts it.  The
    branch that decides inserts COMMITTED in its own transaction, with its work (`Register.decide`).  A process that can wait no
    longer inserts ABORTED (it *claims* the transaction), and if the key is taken reads what the other has said; if that one has not
    committed yet, the database itself makes the claim wait.  So no two can say different things, without a clock, lease or fence.

    A row that is not there means *not decided*, and never ABORTED.  Rows are deleted all the same, some day, and a deleted one
    could be written again, differently.  Therefore the *floor*: at and below it nothing new counts.  Who inserts reads the
    floor afterwards, in a statement of its own that sees the latest: read earlier, or by the same statement, it may be from
    before the wait for the key.

    The register has an *id*, random and made with it, because a name may come to mean another database; and an *incarnation*,
    which changes when the database may have lost commits (a promoted standby, a restored backup).  In another incarnation a row
    that is there is true, and one that is not proves nothing.

    It needs one copy of the key: where two servers take writes and tell each other later, two rows of one key can both commit.

Nearest relatives: Narayana's commit markable resource; the registers of Gray and Lamport, "Consensus on Transaction Commit" (2006).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy.engine import Connection

from txrpc._protocol.outcomes import Found
from txrpc.ids import RegisterId, Xid

__all__ = ["Register", "Row", "Verdict", "register_id", "written"]


class Verdict(enum.Enum):
    """What a decision has met; unless it is DECIDED the transaction must be rolled back."""

    DECIDED = "decided"  # COMMIT makes it true
    TAKEN = "taken"  # there is a row already, or this is not the branch that worked: a claim says what is true
    REFUSED = "refused"  # too old, or another register: nothing was said about the transaction


@dataclass(frozen=True, slots=True)
class Row:
    """An answer of the register."""

    found: Found
    branches: bytes = b""
    """Of COMMITTED: what its decider wrote down about the other branches."""


class Register(Protocol):
    """One register, as it was when it was opened.

    Its methods take a synchronous `Connection` to its database.  All but `decide` take one in AUTOCOMMIT, and make transactions of
    their own; what they raise is SQLAlchemy's, and `ResourceUnavailable` where trying again later may help.
    """

    @property
    def id(self) -> RegisterId:
        """Its identifier, with the incarnation."""

    def decide(self, connection: Connection, xid: Xid, branches: bytes, pid: int) -> Verdict:
        """Write COMMITTED, as the last work of the open transaction on *connection*; COMMIT must follow, or ROLLBACK.

        *branches*: what phase two needs to know; nothing if there is none to come.  *pid*: the backend that did the work, if
        the database has such.  After an exception, and when the end of the COMMIT is not known, only `ask` may say what is true.
        """

    def ask(
        self, connection: Connection, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None
    ) -> Row:
        """Return what *register* says about *xid*: this one, as it is or was, or another.

        *claim*: if it is not decided, it is ABORTED from now on, for all; only for those whose patience is over.  With *commit* it
        is COMMITTED instead, with these branches: only for the one that has the right to decide, and no work to commit with that.
        """

    def undone(self, connection: Connection) -> Sequence[tuple[Xid, bytes]]:
        """Return transactions that are COMMITTED and not `done`, and their branches."""

    def done(self, connection: Connection, xids: Collection[Xid]) -> None:
        """Every branch of these has proven that it has committed: `forget` may delete them, some day."""

    def forget(self, connection: Connection, horizon_ms: int, limit: int) -> int:
        """Raise the floor to *horizon_ms* before the database's time, and delete rows at or below it that are over; how many."""


def written(commit: bytes | None) -> Row:
    """Return the answer of a register in which `Register.ask` has just written what it was to claim."""
    return Row(Found.ABORTED) if commit is None else Row(Found.COMMITTED, commit)


def register_id(table: bytes, incarnation: str) -> RegisterId:
    """Return the identifier of the register with *table*'s random number, in this *incarnation* of its database."""
    return RegisterId(bytes(table) + hashlib.sha256(incarnation.encode()).digest()[:8])
