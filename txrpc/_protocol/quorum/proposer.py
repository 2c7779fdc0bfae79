"""A proposer: one epoch of a node's log, from the first question to the fence.

How to think of it
    *Looking*, for who takes over: NR acceptors say what they have, and promise nothing.  If the log was opened later than it should
    have been, another one was faster, and must not be disturbed.

    *Reading*: NR acceptors promise, and say what they have.  The longest chosen prefix among the answers is taken as it is.  Behind
    it every command that *any* answer has is proposed again, that of the greatest epoch in each slot; gaps are filled; and a marker
    of this epoch goes into the slot behind.
    *Opening*: these are accepted by NW acceptors, one slot after another.  Only then is the epoch open: nothing may be answered,
    recorded or presumed before, because what a minority had accepted is decided one way or the other by just that.
    *Open*: one command at a time is proposed, in the next slot.  With two in flight, a later epoch could find the second
    without the first.

    An acceptor that refuses because of a higher promise ends the epoch.  What was proposed and not answered by NW acceptors by
    then may still be chosen, by the higher epoch: it is uncertain, and only that one knows.

NR + NW > N is all that safety needs (Howard, Malkhi and Spiegelman, "Flexible Paxos").
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from txrpc._protocol.quorum.acceptor import (
    Accept,
    Accepted,
    Answer,
    Install,
    Learn,
    Outdated,
    Prepare,
    Promise,
    Question,
    Refused,
)
from txrpc._protocol.quorum.commands import FIRST, Admit, Command, Filler, LogState, Marker, Moved
from txrpc._protocol.quorum.views import Quorums
from txrpc.ids import Epoch

__all__ = ["STAGES", "Proposer", "ProposerOutput", "Stage", "Turn"]


class Stage(enum.Enum):
    """How far an epoch has come."""

    LOOKING = "looking"
    READING = "reading"
    OPENING = "opening"
    OPEN = "open"
    OVER = "over"


class Turn(enum.Enum):
    """What brings an epoch to its next stage."""

    EXPECTED = "NR say that it is as expected"
    UNEXPECTED = "NR say that it is not"
    PROMISED = "NR have promised"
    OPENED = "NW have accepted the marker"
    SUPERSEDED = "a higher epoch was promised"


STAGES: Final[Mapping[tuple[Stage, Turn], Stage]] = {
    (Stage.LOOKING, Turn.EXPECTED): Stage.READING,
    (Stage.LOOKING, Turn.UNEXPECTED): Stage.OVER,
    (Stage.READING, Turn.PROMISED): Stage.OPENING,
    (Stage.OPENING, Turn.OPENED): Stage.OPEN,
    # Rule 7.  Not "nothing was written": a slower acceptor may yet take what is on its way to it.
    (Stage.LOOKING, Turn.SUPERSEDED): Stage.OVER,
    (Stage.READING, Turn.SUPERSEDED): Stage.OVER,
    (Stage.OPENING, Turn.SUPERSEDED): Stage.OVER,
    (Stage.OPEN, Turn.SUPERSEDED): Stage.OVER,
}
"""All ways from one stage to another."""


@dataclass(slots=True)
class ProposerOutput:
    """The effects of one step."""

    send: list[tuple[str, Question]] = field(default_factory=list)
    """Messages, each with the acceptor that it is for.  Any of them may be lost: `again` repeats what has no answer."""
    opened: bool = False
    """The epoch is open now: `Proposer.state` is what it has found."""
    chosen: Command | None = None
    """The command that was proposed is in the log for good."""
    fenced: Epoch | None = None
    """A higher epoch was promised: this one is over, and what was under way is uncertain."""
    unexpected: Epoch | None = None
    """The log was opened last by this epoch, and not by the one that was expected: the new one is over before it began.

    0 if it was never opened at all.
    """
    outdated: int = 0
    """There is a view of that number, later than the proposer's: see `Proposer.move`."""


class Proposer:
    """See the module's docstring.  Pure: it neither sends nor waits."""

    def __init__(
        self,
        epoch: Epoch,
        quorums: Quorums,
        holder: str = "",
        known: LogState | None = None,
        expect: Epoch | None = None,
    ) -> None:
        """*holder*: see `Marker`.  *known*: what is chosen for certain already; it belongs to the proposer from now on.

        *expect*: the latest that may have opened the log; the new one is over if it finds a later one, or none at all.
        """
        self.epoch = epoch
        self.stage = Stage.READING if expect is None else Stage.LOOKING
        self.state = known or LogState()
        """All that is chosen for certain."""
        self._quorums = quorums
        self._holder = holder
        self._expect = expect
        self._promises: dict[str, Promise] = {}
        self._to_do: list[Command] = []
        """What must be accepted before the epoch is open."""
        self._command: Command | None = None
        """What is in flight, in the slot behind `state`."""
        self._accepted: set[tuple[str, int]] = set()
        self._out = ProposerOutput()
        self._has: dict[str, int] = {}
        """Up to which slot each acceptor has the log, as far as it has said."""
        self.strangers: dict[str, int] = {}
        """Acceptors whose disk, of that incarnation, is not the one that counts: `Admit` lets it in."""

    @property
    def idle(self) -> bool:
        """Return whether `propose` may be called."""
        return self.stage is Stage.OPEN and self._command is None

    @property
    def view(self) -> int:
        """The number of the view that it asks in."""
        return self._quorums.view

    def start(self) -> ProposerOutput:
        """Ask for promises."""
        return self.again()

    def again(self) -> ProposerOutput:
        """Repeat what has not been answered, to all that have not answered it."""
        self._out = ProposerOutput()
        if self.stage in (Stage.LOOKING, Stage.READING):
            question = Prepare(self.epoch, self.state.slot, self.stage is Stage.LOOKING, self._quorums.view)
            waiting = [name for name in self._quorums.acceptors if name not in self._promises]
            self._out.send += [(name, question) for name in waiting]
        elif self._command is not None and self.stage is not Stage.OVER:
            self._ask(except_for={name for name, _ in self._accepted})
        return self._out

    def propose(self, command: Command) -> ProposerOutput:
        """Put *command* into the next slot; the proposer must be `idle`."""
        if not self.idle:
            raise AssertionError(f"{self.stage.value}: one command at a time")
        self._out = ProposerOutput()
        self._begin(command)
        return self._out

    def move(self, quorums: Quorums) -> ProposerOutput:
        """Go on in a later view, which was decided.  What is in flight stays so; then the log moves (`Moved`)."""
        self._out = ProposerOutput()
        if quorums.view <= self._quorums.view or self.stage is Stage.OVER:
            return self._out
        self._quorums = quorums
        # What was answered in an earlier view proves nothing about quorums of this one.
        self._promises.clear()
        self._accepted.clear()
        self.strangers = {name: disk for name, disk in self.strangers.items() if name in quorums.acceptors}
        if self.idle:
            self._begin(Moved(quorums.view))
        else:
            self.again()
        return self._out

    def learn(self, *, everyone: bool = True) -> ProposerOutput:
        """Tell all what is chosen, for there is nothing more to propose just now; or those alone that are not known to have it."""
        self._out = ProposerOutput()
        if self.idle:
            question = Learn(self.epoch, self.state.slot, self._quorums.view)
            behind = [name for name in self._quorums.acceptors if self._has.get(name, 0) < self.state.slot]
            self._out.send += [(name, question) for name in (self._quorums.acceptors if everyone else behind)]
        return self._out

    def received(self, answer: Answer) -> ProposerOutput:
        """Take an acceptor's answer, however late, and however often."""
        self._out = ProposerOutput()
        if answer.epoch != self.epoch or self.stage is Stage.OVER:
            return self._out
        if isinstance(answer, Refused):
            self._refused(answer)
        elif answer.view != self._quorums.view:
            # An answer of an earlier view counts in none of this one's quorums.
            self._out.outdated = answer.view if answer.view > self._quorums.view else 0
        elif isinstance(answer, Outdated):
            pass  # of a view that this one has moved to since
        elif isinstance(answer, Promise):
            self._promised(answer)
        else:
            self._took(answer)
        return self._out

    def _turn(self, turn: Turn) -> None:
        self.stage = STAGES[self.stage, turn]

    # ------------------------------------------------------------------------------------------------------ phase one

    def _refused(self, answer: Refused) -> None:
        if answer.promised > self.epoch:
            self._turn(Turn.SUPERSEDED)
            self._out.fenced = answer.promised
        elif not answer.promised and self.state.counts(answer.acceptor, answer.incarnation):
            # It was admitted meanwhile, and has not heard.  To admit it again would wait for all others once more.
            self._give(answer.acceptor, answer.incarnation)
        elif not answer.promised:
            self._stranger(answer)

    def _stranger(self, answer: Refused | Accepted) -> None:
        """Note a disk that does not count.  The first one of an acceptor did until another was admitted: it speaks late."""
        if answer.incarnation != FIRST:
            self.strangers[answer.acceptor] = answer.incarnation

    def _promised(self, answer: Promise) -> None:
        if self.stage is not (Stage.LOOKING if answer.look else Stage.READING):
            return
        self._promises[answer.acceptor] = answer
        # A disk that was lost counts no more, as soon as its end has been read of anywhere.
        found = _admitted(self.state, list(self._promises.values()))
        counted = [each for each in self._promises.values() if found.counts(each.acceptor, each.incarnation)]
        if len(counted) < self._quorums.reads:
            return
        if self.stage is Stage.LOOKING:
            self._looked(counted)
            return
        self.state, seen = _behind(self.state, counted)
        # Rule 5: behind the marker nothing of an earlier epoch can ever be chosen, so that absence proves an abort.
        self._to_do = [*seen, Marker(self.epoch, self._holder)]
        self._turn(Turn.PROMISED)
        self._begin(self._to_do.pop(0))

    def _looked(self, seen: Sequence[Promise]) -> None:
        base, commands = _behind(self.state, seen)
        latest = max([base.epoch, *(each.epoch for each in commands if isinstance(each, Marker))])
        assert self._expect is not None
        if latest > self._expect or not latest:
            self.state = base
            self._turn(Turn.UNEXPECTED)
            self._out.unexpected = latest
            return
        self._turn(Turn.EXPECTED)
        self._promises.clear()
        self.again()

    # ------------------------------------------------------------------------------------------------------ phase two

    def _begin(self, command: Command) -> None:
        self._command, self._accepted = command, set()
        self._ask(except_for=())

    def _ask(self, except_for: Collection[str]) -> None:
        assert self._command is not None
        question = Accept(self.epoch, self.state.slot + 1, self._command, self.state.slot, self._quorums.view)
        for name in self._quorums.acceptors:
            # Who is admitted anew has no say in that.
            if name not in except_for and not (isinstance(self._command, Admit) and self._command.acceptor == name):
                self._out.send.append((name, question))

    def _took(self, answer: Accepted) -> None:
        if self.stage in (Stage.LOOKING, Stage.READING):
            return
        if not self.state.counts(answer.acceptor, answer.incarnation):
            self._stranger(answer)
            return
        self.strangers.pop(answer.acceptor, None)
        self._has[answer.acceptor] = answer.has
        # One that has missed something is given it at once: a lagging one does not count when the next one is lost.
        if answer.has < (answer.slot - 1 if answer.slot else self.state.slot):
            self._give(answer.acceptor)
        if self._command is None or answer.slot != self.state.slot + 1:
            return
        # The log has moved to a view when a quorum of it has all that came before.
        if isinstance(self._command, Moved) and answer.has < self.state.slot:
            return
        self._accepted.add((answer.acceptor, answer.incarnation))
        if len(self._accepted) >= self._quorums.writes:
            self._chose(self._command)

    def _chose(self, command: Command) -> None:
        self._command = None
        self.state.apply(command)
        if isinstance(command, Admit):
            self.strangers.pop(command.acceptor, None)
            self._give(command.acceptor, command.incarnation)
        # Rule 3: a quorum has it on disk, in this very epoch.
        if self.stage is Stage.OPEN:
            self._out.chosen = command
        if self._to_do:
            self._begin(self._to_do.pop(0))
        elif self.state.moved < self._quorums.view:
            self._begin(Moved(self._quorums.view))
        elif self.stage is Stage.OPENING:
            self._turn(Turn.OPENED)
            self._out.opened = True

    def _give(self, acceptor: str, incarnation: int = 0) -> None:
        """Send all that is chosen to one that has not got it; with an *incarnation*, to a disk that is admitted by it."""
        install = Install(self.epoch, self.state.copy(), incarnation, self._quorums.view)
        self._out.send.append((acceptor, install))


def _behind(known: LogState, promises: Sequence[Promise]) -> tuple[LogState, list[Command]]:
    """Return the longest chosen prefix, and the commands behind it: in each slot that of the greatest epoch in any answer."""
    base = max([known, *(each.base for each in promises if each.base is not None)], key=lambda base: base.slot)
    last = max((number for each in promises for number in each.slots), default=0)
    commands: list[Command] = []
    for number in range(base.slot + 1, last + 1):
        found = [each.slots[number] for each in promises if number in each.slots]
        commands.append(max(found, key=lambda slot: slot.epoch).command if found else Filler())
    return base, commands


def _admitted(known: LogState, promises: Sequence[Promise]) -> LogState:
    """Return a state with the incarnations that count after all commands in *promises*."""
    base, commands = _behind(known, promises)
    state = LogState(incarnations=dict(base.incarnations))
    for command in commands:
        if isinstance(command, Admit):
            state.apply(command)
    return state
