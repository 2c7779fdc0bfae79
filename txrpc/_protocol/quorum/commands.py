"""What a node's replicated log holds: commands in numbered slots, and the state that they make when applied in order.

The state is the same at everyone who applies the same commands, so that a prefix of the log may be replaced by its state
(Schneider 1990): what a log needs to keep is one `LogState` and the few commands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from txrpc._protocol.records import Decision
from txrpc.ids import Epoch, Xid

__all__ = ["Admit", "Command", "Filler", "Forget", "LogState", "Marker", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """Commit decisions."""

    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Marker:
    """An epoch has opened the log: whatever comes from here on is later than all that it has read."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Forget:
    """Records that every branch has acknowledged, and the retention time has passed for."""

    xids: frozenset[Xid]
    before_ms: int
    """From now on the absence of a record that was decided before that time proves nothing."""


@dataclass(frozen=True, slots=True)
class Admit:
    """An acceptor has lost its disk, or come back with an older one: only this incarnation of it counts from now on."""

    acceptor: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Filler:
    """Nothing: it takes the place of a command that no acceptor whose answer counted has seen."""


Command: TypeAlias = Record | Marker | Forget | Admit | Filler


@dataclass(frozen=True, slots=True)
class LogState:
    """The result of all commands up to a slot."""

    slot: int = 0
    """The last one that is in it."""
    decisions: Mapping[Xid, Decision] = field(default_factory=dict)
    epochs: Mapping[Epoch, int] = field(default_factory=dict)
    """Every epoch that has opened the log, and how many decisions there had been by then."""
    position: int = 0
    """How many decisions there have been."""
    forgotten_ms: int = 0
    incarnations: Mapping[str, int] = field(default_factory=dict)
    """Of the acceptors that were admitted anew; the others have their first."""

    def then(self, command: Command) -> LogState:
        """Return the state after *command* in the next slot."""
        after = replace(self, slot=self.slot + 1)
        match command:
            case Record(decisions):
                new = {decision.xid: decision for decision in decisions if decision.xid not in self.decisions}
                return replace(after, decisions={**self.decisions, **new}, position=self.position + len(new))
            case Marker(epoch):
                return replace(after, epochs={**self.epochs, epoch: self.position})
            case Forget(xids, before_ms):
                kept = {xid: decision for xid, decision in self.decisions.items() if xid not in xids}
                return replace(after, decisions=kept, forgotten_ms=max(self.forgotten_ms, before_ms))
            case Admit(acceptor, incarnation):
                return replace(after, incarnations={**self.incarnations, acceptor: incarnation})
            case Filler():
                return after

    def counts(self, acceptor: str, incarnation: int) -> bool:
        """Return whether an answer of that incarnation is one of the acceptor's."""
        return incarnation == self.incarnations.get(acceptor, 1)
