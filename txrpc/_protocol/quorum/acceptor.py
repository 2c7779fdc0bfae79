"""An acceptor: what one disk keeps of a node's log, and what it answers (Lamport, "Paxos Made Simple").

The ballot is the epoch.  A promise covers the whole log of the node, slots that are not written yet included: that is the
fence of `DecisionLog.open`.

The caller must force the disk before it sends an answer (`Disk` is all that must survive), and give it one message
at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

from txrpc._protocol.quorum.commands import Command, LogState
from txrpc.ids import Epoch

__all__ = [
    "FURTHEST",
    "Accept",
    "Accepted",
    "Answer",
    "Disk",
    "Install",
    "Learn",
    "Outdated",
    "Prepare",
    "Promise",
    "Question",
    "Refused",
    "Slot",
    "Unsaved",
    "answer",
]

FURTHEST: Final = 1_000_000
"""By so much the number of an epoch may be greater than that of the last promise."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A command that was accepted, and in which epoch."""

    epoch: Epoch
    command: Command


@dataclass(slots=True)
class Unsaved:
    """Changes of a `Disk`, beside those of its small fields."""

    accepted: list[int] = field(default_factory=list)
    """Slots that were written."""
    folded: list[Command] = field(default_factory=list)
    """Commands that went from their slots into the base, in order."""
    installed: bool = False
    """The base is another one, and the slots are fewer."""


@dataclass(slots=True)
class Disk:
    """What an acceptor keeps of one node's log."""

    acceptor: str
    incarnation: int = 1
    votes: bool = True
    """False on a disk that is empty or older than what its owner has answered: until it is admitted anew."""
    promised: Epoch = Epoch(0)  # noqa: RUF009
    view: int = 1
    """The number of the latest view in which it was asked about this log."""
    base: LogState = field(default_factory=LogState)
    """The result of a prefix of the log that is chosen for certain."""
    slots: dict[int, Slot] = field(default_factory=dict)
    """What was accepted behind it."""
    unsaved: Unsaved = field(default_factory=Unsaved)
    """What the last steps have changed, for who writes it down, and clears it then."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Phase one: promise to accept nothing of a lower epoch, and say what you have accepted behind the slot *has*."""

    epoch: Epoch
    has: int = 0
    look: bool = False
    """Promise nothing; only say what you have."""
    view: int = 1


@dataclass(frozen=True, slots=True)
class Accept:
    """Phase two.  Everything up to the slot *chosen* is chosen, with what was accepted in this very epoch."""

    epoch: Epoch
    slot: int
    command: Command
    chosen: int
    view: int = 1


@dataclass(frozen=True, slots=True)
class Learn:
    """Everything up to the slot *chosen* is chosen, with what was accepted in this very epoch; there is no more to accept."""

    epoch: Epoch
    chosen: int
    view: int = 1


@dataclass(frozen=True, slots=True)
class Install:
    """A prefix of the log for one that has missed it; with an *incarnation*, for a disk that may vote from now on."""

    epoch: Epoch
    base: LogState
    incarnation: int = 0
    view: int = 1


Question: TypeAlias = Prepare | Accept | Learn | Install
"""Each is asked in the *view* of that number, and the answer is one in that view."""


@dataclass(frozen=True, slots=True)
class Promise:
    """The answer to `Prepare`."""

    acceptor: str
    incarnation: int
    epoch: Epoch
    base: LogState | None
    """None if the one that asks has as much."""
    slots: dict[int, Slot]
    look: bool = False
    """It is no promise."""
    view: int = 1


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to the others: which slot was accepted, and up to which this one has the log."""

    acceptor: str
    incarnation: int
    epoch: Epoch
    slot: int
    has: int
    view: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A higher epoch was promised; or this disk does not vote (`promised` is 0 then)."""

    acceptor: str
    incarnation: int
    epoch: Epoch
    promised: Epoch


@dataclass(frozen=True, slots=True)
class Outdated:
    """The view in which it was asked is over: there is a later one, of that number."""

    acceptor: str
    incarnation: int
    epoch: Epoch
    view: int


Answer: TypeAlias = Promise | Accepted | Refused | Outdated


def answer(disk: Disk, question: Question) -> Answer:
    """Take *question*, change *disk*, and return the answer, which may be sent when the disk has been forced."""
    who = (disk.acceptor, disk.incarnation, question.epoch)
    look = isinstance(question, Prepare) and question.look
    if question.view < disk.view:
        return Outdated(*who, disk.view)
    # Kept like a promise: what was asked in this view may rely on it that nothing is answered in an earlier one.
    disk.view = question.view
    if question.epoch < disk.promised and not look:
        return Refused(*who, disk.promised)
    if disk.votes and question.epoch.number > disk.promised.number + FURTHEST:
        # Rule 15: no log comes so far at once, and to promise it would leave no numbers for those that follow.
        return Refused(*who, disk.promised)
    if isinstance(question, Install):
        return _install(disk, question)
    if not disk.votes:
        return Refused(*who, Epoch(0))
    # Rule 7: one promise for the whole log, also of slots and transactions that are not known yet.
    disk.promised = disk.promised if look else question.epoch
    if isinstance(question, Prepare):
        base = disk.base.copy() if disk.base.slot > question.has else None
        return Promise(*who, base, dict(disk.slots), look, disk.view)
    if isinstance(question, Accept) and question.slot > disk.base.slot:
        disk.slots[question.slot] = Slot(question.epoch, question.command)
        disk.unsaved.accepted.append(question.slot)
    _fold(disk, question.chosen, question.epoch)
    return Accepted(*who, question.slot if isinstance(question, Accept) else 0, disk.base.slot, disk.view)


def _fold(disk: Disk, chosen: int, epoch: Epoch) -> None:
    """Apply what is known to be chosen.  What was accepted in another epoch may have been outvoted: it waits for `Install`."""
    while (following := disk.base.slot + 1) <= chosen:
        slot = disk.slots.get(following)
        if slot is None or slot.epoch != epoch:
            return
        disk.base.apply(slot.command)
        disk.unsaved.folded.append(slot.command)
        del disk.slots[following]


def _install(disk: Disk, question: Install) -> Accepted | Refused:
    anew = question.incarnation == disk.incarnation and not disk.votes
    if not (disk.votes or anew):
        return Refused(disk.acceptor, disk.incarnation, question.epoch, Epoch(0))
    disk.votes = True
    disk.promised = question.epoch
    if anew or question.base.slot > disk.base.slot:
        disk.base = question.base.copy()
        # What an older disk holds behind that is no more than a rumour: its owner may have answered otherwise since.
        disk.slots = {number: slot for number, slot in disk.slots.items() if number > question.base.slot and not anew}
        disk.unsaved.installed = True
    who = (disk.acceptor, disk.incarnation, question.epoch)
    return Accepted(*who, question.base.slot, disk.base.slot, disk.view)
