"""What is said about a transaction that a resource decides: a row in a *register*, a table of its own database.

How to think of it
    Nothing here needs an order, or to arrive.  The row is written once, by the branch that commits with it or by a claim of
    ABORTED; whatever is said of it afterwards is true for ever, from any process to any coordinator, of any epoch.  What gets
    lost is asked again (`RegisterQuestion`), or said again by the process that has the register, for as long as its row is not
    marked as done (`Decided`).

See `txrpc.sql.register` for the row itself, and docs/protocol.md for the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import PreparedBranch
from txrpc.ids import BranchId, RegisterId, Xid

__all__ = [
    "AboutRegister",
    "Decide",
    "Decided",
    "DecisionDone",
    "FromRegister",
    "RegisterAnswer",
    "RegisterQuestion",
    "Registers",
    "Votes",
]


@dataclass(frozen=True, slots=True)
class Registers:
    """To every process: the registers of all resources that decide, by the resources' names."""

    names: tuple[tuple[str, RegisterId], ...]


@dataclass(frozen=True, slots=True)
class Votes:
    """To a root that decides itself: all branches that its request listed have voted to commit; these are prepared."""

    xid: Xid
    branches: tuple[PreparedBranch, ...]


@dataclass(frozen=True, slots=True)
class Decide:
    """To the process that holds *branch*: all others have voted, and *branches* are prepared; commit it with the decision.

    It is said once, by the only coordinator that the root has asked to.  `OnePhaseDone` answers it; without an answer only the
    register knows, and is asked.
    """

    xid: Xid
    branch: BranchId
    calls: int
    register: RegisterId
    branches: tuple[PreparedBranch, ...]


@dataclass(frozen=True, slots=True)
class Decided:
    """A process that has *register* says that the transaction is COMMITTED there, and which branches must be told."""

    register: RegisterId
    xid: Xid
    branches: tuple[PreparedBranch, ...]


@dataclass(frozen=True, slots=True)
class DecisionDone:
    """To a process that has *register*: all branches of these have committed, so that their rows may go some day."""

    register: RegisterId
    xids: tuple[Xid, ...]


@dataclass(frozen=True, slots=True)
class RegisterQuestion:
    """To a process that has *register*: how does the transaction end?

    *claim*: if that is open, it is ABORTED from now on; or COMMITTED, with the prepared branches *commit*, if they are given.
    """

    register: RegisterId
    xid: Xid
    claim: bool
    commit: tuple[PreparedBranch, ...] | None = None


@dataclass(frozen=True, slots=True)
class RegisterAnswer:
    """Answer to `RegisterQuestion`; *branches* of COMMITTED."""

    register: RegisterId
    xid: Xid
    found: Found
    branches: tuple[PreparedBranch, ...] = ()


FromRegister = Decided | RegisterAnswer
"""What a process says that has a register."""

AboutRegister = RegisterQuestion | DecisionDone | Registers
"""What a coordinator says to it."""
