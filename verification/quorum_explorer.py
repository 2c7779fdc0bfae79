"""Every interleaving of a small group: ``python -m verification.quorum_explorer`` walks through all of them, breadth first.

Acceptors, and epochs that open one node's log one after the other or at the same time; each records decisions when it is open, and
says of the earlier ones' what it has found.  A question that was sent stays there: it may arrive at any time, again and again, or
never.  An acceptor may lose its disk, or get it back from a backup, at any moment.

An answer arrives at once, or never.  To let it arrive later as well would find nothing more, and take a thousand times as many
states: an epoch collects answers into sets, what it sends upon them may be late in any case, and what it has once said stays
said; so any run has its like in which each answer that counted came when it was given, and the others were lost.

What must hold in every state: no slot of the log has two commands (Lamport's safety of consensus, Schneider's equal replicas), and
of no transaction both ends are told (rules 1, 3, 5 and 7).

A state is a handful of numbers: each part of it, and each message, is kept once, and what a part does with a message is worked out
once.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeAlias

import click

from txrpc._protocol.quorum import acceptor
from txrpc._protocol.quorum.acceptor import Disk, Question, Unsaved
from txrpc._protocol.quorum.commands import Admit, Command, LogState, Record
from txrpc._protocol.quorum.proposer import Proposer, ProposerOutput, Stage
from txrpc._protocol.quorum.views import Quorums
from txrpc._protocol.records import Decision
from txrpc.ids import Epoch, Xid
from verification.explorer import Mistake

__all__ = ["STORIES", "GroupExplored", "GroupStory", "explore_group", "main"]


@dataclass(frozen=True, slots=True)
class GroupStory:
    """A small world."""

    acceptors: int = 3
    epochs: int = 2
    records: tuple[int, ...] = (1, 0)
    """Of each epoch."""
    opened: bool = True
    """Whether the first epoch is open at all acceptors when the story begins."""
    looks: bool = False
    """Whether the later epochs are takeovers, which look before they promise."""
    loses: str = ""
    """Whether the first acceptor, for they are alike, may lose its disk, and have an "empty" one instead, or an "older" one."""
    quorums: tuple[int, int] = (2, 2)


STORIES: dict[str, GroupStory] = {
    "two proposers": GroupStory(),
    "a takeover": GroupStory(looks=True),
    "a disk is lost": GroupStory(loses="empty"),
    "a disk comes back from a backup": GroupStory(loses="older"),
    "two proposers begin at once": GroupStory(opened=False),
    "two records": GroupStory(records=(2, 0)),
}


@dataclass(frozen=True, slots=True)
class GroupExplored:
    """How far one story was followed."""

    story: str
    states: int
    steps: int
    ends: frozenset[str]
    """What was told: ``x1 committed`` and such."""
    seconds: float


_State: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int, int, int, bool]
"""Numbers of the disks and the epochs; which questions there are, and what was told, as bits; the log; whether a disk was lost."""


@dataclass(frozen=True, slots=True)
class _Effect:
    """What a part has done with a message."""

    part: int
    messages: int = 0
    told: int = 0
    chosen: tuple[tuple[int, int], ...] = ()
    """Slots, and the numbers of the commands in them."""


@dataclass(slots=True)
class _Shelf:
    """Values that are kept once, each under a number; `take` gives a copy."""

    values: list[Any] = field(default_factory=list)
    numbers: dict[Any, int] = field(default_factory=dict)

    def put(self, value: Any) -> int:
        plain = _plain(value)
        number = self.numbers.get(plain)
        if number is None:
            number = self.numbers[plain] = len(self.values)
            self.values.append(pickle.dumps(value, 5))
        return number

    def take(self, number: int) -> Any:
        return pickle.loads(self.values[number])


def _plain(value: Any) -> Any:
    """Equal for what is equal, whatever has come first in it, and whatever shares an object with something else."""
    if isinstance(value, Proposer):
        return _plain(vars(value))
    if is_dataclass(value):
        return type(value).__name__, *[_plain(getattr(value, each.name)) for each in fields(value)]
    if isinstance(value, dict):
        return tuple(sorted(((_plain(key), _plain(held)) for key, held in value.items()), key=repr))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(_plain, value), key=repr))
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value


class _World:
    """The parts of one story, and what each does."""

    def __init__(self, story: GroupStory) -> None:
        self.story = story
        self.names = [f"a{number}" for number in range(story.acceptors)]
        self.quorums = Quorums(tuple(self.names), *story.quorums)
        self.epochs = [Epoch.make(number + 1, 7) for number in range(story.epochs)]
        self.parts, self.commands, self.messages = _Shelf(), _Shelf(), _Shelf()
        self.logs: dict[tuple[int, ...], int] = {(): 0}
        self.log_of: list[tuple[int, ...]] = [()]
        self.replies = _Shelf()
        self.answered: dict[tuple[int, int], tuple[int, int]] = {}
        self.done: dict[tuple[int, int], _Effect] = {}
        self.heads: list[tuple[int, int, str]] = []
        """Of each question: which acceptor it is for, whose it is, and its name."""
        self.facts: list[str] = []
        self.doing = ""
        """The last step that was taken."""
        self.backup = 0

    # ---------------------------------------------------------------------------------------------------------- parts

    def begin(self) -> _State:
        """All disks are empty, and no epoch has asked yet; but what it will ask is on its way."""
        disks = {name: Disk(name) for name in self.names}
        epochs, messages, log = [], 0, 0
        for number, epoch in enumerate(self.epochs):
            expect = self.epochs[0] if self.story.looks and number else None
            proposer = Proposer(epoch, self.quorums, f"c{number + 1}", expect=expect)
            out = proposer.start()
            if self.story.opened and not number:
                out = self._open(proposer, out, disks)
            effect = self._after(number, proposer, out)
            for slot, command in effect.chosen:
                log = self._extend(log, slot, command)
            epochs.append(effect.part)
            messages |= effect.messages
        numbers = tuple(self.parts.put(disk) for disk in disks.values())
        self.backup = numbers[0]
        return numbers, tuple(epochs), messages, 0, log, False

    def _open(self, proposer: Proposer, out: ProposerOutput, disks: dict[str, Disk]) -> ProposerOutput:
        """Let every message of it arrive."""
        opened = out
        waiting = list(out.send)
        while waiting:
            name, question = waiting.pop(0)
            out = proposer.received(acceptor.answer(disks[name], question))
            disks[name].unsaved = Unsaved()
            waiting += out.send
            opened = out if out.opened else opened
        return replace(opened, send=[])

    def taken(self, part: int, message: int) -> tuple[int, int]:
        """What an acceptor becomes by a question, and what it answers, worked out once."""
        effect = self.answered.get((part, message))
        if effect is None:
            effect = self.answered[part, message] = self._take(part, message)
        return effect

    def _take(self, part: int, message: int) -> tuple[int, int]:
        disk: Disk = self.parts.take(part)
        reply = acceptor.answer(disk, self.messages.take(message)[1])
        disk.unsaved = Unsaved()
        return self.parts.put(disk), self.replies.put(reply)

    def heard(self, part: int, reply: int) -> _Effect:
        """What an epoch does with an answer, worked out once."""
        effect = self.done.get((part, reply))
        if effect is None:
            proposer: Proposer = self.parts.take(part)
            index = self.epochs.index(proposer.epoch)
            effect = self._after(index, proposer, proposer.received(self.replies.take(reply)))
            self.done[part, reply] = effect
        return effect

    def _after(self, index: int, proposer: Proposer, out: ProposerOutput) -> _Effect:
        """Everything that an epoch does by itself after a step."""
        messages, told, chosen = 0, 0, []
        while True:
            for name, question in out.send:
                messages |= 1 << self._send(self.names.index(name), question)
            if isinstance(out.chosen, Record):
                told |= self._tell(out.chosen.decisions[0].xid, committed=True)
            if out.opened:
                told |= self._ask(index, proposer)
            if proposer.stage is Stage.OPEN:
                chosen.append(self._log_of(proposer))
            following = self._next(index, proposer)
            if following is None:
                break
            out = proposer.propose(following)
        self._tidy(proposer)
        part = self.parts.put(proposer)
        return _Effect(part, messages, told, tuple(each for each in chosen if each[0]))

    def _tidy(self, proposer: Proposer) -> None:
        """Drop what it will not look at any more."""
        proposer._out = ProposerOutput()
        proposer._has.clear()
        if proposer.stage not in (Stage.LOOKING, Stage.READING):
            proposer._promises.clear()
        if proposer.stage is Stage.OVER:
            proposer.state, proposer._command, proposer._to_do = LogState(), None, []
            proposer._accepted.clear()
            proposer.strangers.clear()

    def _next(self, index: int, proposer: Proposer) -> Command | None:
        if not proposer.idle:
            return None
        if proposer.strangers:
            return Admit(*min(proposer.strangers.items()))
        recorded = sum(each.epoch == proposer.epoch for each in proposer.state.decisions.values())
        if recorded < self.story.records[index]:
            return Record((Decision(self._xid(index, recorded + 1), proposer.epoch, 1_000, ()),))
        return None

    def _log_of(self, proposer: Proposer) -> tuple[int, int]:
        state = proposer.state
        same = (sorted(state.decisions), sorted(state.epochs.items()), sorted(state.incarnations.items()), state.holder)
        return state.slot, self.commands.put(same)

    def _xid(self, index: int, number: int) -> Xid:
        return Xid((index + 1).to_bytes(8, "big") + number.to_bytes(8, "big"))

    def _ask(self, index: int, proposer: Proposer) -> int:
        """An epoch that has opened the log answers how the transactions of earlier ones have ended."""
        told = 0
        for earlier in range(index):
            for number in range(1, self.story.records[earlier] + 1):
                xid = self._xid(earlier, number)
                told |= self._tell(xid, committed=xid in proposer.state.decisions)
        return told

    def _tell(self, xid: Xid, *, committed: bool) -> int:
        who, number = int.from_bytes(xid[:8], "big"), int.from_bytes(xid[8:], "big")
        fact = f"x{who}.{number} {'committed' if committed else 'aborted'}"
        if fact not in self.facts:
            self.facts.append(fact)
        return 1 << self.facts.index(fact)

    def _send(self, to: int, question: Question) -> int:
        number = self.messages.put((to, question))
        if number == len(self.heads):
            slot = f" of slot {slot}" if (slot := getattr(question, "slot", 0)) else ""
            name = f"{type(question).__name__}{slot} of epoch {question.epoch.number} reaches {self.names[to]}"
            self.heads.append((to, self.epochs.index(question.epoch), name))
        return number

    # ---------------------------------------------------------------------------------------------------------- steps

    def steps(self, state: _State) -> Iterator[tuple[str, _State]]:
        """All that can happen next."""
        disks, epochs, messages, told, log, lost = state
        rest = messages
        while rest:
            bit = rest & -rest
            rest ^= bit
            message = bit.bit_length() - 1
            index, asker, name = self.heads[message]
            self.doing = name
            part, reply = self.taken(disks[index], message)
            changed = disks if part == disks[index] else (*disks[:index], part, *disks[index + 1 :])
            if changed is not disks:
                yield f"{name}, and the answer is lost", (changed, epochs, messages, told, log, lost)
            effect = self.heard(epochs[asker], reply)
            if effect.part == epochs[asker] and not effect.messages & ~messages and not effect.told & ~told:
                continue
            after = log
            for slot, command in effect.chosen:
                after = self._extend(after, slot, command)
            others = (*epochs[:asker], effect.part, *epochs[asker + 1 :])
            yield name, (changed, others, messages | effect.messages, told | effect.told, after, lost)
        yield from self._losses(state)

    def _losses(self, state: _State) -> Iterator[tuple[str, _State]]:
        disks, epochs, messages, told, log, lost = state
        if self.story.loses and not lost:
            disk: Disk = self.parts.take(self.backup) if self.story.loses == "older" else Disk(self.names[0])
            disk.incarnation, disk.votes = disk.incarnation + 1, False
            changed = (self.parts.put(disk), *disks[1:])
            yield f"{disk.acceptor} has lost its disk", (changed, epochs, messages, told, log, True)

    def _extend(self, log: int, slot: int, command: int) -> int:
        """The log with what was chosen for *slot*; raises `AssertionError` if that was something else before."""
        held = self.log_of[log]
        full = held + (-1,) * (slot - len(held))
        if full[slot - 1] not in (-1, command):
            raise AssertionError(f"slot {slot} has two commands")
        longer = (*full[: slot - 1], command, *full[slot:])
        if longer not in self.logs:
            self.logs[longer] = len(self.log_of)
            self.log_of.append(longer)
        return self.logs[longer]

    def check(self, told: int) -> None:
        """Nothing was told to have ended in both ways."""
        facts = {fact for number, fact in enumerate(self.facts) if told >> number & 1}
        both = [fact for fact in facts if fact.replace("committed", "aborted") in facts and "committed" in fact]
        assert not both, f"{both[0]}, and aborted"


def explore_group(name: str, most: int = 2_000_000) -> GroupExplored:
    """Follow a story through every interleaving.  Raises `Mistake`, or `MemoryError` if there are more than *most* states."""
    began = time.monotonic()
    world = _World(STORIES[name])
    first = world.begin()
    numbers = {first: 0}
    states, came_from = [first], [(0, "")]
    steps, ends = 0, 0
    at = 0
    while at < len(states):
        try:
            for step, following in world.steps(states[at]):
                steps += 1
                if following not in numbers:
                    numbers[following] = len(states)
                    states.append(following)
                    came_from.append((at, step))
                    if following[3] & ~states[at][3]:
                        world.check(following[3])
                        ends |= following[3]
        except AssertionError as error:
            way = [*_way(came_from, at), world.doing]
            raise Mistake(f"{name}: {str(error).partition(chr(10))[0]}", way) from error
        at += 1
        if len(states) > most:
            raise MemoryError(f"{name}: more than {most} states")
    told = frozenset(fact for number, fact in enumerate(world.facts) if ends >> number & 1)
    return GroupExplored(name, len(states), steps, told, time.monotonic() - began)


def _way(came_from: list[tuple[int, str]], at: int) -> list[str]:
    way: list[str] = []
    while at:
        at, step = came_from[at]
        way.insert(0, step)
    return way


@click.command()
@click.argument("stories", nargs=-1)
@click.option("--most", default=5_000_000, show_default=True, help="States.")
def main(stories: tuple[str, ...], most: int) -> None:
    """Walk through every interleaving of STORIES (all of them by default)."""
    for story in stories or STORIES:
        try:
            found = explore_group(story, most)
        except Mistake as mistake:
            click.echo(str(mistake))
            sys.exit(1)
        told = ", ".join(sorted(found.ends))
        click.echo(f"{story}: {found.states:,} states, {found.steps:,} steps ({told}), {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
