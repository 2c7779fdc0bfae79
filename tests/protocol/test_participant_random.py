"""Random histories of one process against a checker outside that is too simple to be wrong.

How it works: a list of numbers is a history. Each number picks one of the things that can happen now: a message on
the network is delivered, delivered and kept (a duplicate), or lost; an operation ends, well or badly; time passes;
somebody uses the work or leaves it; the coordinator, here a few lines of plain logic, asks, decides or forgets. After
every step the checker compares what the participant started with what it had been told. In the end the network heals,
databases answer, and everything owed must have been given and everything remembered let go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.participant_kit import DEADLINE_MS, ENOUGH, FAILED, T0, gid
from txrpc.ids import BranchId, Gid, Xid
from txrpc.protocol.branch import BranchInput as In
from txrpc.protocol.branch import BranchState, Do, Effects, Operation
from txrpc.protocol.messages import (
    Acked,
    Commit,
    CommitOnePhase,
    Finish,
    Inquiry,
    OnePhaseDone,
    OnePhaseResult,
    Prepare,
    Resolve,
    Resolved,
    Rollback,
    Vote,
    Voted,
)
from txrpc.protocol.participant import Participant

BRANCHES = [gid(1, 1, "accounts"), gid(2, 1, "audit"), gid(3, 2, "accounts"), gid(4, 3, "accounts")]
"""Two of one transaction in two phases, one in one phase, one committed or given up by the root's own process."""
TWO_PHASES, ONE_PHASE, LOCAL = BRANCHES[:2], BRANCHES[2], BRANCHES[3]
Action = Callable[[], None]

_SORTS = ["_delivers"] * 9 + ["_ends"] * 9 + ["_asks"] * 7 + ["_uses"] * 2 + ["_small_things"] * 3 + ["_troubles"]
"""What a number picks, by its remainder: trouble is rare, or nothing would ever get far enough to be troubled."""


class World:
    """One participant, its databases, its coordinator, and the network between."""

    def __init__(self) -> None:
        self.table = Participant(lambda: 0.5)
        self.now_ms = T0
        self.network: list[Any] = []
        self.running: dict[BranchId, Do] = {}
        self.database = {branch.branch: "active" for branch in BRANCHES}
        self.may_undo: set[BranchId] = set()
        self.excused: set[BranchId] = set()
        """Told to roll back before they had voted: nobody waits for the vote any more."""
        self.decision: dict[Xid, str] = {}
        self.votes: dict[BranchId, Vote] = {}
        self.asked: set[type] = set()
        self.heard: Counter[tuple[str, BranchId]] = Counter()
        self.given: Counter[tuple[str, BranchId]] = Counter()
        self.waiting = False
        for branch in BRANCHES:
            self.table.open(branch, DEADLINE_MS).calls = 1

    # ------------------------------------------------------------------------------------------- what can happen now

    def step(self, number: int) -> None:
        """Do one of the things that can happen now; *number* picks the sort by its remainder and which one by the rest."""
        sort = _SORTS[number % len(_SORTS)]
        possible: list[Action] = getattr(self, sort)()
        if possible:
            possible[number // len(_SORTS) % len(possible)]()

    def _delivers(self) -> list[Action]:
        return [partial(self.deliver, message, keep) for message in self.network for keep in (False, False, True)]

    def _ends(self) -> list[Action]:
        return [partial(self.end_operation, branch, luck) for branch in self.running for luck in (0, 0, 0, 1, 2, 3)]

    def _small_things(self) -> list[Action]:
        return [partial(self.pass_time, 10), partial(self.pass_time, 400), self.connect, self.sweep]

    def _troubles(self) -> list[Action]:
        found: list[Action] = [partial(self.pass_time, ms) for ms in (5_000, 20_000, 61_000)]
        found += [partial(self.network.remove, message) for message in self.network]
        found.append(partial(self.decide, "abort"))
        return found

    def _uses(self) -> list[Action]:
        found: list[Action] = []
        for branch in BRANCHES:
            row = self.table.rows.get(branch.branch)
            if row is not None and row.state is BranchState.ACTIVE and not row.users:
                found.append(partial(setattr, row, "users", row.users + 1))
            if row is not None and row.users:
                found.append(partial(self.leave, branch))
        return found

    def _asks(self) -> list[Action]:
        found: list[Action] = []
        if TWO_PHASES[0].xid not in self.decision:
            found += [partial(self.say, Prepare(b.xid, b.branch, 1)) for b in TWO_PHASES]
            votes = [self.votes.get(b.branch) for b in TWO_PHASES]
            if all(vote in (Vote.PREPARED, Vote.READ_ONLY) for vote in votes):
                found += [partial(self.decide, "commit")] * 4
        found.append(partial(self.say, CommitOnePhase(ONE_PHASE.xid, ONE_PHASE.branch, 1)))
        found.append(partial(self.say, Resolve(ONE_PHASE.xid, ONE_PHASE.branch, ONE_PHASE.resource, "t")))
        if not self.waiting:
            found += [partial(self.end_here, kind) for kind in (In.LOCAL_COMMIT, In.LOCAL_ROLLBACK)]
        return found

    # --------------------------------------------------------------------------------------------------- happenings

    def say(self, message: Any) -> None:
        if len(self.network) < 8:
            self.network.append(message)

    def decide(self, decision: str) -> None:
        if TWO_PHASES[0].xid in self.decision:
            return
        self.decision[TWO_PHASES[0].xid] = decision
        for branch in TWO_PHASES:
            self.answer(branch)

    def answer(self, branch: Gid) -> None:
        if self.decision.get(branch.xid) == "commit" and self.votes.get(branch.branch) is Vote.PREPARED:
            self.say(Commit(branch, "t"))
        elif self.decision.get(branch.xid) == "abort":
            self.say(Rollback(branch, ENOUGH))

    def deliver(self, message: Any, keep: bool) -> None:
        if not keep:
            self.network.remove(message)
        branch = message.gid.branch if isinstance(message, Commit | Rollback) else message.branch
        if not (isinstance(message, Prepare) and self.decision.get(message.xid) == "abort"):
            self.heard[type(message).__name__, branch] += 1
        if isinstance(message, Rollback):
            self.may_undo.add(branch)
            if branch not in self.votes:
                self.excused.add(branch)
        self.honour(self.table.received(message, self.now_ms))

    def end_here(self, kind: In) -> None:
        if LOCAL.branch in self.table.rows:  # the shell answers for branches that are long gone
            self.waiting = True
            self.honour(self.table.step(kind, LOCAL.branch, self.now_ms, 1 if kind is In.LOCAL_COMMIT else ENOUGH))

    def leave(self, branch: Gid) -> None:
        row = self.table.rows[branch.branch]
        row.users -= 1
        if not row.users and row.state is BranchState.ROLLING_BACK:
            self.honour(self.table.step(In.RELEASED, branch.branch, self.now_ms))

    def pass_time(self, ms: int) -> None:
        """Alarm by alarm, as a shell does."""
        until_ms = self.now_ms + ms
        while (due_ms := self.table.next_wakeup_ms()) is not None and due_ms <= until_ms:
            self.now_ms = max(self.now_ms, due_ms)
            self.honour(self.table.woke(self.now_ms))
            for row in self.table.rows.values():
                assert row.state is not BranchState.ACTIVE or row.deadline_ms > self.now_ms, "lives past its deadline"
        self.now_ms = until_ms

    def connect(self) -> None:
        self.honour(self.table.connected(self.now_ms))

    def sweep(self) -> None:
        for branch in BRANCHES:
            if self.database[branch.branch] == "prepared":
                self.honour(self.table.in_doubt(branch, 1, self.now_ms))

    # ---------------------------------------------------------------------------------------------------- databases

    def end_operation(self, branch: BranchId, luck: int) -> None:
        do = self.running.pop(branch)
        kind, detail = getattr(self, f"_{do.operation.value}")(branch, luck)
        self.honour(self.table.step(kind, branch, self.now_ms, detail))

    def _prepare(self, branch: BranchId, luck: int) -> tuple[In, object]:
        if luck >= 2:
            # The connection broke: PREPARE may have been carried out all the same.
            self.database[branch] = "prepared" if luck == 3 else "rolled back"
            self.may_undo.add(branch)
            return In.PREPARE_FAILED, FAILED
        self.database[branch] = ("prepared", "ended read-only")[luck]
        return (In.PREPARED, "t") if luck == 0 else (In.READ_ONLY, None)

    def _commit_one_phase(self, branch: BranchId, luck: int) -> tuple[In, object]:
        self.database[branch] = ("committed", "committed", "rolled back", "committed")[luck]
        results = (OnePhaseResult.COMMITTED, OnePhaseResult.COMMITTED, OnePhaseResult.ABORTED, OnePhaseResult.UNKNOWN)
        return In.ONE_PHASE_ENDED, (results[luck], FAILED if luck >= 2 else None)

    def _rollback(self, branch: BranchId, luck: int) -> tuple[In, object]:
        self.database[branch] = "rolled back"
        return In.ROLLED_BACK, None

    def _commit_prepared(self, branch: BranchId, luck: int) -> tuple[In, object]:
        return self._finish(branch, luck, "committed")

    def _rollback_prepared(self, branch: BranchId, luck: int) -> tuple[In, object]:
        return self._finish(branch, luck, "rolled back")

    def _finish(self, branch: BranchId, luck: int, end: str) -> tuple[In, object]:
        if luck == 2:
            return In.FINISH_FAILED, FAILED
        if self.database[branch] == "prepared":
            self.database[branch] = end
            return (In.FINISH_FAILED, FAILED) if luck == 3 else (In.FINISHED, Finish.DONE)
        return In.FINISHED, Finish.ABSENT

    # ------------------------------------------------------------------------------------------------- the checker

    def honour(self, effects: Effects) -> None:
        for do in effects.do:
            self.check_start(do)
        for message in effects.send:
            self.take(message)
        for branch, _, _ in effects.settle:
            assert branch == LOCAL.branch
            assert self.waiting, "told twice, or nobody asked"
            self.waiting = False

    def check_start(self, do: Do) -> None:
        branch = do.gid.branch
        if do.operation is Operation.INTERRUPT:
            row = self.table.rows[branch]
            overdue = row.state in (BranchState.VOTING, BranchState.ONE_PHASE) and row.deadline_ms <= self.now_ms
            assert row.users or overdue
            return
        assert not self.table.rows[branch].users, f"{do.operation} under the feet of a user"
        assert branch not in self.running, f"{do.operation} beside {self.running[branch].operation}"
        before = self.database[branch]
        if do.operation is Operation.COMMIT_PREPARED:
            assert self.heard["Commit", branch], "committed without a word"
        elif do.operation is Operation.ROLLBACK_PREPARED:
            assert branch in self.may_undo, "a promise was broken"
        else:
            assert before == "active", f"{do.operation} of work that is {before}"
        self.running[branch] = do

    def take(self, message: Any) -> None:
        if isinstance(message, Inquiry):
            self.given["Inquiry", message.gid.branch] += 1
            self.answer(message.gid)
            return
        self.given[type(message).__name__, message.branch] += 1
        if isinstance(message, Voted):
            self.check_vote(message)
        elif isinstance(message, Acked):
            assert message.finish is not Finish.HEURISTIC
            assert self.database[message.branch] == "committed"
        elif isinstance(message, OnePhaseDone | Resolved) and message.result is not OnePhaseResult.UNKNOWN:
            committed = self.database[message.branch] == "committed"
            if message.result is OnePhaseResult.COMMITTED:
                assert committed
            elif isinstance(message, Resolved) or message.branch in self.table.rows:
                assert not committed

    def check_vote(self, vote: Voted) -> None:
        if vote.vote is Vote.PREPARED:
            assert self.database[vote.branch] in ("prepared", "committed")
        if vote.branch not in self.votes:
            self.votes[vote.branch] = vote.vote
        elif vote.branch in self.table.rows and self.decision.get(vote.xid) != "abort":
            assert vote.vote is self.votes[vote.branch], "two answers to one question"

    # --------------------------------------------------------------------------------------------------- the end

    def heal(self) -> None:
        """From now on everything works; then nothing may be owed, and nothing left."""
        self.decision.setdefault(TWO_PHASES[0].xid, "abort")
        for branch in BRANCHES:
            while branch.branch in self.table.rows and self.table.rows[branch.branch].users:
                self.leave(branch)
        for _ in range(200):
            while self.network or self.running:
                while self.network:
                    self.deliver(self.network[0], keep=False)
                for running in list(self.running):
                    self.end_operation(running, 0)
            due_ms = self.table.next_wakeup_ms()
            if due_ms is None:
                self.sweep()
                if self.network or self.running or self.table.next_wakeup_ms() is not None:
                    continue
                break
            self.pass_time(max(0, due_ms - self.now_ms))
        self.check_end()

    def check_end(self) -> None:
        table = self.table
        assert (table.rows, table._by_use, table._closed, table._timers) == ({}, {}, {}, [])
        assert not self.waiting, "a local waiter was never told"
        answer_to = {"Prepare": ["Voted"], "CommitOnePhase": ["OnePhaseDone"], "Commit": ["Acked"]}
        answer_to["Resolve"] = ["Resolved", "OnePhaseDone"]
        for (question, branch), count in self.heard.items():
            given = sum(self.given[answer, branch] for answer in answer_to.get(question, []))
            excused = question == "Rollback" or (question == "Prepare" and branch in self.excused)
            assert given or excused, f"{count} {question} without an answer"
        committed = self.decision[TWO_PHASES[0].xid] == "commit"
        for own in TWO_PHASES:
            fits = ("committed", "ended read-only") if committed else ("rolled back", "ended read-only")
            assert self.database[own.branch] in fits
        for own in BRANCHES:
            assert self.database[own.branch] not in ("active", "prepared")


@settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 4_095), max_size=150))
def test_random_histories(history: list[int]) -> None:
    world = World()
    for number in history:
        world.step(number)
    world.heal()
