"""A coordinator in a rough world: processes with databases, clients, a log, and a network that loses, repeats and reorders.

Everything but the coordinator is as dumb as can be: a database is a dictionary from branch to how it stands, a process
answers from that dictionary, the log is a dictionary too.  `World.step` does one of the things that can happen now.  The
checker sits where effects are honoured and looks only at messages, the log and the databases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.protocol.coordinator_database import Work, react, vote
from tests.protocol.coordinator_kit import CLOCK, ENOUGH, FULL, T0, bid, xid
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid
from txrpc.protocol.coordinator import Coordinator
from txrpc.protocol.events import (
    Event,
    Forgot,
    Limits,
    Logged,
    LogHealth,
    Looked,
    Lookup,
    NotLogged,
    Output,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc.protocol.messages import (
    PROTOCOL_VERSION,
    BranchRef,
    Commit,
    CommitRequest,
    Decision,
    Hello,
    Inquiry,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    ResourceInfo,
    Rollback,
    RollbackRequest,
    Tick,
    Vote,
    Wait,
    Welcome,
)

LIMITS = Limits(max_timeout_ms=20_000, ack_wait_ms=2_000, tick_ms=5_000)
LEFT_MS = 5_000
RETENTION_MS = 200_000
RESOURCES = (("accounts", "audit"), ("accounts",), ("stock",), (), ())
"""Three processes with databases, and two clients."""
CLIENTS = (3, 4)
TRANSACTIONS = 4
PLANS = (Vote.ABORT, Vote.READ_ONLY, Vote.READ_ONLY, *[Vote.PREPARED] * 7)
SORTS = ["arrive"] * 12 + ["receive"] * 12 + ["log"] * 5 + ["ask"] * 4 + ["begin", "sleep", "trouble"]
"""What a number picks, by its remainder: trouble is rare, or nothing would ever get far enough to be troubled."""

Action = Callable[[], None]


@dataclass(slots=True)
class Root:
    """One transaction as its client sees it."""

    xid: Xid
    client: int
    epoch: Epoch
    begun_tick: int
    refs: tuple[BranchRef, ...]
    asked: bool = False
    gave_up: bool = False
    heard: set[Outcome] = field(default_factory=set)
    last: Outcome | None = None


class World:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.now_ms = T0
        self.log: dict[Xid, Decision] = {}
        self.done: set[Xid] = set()
        self.ever: dict[Xid, Decision] = {}
        """All records that there ever were, deleted ones too."""
        self.forgotten_ms = 0
        self.epochs: list[Epoch] = []
        self.work: dict[BranchId, Work] = {}
        self.roots: list[Root] = []
        self.sessions: dict[int, int] = {}
        """The process of each open session."""
        self.incarnations = [1] * len(RESOURCES)
        self.to_coordinator: list[tuple[int, Any]] = []
        self.to_process: list[tuple[int, Any]] = []
        self.writing: list[Decision] = []
        self.reading: list[Lookup] = []
        self.read: list[Looked] = []
        self.last_session = 0
        self.repeated = False
        """A real stream repeats nothing, so a repeated answer may be called a violation; it must do no harm."""
        self.start()
        for process in range(len(RESOURCES)):
            self.connect(process)

    # ------------------------------------------------------------------------------------------------------- parts

    @property
    def clock_ms(self) -> int:
        return CLOCK + self.now_ms - T0

    def id_of(self, process: int) -> ParticipantId:
        return ParticipantId((process * 1_000 + self.incarnations[process]).to_bytes(8, "big"))

    def start(self) -> None:
        """A new epoch on the same log."""
        self.epochs.append(Epoch.make(len(self.epochs) + 1, 7))
        self.owner = Owner("c1", self.epochs[-1])
        pending = [decision for xid, decision in self.log.items() if xid not in self.done]
        self.core = Coordinator(
            self.owner, "bank", self.epochs[:-1], pending, LIMITS, self.now_ms, self.clock_ms, self.forgotten_ms
        )

    def connect(self, process: int) -> None:
        """A process dials; a session that it still had is replaced by the coordinator."""
        self.last_session += 1
        self.sessions[self.last_session] = process
        resources = tuple(ResourceInfo(name, "test", name) for name in RESOURCES[process])
        hello = Hello(PROTOCOL_VERSION, "bank", self.id_of(process), f"process {process}", resources)
        session = self.last_session
        self.tell(SessionOpened(session, hello))
        for work in self.work.values():
            if work.state == "prepared" and work.gid.resource in RESOURCES[process]:
                self.to_coordinator.append((session, Inquiry(work.gid, 0, 0)))
        for root in self.roots:
            if root.client == process and root.asked:
                self.to_coordinator.append((session, self.question(root)))

    def question(self, root: Root) -> OutcomeRequest:
        return OutcomeRequest(root.xid, root.epoch, root.begun_tick, root.refs)

    # --------------------------------------------------------------------------------------------- what can happen now

    def possible(self, sort: str) -> list[Action]:
        """What can happen now, of one sort."""
        if sort == "arrive":
            return [
                partial(self._deliver, self.to_coordinator, i, self._arrive) for i in range(len(self.to_coordinator))
            ]
        if sort == "receive":
            return [partial(self._deliver, self.to_process, i, self._receive) for i in range(len(self.to_process))]
        if sort == "log":
            return [*(partial(self._write, i) for i in range(len(self.writing))), *self._reads()]
        if sort == "ask":
            return [partial(self.ask, root) for root in self.roots]
        if sort == "begin":
            return [partial(self.begin, shape) for shape in range(24)] if len(self.roots) < TRANSACTIONS else []
        if sort == "sleep":
            return [partial(self.sleep, ms) for ms in (10, 500, 2_000, 6_000, 90_000)]
        return self._troubles()

    def _reads(self) -> list[Action]:
        reads = [partial(self._look, i) for i in range(len(self.reading))]
        return [*reads, *(partial(self._looked, i) for i in range(len(self.read)))]

    def _troubles(self) -> list[Action]:
        troubles: list[Action] = [partial(self.lose, pool, i) for pool in self._pools for i in range(len(pool))]
        troubles += [partial(self.repeat, pool, i) for pool in self._pools for i in range(len(pool))]
        troubles += [partial(self.cut, session) for session in self.sessions]
        troubles += [partial(self.connect, process) for process in range(len(RESOURCES))]
        troubles += [partial(self.crash, process) for process in range(3)]
        troubles += [partial(self.restart, lucky) for lucky in (False, True)]
        troubles += [partial(self._refuse_write, i) for i in range(len(self.writing))]
        troubles += [partial(self.tell, LogHealth(healthy)) for healthy in (False, True)]
        return [*troubles, self.forget]

    @property
    def _pools(self) -> tuple[list[tuple[int, Any]], ...]:
        return self.to_coordinator, self.to_process

    def step(self, number: int) -> None:
        """Do one of the things that can happen now; *number* picks the sort by its remainder, which one by the rest."""
        actions = self.possible(SORTS[number % len(SORTS)])
        if actions:
            actions[number // len(SORTS) % len(actions)]()

    # ---------------------------------------------------------------------------------------------------- the network

    def _deliver(self, pool: list[tuple[int, Any]], index: int, take: Callable[[int, Any], None]) -> None:
        take(*pool.pop(index))

    def lose(self, pool: list[tuple[int, Any]], index: int) -> None:
        del pool[index]

    def repeat(self, pool: list[tuple[int, Any]], index: int) -> None:
        pool.append(pool[index])
        self.repeated = True

    def cut(self, session: int) -> None:
        del self.sessions[session]
        self.tell(SessionClosed(session))

    def _arrive(self, session: int, message: Any) -> None:
        self.tell(Received(session, message))  # also the tail of a session that is gone

    def crash(self, process: int) -> None:
        """Its unprepared work is gone; its prepared work is not; what it had sent may still arrive."""
        for work in self.work.values():
            if work.gid.participant == self.id_of(process) and work.state == "active":
                work.state = "rolled back"
        for session in [s for s, p in self.sessions.items() if p == process]:
            self.cut(session)
        self.incarnations[process] += 1

    def restart(self, lucky: bool) -> None:
        """The coordinator dies and comes back; *lucky*: what it was writing got there."""
        for decision in self.writing if lucky else ():
            self._durable(decision)
        for pool in (self.writing, self.reading, self.read, self.to_process, self.to_coordinator):
            pool.clear()
        processes = list(dict.fromkeys(self.sessions.values()))
        self.sessions.clear()
        self.start()
        for process in processes:
            self.connect(process)

    def sleep(self, ms: int) -> None:
        until_ms = self.now_ms + ms
        while (due_ms := self.core.next_wakeup_ms()) is not None and due_ms <= until_ms:
            self.now_ms = max(self.now_ms, due_ms)
            self.tell(Woke())
        self.now_ms = until_ms

    # -------------------------------------------------------------------------------------------------------- the log

    def _write(self, index: int) -> None:
        decision = self.writing.pop(index)
        self._durable(decision)
        self.tell(Logged((decision.xid,)))

    def _durable(self, decision: Decision) -> None:
        assert decision.xid not in self.ever or self.ever[decision.xid] == decision, "decided twice"
        self.log[decision.xid] = self.ever[decision.xid] = decision

    def _refuse_write(self, index: int) -> None:
        self.tell(NotLogged((self.writing.pop(index).xid,), FULL))

    def _look(self, index: int) -> None:
        lookup = self.reading.pop(index)
        self.read.append(Looked(lookup, self.log.get(lookup.xid)))

    def _looked(self, index: int) -> None:
        self.tell(self.read.pop(index))

    def forget(self) -> None:
        """Delete what is done and old."""
        before_ms = self.clock_ms - RETENTION_MS
        old = [xid for xid in self.done if xid in self.log and self.log[xid].decided_ms < before_ms]
        if old:
            self.forgotten_ms = before_ms
            self.tell(Forgot(before_ms))
            for xid in old:
                del self.log[xid]

    # -------------------------------------------------------------------------------------------------------- clients

    def begin(self, shape: int) -> None:
        """A transaction over one to three branches; some read, some refuse, some vote early."""
        number = len(self.roots) + 1
        places = [(0, "accounts"), (0, "audit"), (2, "stock"), (1, "accounts")][shape % 2 :][: shape % 3 + 1]
        refs = []
        for place, (process, resource) in enumerate(places):
            branch = bid(number * 10 + place)
            gid = Gid("bank", "c1", self.owner.epoch, xid(number), branch, self.id_of(process), resource)
            plan = PLANS[(shape * 7 + place * 5) % len(PLANS)]
            work = self.work[branch] = Work(gid, plan)
            early = vote(work) if shape % 4 == 3 else None
            refs.append(BranchRef(branch, resource, gid.participant, 1, early, f"token {number}" if early else ""))
        tick = self.core.tick
        self.roots.append(Root(xid(number), CLIENTS[number % 2], self.owner.epoch, tick, tuple(refs)))

    def ask(self, root: Root) -> None:
        """Ask for the commit, once, of the owner; then for the outcome.  Every seventh gives up instead."""
        session = next((s for s, p in self.sessions.items() if p == root.client), None)
        if session is None:
            return
        if root.asked:
            message: Any = self.question(root)
        elif root.gave_up or root.epoch != self.owner.epoch or root.refs[0].branch[-1] % 7 == 3:
            root.gave_up = True
            message = RollbackRequest(root.xid, root.epoch, root.refs, ENOUGH)
        else:
            root.asked = True
            wait = Wait(root.refs[0].branch[-1] // 10 % 2)
            message = CommitRequest(root.xid, root.epoch, root.begun_tick, root.refs, LEFT_MS, wait)
        self.to_coordinator.append((session, message))

    # ------------------------------------------------------------------------------------------------------ processes

    def _receive(self, session: int, message: Any) -> None:
        """A process takes a message, if it still lives."""
        if session not in self.sessions:
            return
        process = self.sessions[session]
        if isinstance(message, OutcomeReply):
            self._hear(process, message)
        elif not isinstance(message, Welcome | Tick):
            branch = message.gid.branch if isinstance(message, Commit | Rollback) else message.branch
            work = self.work[branch]
            own = work.gid.participant == self.id_of(process)
            self.to_coordinator += [(session, reply) for reply in react(work, own, message)]

    # ---------------------------------------------------------------------------------------------------- the checker

    def tell(self, event: Event) -> None:
        """Give the coordinator an event and honour its effects, in order, under the checker's eye."""
        out = self.core.step(event, self.now_ms)
        self.writing += out.append
        for session, message in out.send:
            self._check_sent(message)
            self.to_process.append((session, message))
        self._check_done(out)
        self.reading += out.look
        for session, _ in out.close:
            self.sessions.pop(session, None)
        wrong = [note for note in out.notes if note.event == "protocol violation"]
        assert not wrong or self.repeated, wrong

    def _check_sent(self, message: Any) -> None:
        if isinstance(message, Commit):
            record = self.ever[message.gid.xid]  # rule 3: durable before told
            assert message.gid.branch in {branch.branch for branch in record.branches}
        elif isinstance(message, Rollback):
            record_or_none = self.ever.get(message.gid.xid)
            listed = {branch.branch for branch in record_or_none.branches} if record_or_none else set()
            assert message.gid.branch not in listed, "told to roll back what the record commits"
        elif isinstance(message, OutcomeReply):
            self._check_reply(message)

    def _check_reply(self, reply: OutcomeReply) -> None:
        work = [w for w in self.work.values() if w.gid.xid == reply.xid]
        if reply.outcome is Outcome.COMMITTED:
            wrote = [w for w in work if w.state != "read-only"]
            one_phase = len(work) == 1 and work[0].state == "committed"
            assert reply.xid in self.ever or one_phase or not wrote, "committed, and nobody knows"
            pending = {w.gid.resource for w in wrote if w.state != "committed"}
            assert pending <= set(reply.pending), "not all have ended, and the client is not told"
        elif reply.outcome is Outcome.ABORTED:
            assert reply.xid not in self.ever
            assert not [w for w in work if w.state == "committed"], "aborted, and yet it is there"

    def _check_done(self, out: Output) -> None:
        for each in out.done:
            branches = [self.work[branch.branch] for branch in self.ever[each].branches]
            assert [w.state for w in branches] == ["committed"] * len(branches), "forgotten too early"
            assert each not in self.done
        self.done.update(out.done)

    def _hear(self, process: int, reply: OutcomeReply) -> None:
        root = self.roots[int.from_bytes(reply.xid, "big") - 1]
        assert root.client == process
        root.last = reply.outcome
        if reply.outcome is not Outcome.UNKNOWN and self.states(root):
            root.heard.add(reply.outcome)
        assert len(root.heard) <= 1, "two truths"

    def states(self, root: Root) -> set[str]:
        """How its branches stand; those that only read do not matter."""
        return {self.work[ref.branch].state for ref in root.refs} - {"read-only"}
