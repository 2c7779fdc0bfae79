"""Random worlds of one node's replicated log: acceptors, epochs that come and go, and messages that are lost, late and repeated.

Epochs never end by themselves: one that was superseded goes on proposing and answering from its memory.  What each of them would
tell a client is kept, and no two may contradict each other (design, rules 1, 3, 5 and 7).

The acceptors may change: views are decided one after the other, as by the log that all members share, the next one when this log
has moved to the one before; and each epoch hears of them at some time, from an acceptor at the latest.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

from txrpc._protocol.quorum import acceptor
from txrpc._protocol.quorum.acceptor import Answer, Disk, Question
from txrpc._protocol.quorum.commands import Admit, Forget, Record
from txrpc._protocol.quorum.proposer import Proposer, ProposerOutput, Stage
from txrpc._protocol.quorum.views import Quorums
from txrpc._protocol.records import Decision
from txrpc.ids import Epoch, Xid

__all__ = ["QuorumWorld", "Shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a world is made of."""

    acceptors: int = 3
    reads: int = 2
    writes: int = 2
    epochs: int = 4
    records: int = 6
    lost_disks: int = 1
    steps: int = 400
    views: int = 1

    @classmethod
    def of(cls, seed: int) -> Shape:
        """A shape for *seed*: any quorums that meet."""
        dice = random.Random(f"shape {seed}")
        if dice.random() < 0.3:  # what many epochs do one after the other takes time
            return cls(epochs=12, records=30, steps=1_000, lost_disks=dice.choice((0, 1)))
        acceptors = dice.choice((1, 2, 3, 3, 3, 4, 5))
        writes = dice.randint(1, acceptors)
        reads = dice.randint(acceptors - writes + 1, acceptors)
        # Else the loss of one takes what only it had accepted, or no epoch can read any more that would admit it anew.
        lost = dice.choice((0, 1)) if writes > 1 and max(reads, writes) < acceptors else 0
        return cls(acceptors, reads, writes, dice.randint(2, 5), dice.randint(1, 8), lost)

    @classmethod
    def changing(cls, seed: int) -> Shape:
        """A shape for *seed* in which members come and go."""
        dice = random.Random(f"changing {seed}")
        acceptors, lost = dice.choice((2, 3, 3, 4)), dice.choice((0, 0, 1))
        return cls(acceptors, 0, 0, dice.randint(4, 10), 40, lost, dice.choice((500, 900)), dice.randint(2, 9))


@dataclass
class QuorumWorld:
    """One run; `run` raises `AssertionError` where two answers contradict each other, or the log does not come to life again."""

    seed: int
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        names = tuple(f"a{number}" for number in range(self.shape.acceptors))
        majority = len(names) // 2 + 1
        self.views = [Quorums(names, self.shape.reads or majority, self.shape.writes or majority)]
        self.disks = {name: Disk(name) for name in names}
        self.epochs: list[Proposer] = []
        self.told: dict[Xid, bool] = {}
        self.forgotten: set[Xid] = set()
        self.owners: dict[Xid, Epoch] = {}
        self.in_flight: list[tuple[Proposer, str, Question | Answer]] = []
        self.cut: set[tuple[Epoch, str]] = set()
        """Epochs and acceptors that cannot reach each other for a while."""
        self.lost_disks = 0
        self.backups: dict[str, Disk] = {}
        self.records = 0
        self.chosen = 0

    @property
    def quorums(self) -> Quorums:
        """Those of the latest view."""
        return self.views[-1]

    # ------------------------------------------------------------------------------------------------------ what happens

    def run(self) -> None:
        """Trouble, and then none."""
        self._open()
        for _ in range(self.shape.steps):
            self._step()
        self.in_flight.clear()
        self.cut.clear()
        last = self._open()
        for _ in range(60):
            self._apply(last, last.again())
            while self.in_flight:
                self._deliver(0)
            self._admit(last)
            if last.idle and all(self.disks[name].votes for name in self.quorums.acceptors):
                break
        assert last.stage is Stage.OPEN, (
            f"seed {self.seed}: nothing stands in the way, and epoch {last.epoch} does not open"
        )
        for xid in self.told:
            self._ask(last, xid)

    def _step(self) -> None:
        what = self.dice.random()
        if self.in_flight and what < 0.6:
            newest = len(self.in_flight) if self.dice.random() < 0.1 else min(len(self.in_flight), 5)
            self._deliver(len(self.in_flight) - 1 - self.dice.randrange(newest))
        elif what < 0.65:
            self._partition(self.dice.choice(self.epochs))
        elif what < 0.67 and len(self.epochs) < self.shape.epochs:
            self._open()
        elif what < 0.675:
            self._back_up()
        elif what < 0.70 and self.lost_disks < self.shape.lost_disks and self._may_lose():
            self._lose_disk()
        elif what < 0.76 and len(self.views) < self.shape.views:
            self._change_view()
        else:
            self._work(self.dice.choice(self.epochs))

    def _open(self) -> Proposer:
        number = max((each.epoch.number for each in self.epochs), default=0) + 1
        own = self.disks[self.dice.choice(sorted(self.disks))].base
        known = own.copy() if self.dice.random() < 0.3 else None
        # A member that has been away has not heard of the latest views.
        late = self.in_flight and self.dice.random() < 0.6
        quorums = self.dice.choice(self.views) if late else self.quorums
        proposer = Proposer(Epoch.make(number, self.dice.getrandbits(16)), quorums, known=known)
        self.epochs.append(proposer)
        self._apply(proposer, proposer.start())
        return proposer

    def _work(self, proposer: Proposer) -> None:
        """Ask again, record, forget, admit, or answer a question."""
        what = self.dice.random()
        if what < 0.3 or not proposer.idle:
            self._apply(proposer, proposer.again())
        elif what < 0.6 and self.records < self.shape.records:
            self.records += 1
            xid = Xid(self.records.to_bytes(16, "big"))
            self.owners[xid] = proposer.epoch
            self._apply(proposer, proposer.propose(Record((Decision(xid, proposer.epoch, self.records, ()),))))
        elif what < 0.7 and proposer.state.decisions:
            xid = self.dice.choice(sorted(proposer.state.decisions))
            self._tell(xid, committed=True)
            self._apply(proposer, proposer.propose(Forget(frozenset({xid}), self.records)))
        elif what < 0.8:
            self._admit(proposer)
        elif what < 0.82:
            self._apply(proposer, proposer.learn())
        elif what < 0.88:
            self._apply(proposer, proposer.move(self.quorums))
        elif self.owners:
            self._ask(proposer, self.dice.choice(sorted(self.owners)))

    def _partition(self, proposer: Proposer) -> None:
        """From now on it reaches some acceptors, and others not; what is under way to those is lost."""
        self.cut -= {(proposer.epoch, name) for name in self.disks}
        if self.dice.random() < 0.6:
            self.cut |= {(proposer.epoch, name) for name in self.disks if self.dice.random() < 0.5}

    def _change_view(self) -> None:
        """The next view is decided: one member more or less."""
        now = self.quorums
        outside = [f"a{number}" for number in range(6) if f"a{number}" not in now.acceptors]
        # Mostly in one direction: after some changes none of the first acceptors is left.
        onwards = self.dice.random() < 0.7
        if outside and (len(now.acceptors) == 1 or self.dice.random() < 0.45):
            fresh = [name for name in outside if name not in self.disks]
            acceptors = tuple(sorted((*now.acceptors, fresh[0] if fresh and onwards else self.dice.choice(outside))))
        else:
            gone = now.acceptors[0] if onwards else self.dice.choice(now.acceptors)
            acceptors = tuple(name for name in now.acceptors if name != gone)
        number = len(acceptors)
        writes = self.dice.randint(1, number) if self.dice.random() < 0.3 else number // 2 + 1
        reads = self.dice.randint(number - writes + 1, number) if self.dice.random() < 0.3 else number // 2 + 1
        if reads + writes <= number:
            return
        following = Quorums(acceptors, reads, writes, now.view + 1)
        if self._may_follow(now, following):
            self.views.append(following)
            for name in set(acceptors) - set(now.acceptors):
                incarnation = 2 + self.dice.getrandbits(30)
                # One that was a member before brings its old disk, which is distrusted, or an empty one.
                old = self.disks.get(name) if self.dice.random() < 0.5 else None
                self.disks[name] = old or Disk(name)
                self.disks[name].incarnation, self.disks[name].votes = incarnation, False

    def _may_follow(self, now: Quorums, following: Quorums) -> bool:
        voting = [name for name in now.acceptors if name in following.acceptors and self.disks[name].votes]
        moved = any(each.state.moved >= now.view for each in self.epochs)
        return moved and now.meets(following) and len(voting) >= max(following.reads, following.writes)

    def _back_up(self) -> None:
        """What a disk holds now may come back later."""
        name = self.dice.choice(sorted(self.disks))
        self.backups[name] = copy.deepcopy(self.disks[name])

    def _may_lose(self) -> bool:
        """Else no quorum of others would be there to let a new disk in."""
        now = self.quorums
        whole = all(self.disks[name].votes for name in now.acceptors)
        return whole and max(now.reads, now.writes) < len(now.acceptors)

    def _lose_disk(self) -> None:
        """An empty disk takes the place of one, or an older one that is known to be that."""
        # Mostly one that knows what others may not.
        members = self.quorums.acceptors
        telling = [name for name in members if self.disks[name].slots and self.disks[name].votes]
        name = self.dice.choice(telling if telling and self.dice.random() < 0.8 else members)
        self.lost_disks += 1
        incarnation = self.disks[name].incarnation + 1
        self.disks[name] = self.backups.pop(name, Disk(name))
        self.disks[name].incarnation, self.disks[name].votes = incarnation, False

    def _admit(self, proposer: Proposer) -> None:
        for name, incarnation in list(proposer.strangers.items()):
            if proposer.idle:
                self._apply(proposer, proposer.propose(Admit(name, incarnation)))

    # ------------------------------------------------------------------------------------------------------ messages

    def _deliver(self, index: int) -> None:
        proposer, name, message = self.in_flight[index]
        if self.dice.random() > 0.1 or len(self.in_flight) > 200:
            del self.in_flight[index]
        if (proposer.epoch, name) in self.cut:
            return
        if isinstance(message, Question):
            self.in_flight.append((proposer, name, acceptor.answer(self.disks[name], message)))
        else:
            self._apply(proposer, proposer.received(message))

    def _apply(self, proposer: Proposer, out: ProposerOutput) -> None:
        self.in_flight += [(proposer, name, question) for name, question in out.send]
        if out.outdated:
            self._apply(proposer, proposer.move(self.views[out.outdated - 1]))
        if isinstance(out.chosen, Record):
            self.chosen += 1
            for decision in out.chosen.decisions:
                self._tell(decision.xid, committed=True)
        elif isinstance(out.chosen, Forget):
            self.forgotten |= out.chosen.xids
        if out.opened:
            for xid in self.owners:
                self._ask(proposer, xid)

    # ------------------------------------------------------------------------------------------------------ answers

    def _ask(self, proposer: Proposer, xid: Xid) -> None:
        """A client asks an open epoch how a transaction of an earlier one has ended."""
        if proposer.stage is not Stage.OPEN:
            return
        decided_ms = int.from_bytes(xid, "big")
        if xid in proposer.state.decisions:
            self._tell(xid, committed=True)
        elif self.owners[xid] < proposer.epoch and decided_ms > proposer.state.forgotten_ms:
            self._tell(xid, committed=False)

    def _tell(self, xid: Xid, *, committed: bool) -> None:
        before = self.told.setdefault(xid, committed)
        assert before == committed, f"seed {self.seed}: {xid} is called committed, and aborted"
