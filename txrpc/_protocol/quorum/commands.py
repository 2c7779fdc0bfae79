"""What a node's replicated log holds: commands in numbered slots, and the state that they make when applied in order.

The state is the same at everyone who applies the same commands, so that a prefix of the log may be replaced by its state
(Schneider 1990): what a log needs to keep is one `LogState` and the few commands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from txrpc._protocol.quorum.views import View
from txrpc._protocol.records import Decision, Incident
from txrpc.ids import BranchId, Epoch, Xid

__all__ = [
    "FIRST",
    "Admit",
    "Bind",
    "ChangeView",
    "Command",
    "Filler",
    "Forget",
    "LogState",
    "Marker",
    "Moved",
    "Record",
    "Report",
]


@dataclass(frozen=True, slots=True)
class Record:
    """Commit decisions; and marks of those that every branch has acknowledged by now, which travel with the next ones."""

    decisions: tuple[Decision, ...]
    done: tuple[Xid, ...] = ()
    done_ms: int = 0


@dataclass(frozen=True, slots=True)
class Marker:
    """An epoch has opened the log: whatever comes from here on is later than all that it has read."""

    epoch: Epoch
    holder: str = ""
    """The node whose process runs it."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Records that every branch has acknowledged, and the retention time has passed for."""

    xids: frozenset[Xid]
    before_ms: int
    """From now on the absence of a record that was decided before that time proves nothing."""


@dataclass(frozen=True, slots=True)
class Report:
    """Branches that did not end as decided, to be kept until an operator has closed them; and those that were closed."""

    incidents: tuple[Incident, ...]
    closed: tuple[tuple[Xid, BranchId], ...] = ()


@dataclass(frozen=True, slots=True)
class Bind:
    """Which databases resource names mean (rule 17): *first*, where none is known yet; *rebound*, whatever was known."""

    first: Mapping[str, str]
    rebound: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Admit:
    """An acceptor has lost its disk, or come back with an older one: only this incarnation of it counts from now on."""

    acceptor: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ChangeView:
    """The group has other members from now on.  In the log that all members share, and nowhere else."""

    view: View


@dataclass(frozen=True, slots=True)
class Moved:
    """Everything before this is on a write quorum of the view of that number, and no epoch of an earlier view can be opened."""

    number: int


@dataclass(frozen=True, slots=True)
class Filler:
    """Nothing: it takes the place of a command that no acceptor whose answer counted has seen."""


FIRST: Final = 1
"""The incarnation of a disk that the group, or its log, was founded with."""

Command: TypeAlias = Record | Marker | Forget | Report | Bind | Admit | ChangeView | Moved | Filler


@dataclass(slots=True)
class LogState:
    """The result of all commands up to a slot.  It has one owner, who applies commands to it; others are given a copy."""

    slot: int = 0
    """The last one that is in it."""
    decisions: dict[Xid, Decision] = field(default_factory=dict)
    done_ms: dict[Xid, int] = field(default_factory=dict)
    """When those that every branch has acknowledged were marked so."""
    epochs: dict[Epoch, int] = field(default_factory=dict)
    """Every epoch that has opened the log, and how many decisions there had been by then."""
    holder: str = ""
    """The node whose process has opened the latest of them."""
    position: int = 0
    """How many decisions there have been."""
    forgotten_ms: int = 0
    incidents: dict[tuple[Xid, BranchId], Incident] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Resource names, and the databases that they mean; "": the next that comes."""
    incarnations: dict[str, int] = field(default_factory=dict)
    """Of the acceptors that were admitted anew; the others have their first."""
    moved: int = 1
    """The number of the latest view that the log has moved to."""
    view: View | None = None
    """The latest that was decided in this log; None if the group's members are those that have founded it."""

    @property
    def epoch(self) -> Epoch:
        """The latest that has opened the log; 0 if none has."""
        return max(self.epochs, default=Epoch(0))

    def copy(self) -> LogState:
        """Return one that has nothing in common with this one."""
        return LogState(
            self.slot,
            dict(self.decisions),
            dict(self.done_ms),
            dict(self.epochs),
            self.holder,
            self.position,
            self.forgotten_ms,
            dict(self.incidents),
            dict(self.names),
            dict(self.incarnations),
            self.moved,
            self.view,
        )

    def apply(self, command: Command) -> None:
        """Take *command* as that of the next slot."""
        self.slot += 1
        match command:
            case Record():
                self._record(command)
            case Marker(epoch, holder):
                self.epochs[epoch], self.holder = self.position, holder
            case Forget(xids, before_ms):
                for xid in xids:
                    self.decisions.pop(xid, None)
                    self.done_ms.pop(xid, None)
                # Absence proves an abort only of what began later, and this is how a later epoch knows.
                self.forgotten_ms = max(self.forgotten_ms, before_ms)
            case Report(incidents, closed):
                self.incidents.update({(each.xid, each.branch): each for each in incidents})
                for key in closed:
                    self.incidents.pop(key, None)
            case Bind(first, rebound):
                self.names.update({name: identity for name, identity in first.items() if not self.names.get(name)})
                self.names.update(rebound)
            case Admit(acceptor, incarnation):
                self.incarnations[acceptor] = incarnation
            case ChangeView(view):
                # Two members may have asked for a change at once: the one that comes first holds.
                if view.number == (self.view.number if self.view else 1) + 1 and self.moved == view.number - 1:
                    self.view = view
            case Moved(number):
                self.moved = max(self.moved, number)
            case Filler():
                pass

    def counts(self, acceptor: str, incarnation: int) -> bool:
        """Return whether an answer of that incarnation is one of the acceptor's."""
        return incarnation == self.incarnations.get(acceptor, FIRST)

    def _record(self, command: Record) -> None:
        new = {decision.xid: decision for decision in command.decisions if decision.xid not in self.decisions}
        self.decisions.update(new)
        self.position += len(new)
        for xid in command.done:
            if xid in self.decisions:
                self.done_ms.setdefault(xid, command.done_ms)
