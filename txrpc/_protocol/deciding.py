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
from txrpc.ids import RegisterId, Xid

__all__ = [
    "AboutRegister",
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
    """To a process that has *register*: how does the transaction end?  *claim*: it is ABORTED from now on if that is open."""

    register: RegisterId
    xid: Xid
    claim: bool


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
