"""A database as a resource sees it: open work, prepared branches that survive all, commits that it can be asked about."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from txrpc._protocol.messages import FinishResult, Outcome, ResourceInfo
from txrpc.errors import AbortCode, Reason, ResourceUnavailable, TxrpcError
from txrpc.ids import BranchId, Gid, RegisterId, Xid
from txrpc.resource import Prepared, ReadOnly
from verification.simulation.history import History
from verification.simulation.options import Options
from verification.simulation.register import Register, SimDecider, WrongIncarnation
from verification.simulation.scheduler import Node, Promise, Scheduler

__all__ = ["Database", "Refused", "SimResource", "Work"]


class Refused(Exception):
    """The database said no; whatever it was has been rolled back."""


class Work:
    """One open database transaction, on a connection of one process's."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.open = True
        self.xid: Xid | None = None
        self.branch: BranchId | None = None
        self.gid: Gid | None = None
        """Of the branch, also of one that has not written."""
        self.calls: list[Any] = []
        self.patient_until_ms = 0
        """Until when the database is asked how a commit whose connection broke has ended."""


class Database(Node):
    """See the module's docstring.  A crash ends open work; what is prepared and what is committed stays."""

    def __init__(self, scheduler: Scheduler, name: str, options: Options, history: History) -> None:
        super().__init__(scheduler, name)
        self.options = options
        self._history = history
        self._tokens = 0
        self.works: set[Work] = set()
        self.prepared: dict[BranchId, tuple[Gid, Work, int]] = {}
        self.unanswered: list[Promise] = []
        self.timeline = 1
        """Which history it is in: a fail-over begins another one."""
        self.ended: dict[str, bool] = {}
        """Whether the work of each token was committed."""
        self.register = Register(name, history)
        self.decided: list[Work] = []
        """The work that was committed with a decision."""

    def crash(self) -> None:
        """Lose what is not prepared."""
        self.die()
        self._lose_open_work()
        for promise in self.unanswered:
            promise.break_(ResourceUnavailable(f"the connection to {self.name} broke"))
        self.unanswered.clear()

    def _lose_open_work(self) -> None:
        for work in sorted(self.works, key=lambda work: int(work.token.partition("-")[0])):
            self._undo(work)

    def fail_over(self) -> None:
        """A standby that has all but what is prepared takes its place: another history begins."""
        for gid, work, _ in self.prepared.values():
            self._history.note("damaged", gid.xid, gid.branch)
            self.ended[work.token] = False
        self.prepared.clear()
        self.timeline += 1
        self._lose_decisions(random.Random(f"{self.name} {self.scheduler.now_ms}").choice((0, 0, 1, 2)))

    def _lose_decisions(self, count: int) -> None:
        """The standby lacks the last decisions as well, and the work that was committed with them."""
        gone = set(self.register.come_back_older(count))
        for work in [work for work in self.decided if work.xid in gone]:
            self._history.note("damaged", work.xid, work.branch)
            self.ended[work.token] = False
            self.decided.remove(work)
        self._history.note("lost", gone)
        self._history.note("reborn")

    def by_hand(self, branch: BranchId, commit: bool) -> None:
        """An operator ends a prepared branch."""
        gid, work, _ = self.prepared.pop(branch)
        self._history.note("damaged", gid.xid, gid.branch)
        self._history.line(
            self.name, self.name, lambda: f"{_short(gid)} {'committed' if commit else 'rolled back'} by hand"
        )
        self.ended[work.token] = commit

    def restart(self) -> None:
        """Be there again."""
        self.up = True

    def repair(self) -> None:
        """From now on nothing is refused."""
        self.options = self.options.without("refuses", "refuses_finish", "cut_prepares")

    # ------------------------------------------------------------------------------------------------ what it can do

    def begin(self) -> Work:
        """Open a transaction."""
        self._tokens += 1
        work = Work(f"{self._tokens}-{self.timeline:08X}")
        self.works.add(work)
        return work

    def write(self, work: Work, gid: Gid, call: Any) -> None:
        """Do some of the transaction's work."""
        if not work.open:
            raise Refused("the connection was lost")
        work.xid, work.branch, work.gid = gid.xid, gid.branch, gid
        work.calls.append(call)
        self._history.note("wrote", gid.xid, gid.branch, call, gid.participant)
        self._history.line(self.name, self.name, lambda: f"{_short(gid)} {call} writes")

    def prepare(self, work: Work, gid: Gid) -> Prepared | ReadOnly:
        """PREPARE TRANSACTION."""
        if not work.open:
            raise Refused("the connection was lost")
        if not work.calls:
            self._close(work)
            self._history.note("only_read", gid.xid, gid.branch)
            self._history.line(self.name, self.name, lambda: f"{_short(gid)} only read")
            return ReadOnly()
        if self.scheduler.dice.random() < self.options.refuses:
            self._undo(work)
            raise Refused("a deferred constraint does not hold")
        self._close(work)
        self.prepared[gid.branch] = gid, work, self.scheduler.now_ms
        self._history.note("prepared", gid.xid, gid.branch)
        self._history.line(self.name, self.name, lambda: f"{_short(gid)} prepared")
        return Prepared(work.token)

    def commit(self, work: Work) -> None:
        """COMMIT."""
        if not work.open:
            raise Refused("the connection was lost")
        if work.calls and self.scheduler.dice.random() < self.options.refuses:
            self._undo(work)
            raise Refused("a deferred constraint does not hold")
        self._close(work)
        self._commit(work, False)

    def rollback(self, work: Work) -> None:
        """ROLLBACK, or the end of a connection."""
        if work.open:
            self._undo(work)

    def finish(self, commit: bool, gid: Gid, token: str) -> FinishResult:
        """COMMIT PREPARED or ROLLBACK PREPARED."""
        if gid.branch in self.prepared and self.scheduler.dice.random() < self.options.refuses_finish:
            raise Refused("permission denied")
        held = self.prepared.pop(gid.branch, None)
        if held is not None:
            work = held[1]
            if commit:
                self._commit(work, True)
            else:
                self._rolled_back(work, True)
            return FinishResult.DONE
        if token and any(work.token == token for work in self.works):
            raise ResourceUnavailable(f"transaction {token} is still at work")
        if token and self._elsewhere(token):
            return FinishResult.LOST
        if token not in self.ended:
            return FinishResult.NOT_HERE
        if self.ended[token] != commit:
            return FinishResult.HEURISTIC
        self._history.note("as_decided", gid.branch)
        return FinishResult.ALREADY

    def result(self, token: str) -> Outcome | None:
        """How the work of *token* ended; None while it is open."""
        if any(work.token == token for work in self.works):
            return None
        if token not in self.ended or self._elsewhere(token):
            return Outcome.UNKNOWN
        return Outcome.COMMITTED if self.ended[token] else Outcome.ABORTED

    def _elsewhere(self, token: str) -> bool:
        """Whether *token* is of another history than this one."""
        return token.partition("-")[2] != f"{self.timeline:08X}"

    def insert_decision(self, work: Work, register: RegisterId | None, xid: Xid, branches: bytes) -> bool:
        """The first half of a decision: its row, which others wait for; whether it could be written."""
        if not work.open:
            raise Refused("the connection was lost")
        if register != self.register.id:
            self._undo(work)
            raise WrongIncarnation("its database has failed over")
        if not self.register.insert(xid, work, branches):
            self._undo(work)
            return False
        return True

    def cuts(self) -> bool:
        """Whether a connection breaks at this moment, and what was sent on it arrives late."""
        return self.scheduler.dice.random() < self.options.cut_prepares

    def commits_later(self, work: Work, xid: Xid) -> None:
        """COMMIT is on its way, and its connection has broken: perhaps the work is rolled back before that comes."""

        def arrive() -> None:
            with suppress(Refused):
                self.commit_decision(work, xid)

        dice = self.scheduler.dice
        self.later(dice.randint(0, 5_000), arrive)
        self.later(dice.randint(0, 10_000), self.rollback, work)

    def commit_decision(self, work: Work, xid: Xid) -> None:
        """The second half: COMMIT."""
        if not work.open:
            raise Refused("the connection was lost")
        if self.scheduler.dice.random() < self.options.refuses:
            self._undo(work)
            raise Refused("a deferred constraint does not hold")
        self.register.commit(xid, work.gid.branch if work.gid is not None else None)
        self._history.line(self.name, self.name, lambda: f"{xid} is decided: committed")
        self._close(work)
        self._commit(work, False)
        self.decided.append(work)

    def _close(self, work: Work) -> None:
        work.open = False
        self.works.discard(work)
        self.register.let_go(work)

    def _undo(self, work: Work) -> None:
        self._close(work)
        self._rolled_back(work, False)

    def _rolled_back(self, work: Work, was_prepared: bool) -> None:
        self.ended[work.token] = False
        if work.branch is not None:
            self._history.note("undone", work.xid, work.branch, was_prepared)
            self._history.line(self.name, self.name, lambda: f"{_name(work)} rolled back")

    def _commit(self, work: Work, was_prepared: bool) -> None:
        self.ended[work.token] = True
        if work.branch is not None:
            self._history.note("committed", work.xid, work.branch, tuple(work.calls), was_prepared)
            self._history.line(self.name, self.name, lambda: f"{_name(work)} committed")


def _short(gid: Gid) -> str:
    return f"{gid.xid}.{gid.branch}"


def _name(work: Work) -> str:
    return f"{work.xid}.{work.branch}"


class SimResource:
    """`txrpc.resource.Resource` over a `Database`, for one incarnation of one process: every verb returns a promise.

    A verb takes effect some time after it was called and answers some time later, and the process, or the database, may die before,
    between and after.
    """

    kind = "simulated"

    def __init__(self, name: str, database: Database, process: Node) -> None:
        self.name = name
        self._database = database
        self._process = process
        self._works: list[Work] = []
        self._abandoned = False
        self.decider = SimDecider(self._ask, database)

    def _ask(self, effect: Callable[..., Any], *arguments: Any) -> Promise:
        promise = Promise()
        database, life = self._database, self._database.life

        def arrive() -> None:
            if not database.up or database.life != life:
                promise.break_(ResourceUnavailable(f"{database.name} is out of reach"))
                return
            try:
                result = effect(*arguments)
            except (Refused, TxrpcError) as error:
                self._database.soon(promise.break_, error)
            else:
                self._database.soon(promise.keep, result)
            database.unanswered.append(promise)

        # Not `later` of the process: what was sent is carried out even if nobody waits any more.
        self._database.scheduler.after(self._database.scheduler.dice.randint(0, 10) * database.slow, arrive)
        return promise

    # -------------------------------------------------------------------------------------------------------- verbs

    def start(self) -> Promise:
        """See `Resource.start`."""
        database = self._database
        started = self._ask(lambda: ResourceInfo(self.name, self.kind, database.name, register=database.register.id))
        started.then(self._started)
        return started

    def _started(self, kept: Promise) -> None:
        if kept.error is None:
            self.decider.opened = kept.value.register

    def begin(self, _read_only: bool, _within_s: float | None = None) -> Promise:
        """See `Resource.begin`."""
        promise = self._ask(self._database.begin)
        promise.then(lambda kept: self._opened(kept.value))
        return promise

    def _opened(self, work: Work | None) -> None:
        if work is not None:
            self._works.append(work)
        if self._abandoned:
            self.abandon()

    def write(self, work: Work, gid: Gid, call: Any) -> Promise:
        """What a user of the resource does."""
        return self._ask(self._database.write, work, gid, call)

    def prepare(self, work: Work, gid: Gid) -> Promise:
        """See `Resource.prepare`."""
        dice = self._database.scheduler.dice
        if dice.random() < self._database.options.cut_prepares:
            self._database.later(dice.randint(0, 3_000), self._late_prepare, work, gid)
            promise = Promise()
            promise.break_(ResourceUnavailable("the connection broke under PREPARE"))
            return promise
        return self._ask(self._database.prepare, work, gid)

    def prepare_early(self, work: Work, gid: Gid) -> Promise:
        """See `KeepsReads`."""
        if not work.calls and work.open:
            promise = Promise()
            promise.keep(None)
            return promise
        return self.prepare(work, gid)

    def _late_prepare(self, work: Work, gid: Gid) -> None:
        if work.open:
            try:
                self._database.prepare(work, gid)
            except Refused:
                return

    def commit_one_phase(self, work: Work, committing: Callable[[str], None]) -> Promise:
        """See `Resource.commit_one_phase`."""
        promise = Promise()
        if not work.calls:
            self._ask(self._database.commit, work).then(
                lambda kept: promise.break_(kept.error) if kept.error else promise.keep(Outcome.COMMITTED)
            )
            return promise
        committing(work.token)
        self._ask(self._database.commit, work).then(lambda kept: self._committed(kept, promise, work))
        return promise

    def _committed(self, kept: Promise, promise: Promise, work: Work) -> None:
        if kept.error is None:
            promise.keep(Outcome.COMMITTED)
        elif isinstance(kept.error, Refused):
            promise.break_(kept.error)
        else:
            work.patient_until_ms = self._database.scheduler.now_ms + 1_000 * self._database.options.patience_s
            promise.keep(None)

    def how_it_ended(self, work: Work) -> Promise:
        """See `AsksLater.how_it_ended`: the connection broke under COMMIT."""
        promise, database = Promise(), self._database
        result = database.result(work.token) if database.up else None
        late = database.scheduler.now_ms >= work.patient_until_ms
        promise.keep(Outcome.UNKNOWN if result is None and late else result)
        return promise

    def rollback(self, work: Work) -> Promise:
        """See `Resource.rollback`.  Never fails."""
        promise = Promise()
        if work is None or not work.open:
            promise.keep(None)
            return promise
        dice = self._database.scheduler.dice
        if dice.random() >= self._database.options.cut_prepares:
            self._ask(self._database.rollback, work).then(lambda _: promise.keep(None))
            return promise
        self._database.later(dice.randint(0, 5_000), self._database.rollback, work)
        work.patient_until_ms = self._database.scheduler.now_ms + 2_000
        promise.keep(None)
        return promise

    def terminate(self, work: Work | None) -> Promise:
        """See `Terminates.terminate`.  Sometimes the server's end lives on for longer than that is waited for."""
        promise = Promise()
        promise.keep(work is None or not work.open or self._database.scheduler.now_ms >= work.patient_until_ms)
        return promise

    def interrupt(self, work: Work) -> None:
        """See `Resource.interrupt`."""
        if work is not None:
            self._ask(self._database.rollback, work)

    def commit_prepared(self, gid: Gid, token: str) -> Promise:
        """See `Resource.commit_prepared`."""
        return self._ask(self._database.finish, True, gid, token)

    def rollback_prepared(self, gid: Gid, token: str) -> Promise:
        """See `Resource.rollback_prepared`."""
        return self._ask(self._database.finish, False, gid, token)

    def in_doubt(self, group: str) -> Promise:
        """See `Resource.in_doubt`."""
        return self._ask(self._list, group)

    def _list(self, group: str) -> Sequence[tuple[Gid, int]]:
        now_ms = self._database.scheduler.now_ms
        return [(gid, now_ms - since) for gid, _, since in self._database.prepared.values() if gid.group == group]

    def one_phase_result(self, token: str) -> Promise:
        """See `Resource.one_phase_result`."""
        return self._ask(self._database.result, token)

    def classify(self, error: BaseException) -> Reason | None:
        """See `Resource.classify`."""
        if isinstance(error, Refused):
            return Reason(AbortCode.SERIALIZATION_FAILURE, str(error))
        return None

    def abandon(self) -> None:
        """The process is dead: its connections end, and the database notices each in its own time."""
        self._abandoned = True
        for work in self._works:
            if work.open:
                self._database.later(self._database.scheduler.dice.randint(0, 3_000), self._database.rollback, work)
