"""The disks of a group of coordinators, in place of the one that they share: the real log over them, in the simulator's time.

What is real: `GroupLog`, its proposers and acceptors, the log that all members share, the changes of its members, and the bytes on
their way.  What is simulated: the disks, the network between members, and the time that a caller waits, in which nothing else
happens.  Which members cannot reach each other changes from one moment to the next.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

from txrpc._decision_log.memory import MemoryLog
from txrpc._decision_log.port import DecisionLog, LogError, Opened
from txrpc._group.acceptor import LocalAcceptor, blank
from txrpc._group.changes import GroupChanges
from txrpc._group.inbox import Inbox
from txrpc._group.log import GroupLog
from txrpc._group.members import changed
from txrpc._group.peers import Peers
from txrpc._group.replica import NoQuorum
from txrpc._group.shared import SHARED, SharedLog
from txrpc._protocol.quorum.acceptor import Answer, Question, answer
from txrpc._protocol.quorum.acceptor import Disk as AcceptorDisk
from txrpc._protocol.quorum.commands import LogState, Marker
from txrpc._protocol.quorum.views import View
from txrpc._wire.commands import view_from, view_to
from txrpc._wire.peer import answer_to, question_from
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import Epoch
from verification.simulation.engine import Disk
from verification.simulation.options import Options
from verification.simulation.scheduler import Scheduler

__all__ = ["GroupDisk"]

_FIRST = ("c1", "c2", "c3")
_LATE_MS = 30_000
_PATIENCE = 5_000


class _Inbox(Inbox):
    """While its proposer waits nothing else happens in the world."""

    def __init__(self) -> None:
        super().__init__()
        self._answers_here: deque[Answer] = deque()
        self._now_s = 0.0

    def put(self, answer: Answer) -> None:
        self._answers_here.append(answer)

    def get(self, timeout_s: float) -> Answer | None:
        if self._answers_here:
            return self._answers_here.popleft()
        self.sleep(max(0.0, timeout_s))
        return None

    def now_s(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


class _Member:
    """One member's disk, as `LocalAcceptor` keeps it, and what its process has heard of the others."""

    def __init__(self, name: str, view: View, incarnation: int = 1) -> None:
        self.name = name
        self.heard = view
        self.kept: View | None = None if view.number == 1 else view
        self.incarnation = incarnation
        self.disks: dict[str, AcceptorDisk] = {}

    def ask(self, log: str, question: Question) -> Future[Answer]:
        return _done(answer(self._disk(log), question))

    def state(self, log: str) -> Future[LogState]:
        return _done(self._disk(log).base.copy())

    def votes(self, log: str) -> bool:
        return self._disk(log).votes

    def kept_view(self) -> View | None:
        return self.kept

    def keep_view(self, view: View) -> Future[None]:
        self.kept = view
        return _done(None)

    def _disk(self, log: str) -> AcceptorDisk:
        if log not in self.disks:
            base = blank(self.kept, log)
            votes = base.counts(self.name, self.incarnation)
            self.disks[log] = AcceptorDisk(self.name, self.incarnation, votes, base=base)
        return self.disks[log]

    def lose_disk(self, dice: random.Random) -> None:
        """Its disk is an empty one from now on, and the process knows it."""
        self.incarnation = 2 + dice.getrandbits(30)
        self.disks.clear()
        for log in (SHARED, *self.heard.addresses, *self.heard.former):
            self._disk(log).votes = blank(self.kept, log).counts(self.name, self.incarnation)


class _Peers:
    """What `Peers` is to one process of a member."""

    def __init__(self, disk: GroupDisk, member: _Member) -> None:
        self._disk, self._member = disk, member
        self.trouble: dict[str, str] = {}

    @property
    def view(self) -> View:
        return self._member.heard

    @property
    def is_member(self) -> bool:
        return self._member.name in self.view.addresses

    def inbox(self) -> Inbox:
        return _Inbox()

    def adopt(self, view: View) -> None:
        if view.number > self._member.heard.number:
            self._member.heard = view
            self._member.keep_view(view)

    def label(self) -> peer_pb2.PeerGroup:
        return peer_pb2.PeerGroup(name="group", id=1, sender=self._member.name, view=view_to(self.view))

    def too_few(self) -> str:
        return "too few members of the group answer"

    def ask(self, member: str, message: peer_pb2.PeerQuestion, answered: Callable[[Any], None]) -> None:
        if member in self.view.addresses:
            self._disk.carry(self._member.name, member, message.SerializeToString(), answered, self.trouble)


class GroupDisk(Disk):
    """See the module's docstring."""

    def __init__(self, scheduler: Scheduler, options: Options, seed: int) -> None:
        super().__init__(scheduler, options)
        self._dice = random.Random(f"group {seed}")
        random.seed(f"group {seed}")  # what the real parts draw
        self.cuts = options.member_cuts
        view = View(1, {name: f"{name}:1" for name in _FIRST}, 2, 2)
        self.view = view
        self.members = {name: _Member(name, view) for name in _FIRST}
        self._apart: set[tuple[str, str]] = set()
        """Members of which the first cannot be heard by the second, at this moment."""
        self._drawn_ms = -1
        self._nodes = set(_FIRST[: options.nodes])
        """Members that run coordinators."""

    # ----------------------------------------------------------------------------------------------------- the network

    def _redraw(self) -> None:
        self._drawn_ms = self._scheduler.now_ms
        pairs = [(one, other) for one in self.members for other in self.members if one != other]
        # All ways of one member at once, or any single one.
        gone = {name for name in self.members if self._dice.random() < self.cuts / 3}
        self._apart = {pair for pair in pairs if gone & {*pair} or self._dice.random() < self.cuts}

    def carry(
        self, asker: str, member: str, data: bytes, answered: Callable[[Any], None], trouble: dict[str, str]
    ) -> None:
        """Bring a question to *member* and its answer back, if they get through; or later; or never."""
        if self._drawn_ms != self._scheduler.now_ms:
            self._redraw()
        if (asker, member) in self._apart:
            trouble[member] = "no answer (unavailable)"
            self._perhaps_later(lambda: self._hear(member, data))
            return
        reply = self._answer(member, data)
        if reply is None:
            return
        if (member, asker) in self._apart:
            trouble[member] = "no answer (unavailable)"
            self._perhaps_later(lambda: answered(reply))
            return
        trouble.pop(member, None)
        answered(reply)

    def _perhaps_later(self, deliver: Callable[[], None]) -> None:
        if self._dice.random() < 0.3:
            self._scheduler.after(self._dice.randint(1, _LATE_MS), deliver)

    def _hear(self, member: str, data: bytes) -> None:
        self._answer(member, data)

    def _answer(self, member: str, data: bytes) -> peer_pb2.PeerAnswer | None:
        """What the member's service does."""
        there = self.members[member]
        request = peer_pb2.PeerQuestion.FromString(data)
        told = view_from(request.group.view)
        if told.number > there.heard.number:
            there.heard = told
            there.keep_view(told)
        question = question_from(request)
        if question.view > there.heard.number:
            return None
        return answer_to(there.ask(request.log, question).result(), there.heard)

    # ------------------------------------------------------------------------------------------------------- the log

    def _ports(self, name: str) -> tuple[LocalAcceptor, Peers]:
        member = self.members[name]
        return cast("LocalAcceptor", member), cast("Peers", _Peers(self, member))

    def new_log(self, process_of: str) -> DecisionLog:
        """See `Disk.new_log`."""
        acceptor, peers = self._ports(process_of)
        return GroupLog(acceptor, peers, SharedLog(acceptor, peers))

    def open(self, log: DecisionLog, node: str, holder: str, expect: Epoch | None) -> Opened:
        """A process tries it until it succeeds, with a number of its own each time; here without any time between."""
        for _ in range(_PATIENCE):
            try:
                opened = log.open(node, self._dice.getrandbits(32), holder, expect)
            except NoQuorum:
                self._redraw()
            else:
                self._show(node, opened.epoch, holder or node)
                return opened
        raise AssertionError(f"the log of {node} cannot be opened")

    def _show(self, node: str, epoch: Epoch, holder: str) -> None:
        """What the members' heartbeats say."""
        MemoryLog(self).open(node, 0, holder)
        self.nodes[node].epochs, self.nodes[node].holder = {epoch: 0}, holder

    def hear_of_epochs(self) -> None:
        """See `Disk.hear_of_epochs`: an epoch that has only begun to open a log is in the way of who expects an earlier one."""
        for node in self.nodes:
            disks = [member.disks[node] for member in self.members.values() if node in member.disks]
            markers = [slot.command for disk in disks for slot in disk.slots.values()]
            begun = [(each.epoch, each.holder) for each in markers if isinstance(each, Marker)]
            epoch, holder = max([(disk.base.epoch, disk.base.holder) for disk in disks] + begun)
            if epoch > max(self.nodes[node].epochs):
                self._show(node, epoch, holder or node)

    def tells_of_epochs(self) -> bool:
        """See `Disk.tells_of_epochs`: sometimes it learns only when it is fenced."""
        return self._dice.random() < 0.5

    @property
    def names(self) -> dict[str, str]:
        """What resource names mean, as the member knows that has the most of the shared log."""
        furthest = max(
            (member.state(SHARED).result() for member in self.members.values()), key=lambda state: state.slot
        )
        return furthest.names

    # ------------------------------------------------------------------------------------------------------- troubles

    def repair(self) -> None:
        """From now on all members reach each other."""
        self.cuts, self._drawn_ms = 0.0, -1

    def lose_disk(self) -> str:
        """A member's disk is lost, if those that it had answered can be asked all the same; returns whose."""
        name = self._dice.choice(sorted(self.view.addresses))
        if not self._whole() or max(self.view.reads, self.view.writes) == len(self.view.addresses):
            return ""
        self.members[name].lose_disk(self._dice)
        return name

    def change(self) -> str:
        """A member comes or goes that runs no coordinator; returns the new members, if the group could bear it."""
        view = self.view
        idle = sorted(view.addresses.keys() - self._nodes)
        asked = self._dice.choice(sorted(view.addresses))
        acceptor, peers = self._ports(asked)
        if idle and (len(view.addresses) > 3 or self._dice.random() < 0.4):
            following = changed(view, {}, [self._dice.choice(idle)])
        else:
            name = f"c{4 + view.number}"
            following = changed(view, {name: f"{name}:1"})
        shared = SharedLog(acceptor, peers)
        stay = [name for name in view.names if name in following.addresses]
        if not self._whole() or len(stay) < max(following.reads, following.writes) or peers.view != view:
            return ""
        if view.number > 1 and GroupChanges(acceptor, peers, shared).unmoved(view):
            return ""
        for name in following.addresses.keys() - self.members.keys():
            self.members[name] = _Member(name, view, 2 + self._dice.getrandbits(30))
        try:
            decided = shared.change_view(following)
        except (LogError, Fenced, ConfigurationError):
            return ""
        self.view = decided
        return ",".join(decided.names) if replace(decided, born=following.born) == following else ""

    def _whole(self) -> bool:
        """Return whether every disk of the members votes in every log."""
        logs = (SHARED, *self.view.addresses, *self.view.former)
        return all(self.members[name].votes(log) for name in self.view.addresses for log in logs)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
