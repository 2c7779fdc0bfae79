"""The machines that transcripts drive: one command goes in, lines come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.transcripts.words import (
    REASON,
    REGISTER,
    branch,
    epoch,
    gid,
    listed,
    message,
    participant,
    ref,
    register,
    shown,
    xid,
)
from txrpc._protocol.coordinator.events import (
    Close,
    Drain,
    Forgot,
    Limits,
    Logged,
    LogHealth,
    Looked,
    NotLogged,
    Output,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.deciding import Decide, Decided, RegisterAnswer
from txrpc._protocol.messages import (
    Abandon,
    Acked,
    Commit,
    CommitOnePhase,
    CommitRequest,
    Committing,
    FinishResult,
    Hello,
    Inquiry,
    OnePhaseDone,
    Outcome,
    OutcomeRequest,
    Owner,
    Prepare,
    Resolve,
    Resolved,
    ResourceInfo,
    Rollback,
    RollbackRequest,
    Trouble,
    Vote,
    Voted,
    Wait,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.participant.branch import BranchInput, Deciding, Do, Effects
from txrpc._protocol.participant.machine import Participant
from txrpc._protocol.records import Decision, Incident, Opened
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Xid

__all__ = ["MACHINES", "Machine"]

NODE = "c1"
_LIMITS = Limits(max_timeout_ms=30_000, recovery_wait_ms=0, tick_ms=1_000_000_000, max_branches=3, max_transactions=3)
Options = dict[str, str]


class Machine:
    """Takes commands: ``verb word word option=value``."""

    now_ms = 0

    def __init__(self) -> None:
        self.lines: list[str] = []

    @classmethod
    def verbs(cls) -> dict[str, Callable[..., None]]:
        """What it understands."""
        return {name[3:].replace("_", "-"): getattr(cls, name) for name in dir(cls) if name.startswith("do_")}

    def run(self, command: str) -> list[str]:
        """What *command* brings about."""
        verb, *rest = command.split()
        words = [word for word in rest if not _is_option(word)]
        options = dict(word.split("=", 1) for word in rest if _is_option(word))
        self.lines = []
        self.verbs()[verb](self, words, options)
        return self.lines or ["nothing"]


def _is_option(word: str) -> bool:
    return "=" in word and word.partition("=")[0] in (
        "left",
        "wait",
        "epoch",
        "calls",
        "from",
        "seen",
        "resource",
        "everywhere",
        "begun",
        "deadline",
        "holds",
        "decides",
    )


def _ms(text: str) -> int:
    return int(float(text.removesuffix("s")) * 1000)


class CoordinatorMachine(Machine):
    """A coordinator c1 in its epoch 2 (1 was before it), with a log that answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.log: dict[Xid, Decision] = {}
        self.done: set[Xid] = set()
        self.incidents: dict[tuple[Xid, BranchId], Incident] = {}
        self.number = 1
        self.forgotten_ms = 0
        self._start()

    def _start(self) -> None:
        self.number += 1
        self.sessions: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.appended: list[list[Decision]] = []
        self.looks: list[Any] = []
        pending = tuple(decision for key, decision in self.log.items() if key not in self.done)
        lineage = {epoch(number): 0 for number in range(1, self.number)}
        incidents = tuple(self.incidents.values())
        opened = Opened(epoch(self.number), lineage, pending, self.forgotten_ms, incidents=incidents)
        self.core = Coordinator(NODE, "default", opened, _LIMITS, self.now_ms, 1_000_000 + self.now_ms)

    def _step(self, event: Any) -> None:
        output: Output = self.core.step(event, self.now_ms)
        if output.append:
            self.appended.append(list(output.append))
            self.lines.append(
                "append " + " ".join(f"{shown(each.xid)} {shown(each.branches)}" for each in output.append)
            )
        self.lines += [f"to {self.names.get(session, '?')}: {message(each)}" for session, each in output.send]
        for incident in output.incidents:
            self.incidents[incident.xid, incident.branch] = incident
            self.lines.append(f"keep incident {shown(incident.xid)} {shown(incident.branch)} {incident.finish.name}")
        for key, number in output.closed:
            del self.incidents[key, number]
            self.lines.append(f"end of incident {shown(key)} {shown(number)}")
        for key in output.done:
            self.done.add(key)
            self.lines.append(f"done {shown(key)}")
        for look in output.look:
            self.looks.append(look)
            self.lines.append(f"look {shown(look.xid)} for {self.names.get(look.session, '?')}")
        self.lines += [f"close {self.names.get(session, '?')}: {message(each)}" for session, each in output.close]
        for note in output.notes:
            words = [f"{key}={shown(value)}" for key, value in note.fields.items() if key != "session"]
            self.lines.append(" ".join([f"note {note.level}: {note.event}", *words]))

    def run(self, command: str) -> list[str]:
        """What *command* brings about, and how the transactions stand."""
        super().run(command)
        states = [f"{shown(key)} is {row.state.value}" for key, row in self.core.state.transactions.items()]
        return [*(self.lines or ["nothing"]), *states]

    def _said(self, words: list[str], options: Options, made: Any) -> None:
        """By the process of the branch, or by whom the options say."""
        name = options.get("from", words[0][0])
        self._step(Received(self.sessions[name], NODE, made))

    # -------------------------------------------------------------------------------------------------- the commands

    def do_hello(self, words: list[str], options: Options) -> None:
        """hello a [resource=none] [seen=1] [holds=register]: a process connects."""
        (name,) = words
        self.sessions[name] = number = len(self.names) + 1
        self.names[number] = name
        resource = options.get("resource", f"db-{name[0]}" if name != "root" else "none")
        held = REGISTER if "holds" in options else None
        resources = () if resource == "none" else (ResourceInfo(resource, "test", register=held),)
        seen = Owner(NODE, epoch(int(options["seen"]))) if "seen" in options else None
        self._step(SessionOpened(number, Hello(1, "default", participant(name), name, resources, seen)))

    def do_bye(self, words: list[str], _options: Options) -> None:
        """bye a: its session has ended."""
        self._step(SessionClosed(self.sessions.pop(words[0])))

    def _root(self, words: list[str], options: Options) -> tuple[int, Xid, Any, tuple[Any, ...], int]:
        session = self.sessions[options.get("from", "root")]
        begun = int(options.get("begun", 1_000 + self.now_ms // 1000))
        return session, xid(words[0]), epoch(int(options.get("epoch", self.number))), tuple(map(ref, words[1:])), begun

    def do_commit(self, words: list[str], options: Options) -> None:
        """commit tx1 a1 b1 [left=5s] [wait=DECISION] [epoch=1] [begun=SECONDS] [decides=a1^|register]: the root asks for it.

        *decides*: which branch is to decide with its work, or that the register is to without any.
        """
        session, key, of, refs, begun = self._root(words, options)
        left_ms, wait, by = (
            _ms(options.get("left", "5s")),
            Wait[options.get("wait", "ACKNOWLEDGED")],
            options.get("decides"),
        )
        decider = branch(by) if by not in (None, "register") else None
        request = CommitRequest(key, of, begun, refs, left_ms, wait, REGISTER if by else None, decider)
        self._step(Received(session, NODE, request))

    def do_rollback(self, words: list[str], options: Options) -> None:
        """rollback tx1 a1 b1 [everywhere=yes]: the root gives up; perhaps with calls that still run."""
        session, key, of, refs, begun = self._root(words, options)
        self._step(Received(session, NODE, RollbackRequest(key, of, begun, refs, REASON, "everywhere" in options)))

    def do_outcome(self, words: list[str], options: Options) -> None:
        """outcome tx1 [a1] [epoch=1]: somebody asks how it ended."""
        session, key, of, refs, begun = self._root(words, options)
        self._step(Received(session, NODE, OutcomeRequest(key, of, begun, refs)))

    def do_vote(self, words: list[str], options: Options) -> None:
        """vote a1 tx1 PREPARED."""
        name, tx, vote = words
        reason = REASON if vote == "ABORT" else None
        token, under = "77" if vote == "PREPARED" else "", register(name)
        self._said(words, options, Voted(xid(tx), branch(name), Vote[vote], reason, token, under))

    def do_decided(self, words: list[str], options: Options) -> None:
        """decided tx1 a1 b1 from=d: a process that holds the register says so."""
        self._said(words, options, Decided(REGISTER, xid(words[0]), tuple(map(listed, words[1:]))))

    def do_register(self, words: list[str], options: Options) -> None:
        """register tx1 COMMITTED a1 b1 from=d: the process that was asked for it answers."""
        tx, found, *names = words
        self._said(words, options, RegisterAnswer(REGISTER, xid(tx), Found[found], tuple(map(listed, names))))

    def do_committing(self, words: list[str], options: Options) -> None:
        """committing a1 tx1: it is about to give COMMIT to its database."""
        self._said(words, options, Committing(xid(words[1]), branch(words[0]), "77"))

    def do_close(self, words: list[str], _options: Options) -> None:
        """close tx1 [a1]: an operator has seen to its incidents."""
        self._step(Close(xid(words[0]), branch(words[1]) if words[1:] else None))

    def do_trouble(self, words: list[str], options: Options) -> None:
        """trouble a1 tx1 [over]: its process cannot end it, or has."""
        self._said(words, options, Trouble(gid(words[0], words[1], self.number), None if words[2:] else REASON))

    def do_reports(self, _words: list[str], _options: Options) -> None:
        """reports: what an operator is shown of branches whose transaction is not open."""
        shown_now = self.core.state.reports.shown(self.now_ms)
        self.lines += [f"{shown(report.xid)} {shown(report.branch)}: {report.text}" for report in shown_now]

    def do_one_phase_done(self, words: list[str], options: Options) -> None:
        """one-phase-done a1 tx1 COMMITTED."""
        name, tx, result = words
        self._said(words, options, OnePhaseDone(xid(tx), branch(name), Outcome[result]))

    def do_acked(self, words: list[str], options: Options) -> None:
        """acked a1 tx1 DONE."""
        name, tx, finish = words
        self._said(words, options, Acked(xid(tx), branch(name), FinishResult[finish], f"db-{name[0]}"))

    def do_inquire(self, words: list[str], options: Options) -> None:
        """inquire a1 tx1 [epoch=1] [left=3s]: a prepared branch asks."""
        name, tx = words
        about = gid(name, tx, int(options.get("epoch", self.number)))
        self._said(words, options, Inquiry(about, 1_000, _ms(options.get("left", "0s"))))

    def do_resolved(self, words: list[str], options: Options) -> None:
        """resolved a1 tx1 COMMITTED: the database has told."""
        name, tx, result = words
        self._said(words, options, Resolved(xid(tx), branch(name), Outcome[result]))

    def do_logged(self, _words: list[str], _options: Options) -> None:
        """logged: the oldest batch is durable."""
        batch = self.appended.pop(0)
        self.log.update((decision.xid, decision) for decision in batch)
        self._step(Logged(tuple(decision.xid for decision in batch)))

    def do_not_logged(self, _words: list[str], _options: Options) -> None:
        """not-logged: the oldest batch certainly is not in the log."""
        batch = self.appended.pop(0)
        reason = Reason(AbortCode.LOG_UNAVAILABLE, "the disk is full")
        self._step(NotLogged(tuple(decision.xid for decision in batch), reason))

    def do_looked(self, _words: list[str], _options: Options) -> None:
        """looked: the log answers the oldest question."""
        look = self.looks.pop(0)
        self._step(Looked(look, self.log.get(look.xid)))

    def do_log(self, words: list[str], _options: Options) -> None:
        """log fails, log works."""
        self._step(LogHealth(words[0] == "works", "" if words[0] == "works" else "the disk is full"))

    def do_forgot(self, _words: list[str], _options: Options) -> None:
        """forgot: the log has deleted everything that is older than now."""
        self.forgotten_ms = 1_000_000 + self.now_ms
        self.log.clear()
        self._step(Forgot(self.forgotten_ms))

    def do_drain(self, _words: list[str], _options: Options) -> None:
        """drain: it is told to stop."""
        self._step(Drain())

    def do_advance(self, words: list[str], _options: Options) -> None:
        """advance 5s."""
        until_ms = self.now_ms + _ms(words[0])
        while (due_ms := self.core.next_wakeup_ms()) is not None and due_ms <= until_ms:
            self.now_ms = max(due_ms, self.now_ms)
            self._step(Woke())
            if self.core.next_wakeup_ms() == due_ms:
                break
        self.now_ms = until_ms

    def do_restart(self, _words: list[str], _options: Options) -> None:
        """restart: kill -9, and a new epoch on the same log."""
        self._start()
        self.lines.append(
            f"epoch {self.number}, pending {' '.join(map(shown, self.core.state.transactions)) or 'nothing'}"
        )


class ParticipantMachine(Machine):
    """The branches of one process, a, whose database answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Participant(lambda: 0.5)
        self.begun: list[Do] = []

    def _apply(self, effects: Effects) -> None:
        for do in effects.do:
            self.begun.append(do)
            self.lines.append(f"do {do.operation.value} {shown(do.gid.branch)}")
        self.lines += [f"send {message(each)}" for each in effects.send]
        for name, result, reason in effects.settle:
            self.lines.append(f"settle {shown(name)} {result.name}{f' {shown(reason)}' if reason else ''}")

    def run(self, command: str) -> list[str]:
        """What *command* brings about, and how the branches stand."""
        super().run(command)
        states = [f"{shown(name)} is {row.state.value}" for name, row in self.table.rows.items()]
        return [*(self.lines or ["nothing"]), *states]

    # -------------------------------------------------------------------------------------------------- the commands

    def do_open(self, words: list[str], options: Options) -> None:
        """open a1 tx1 [deadline=5s] [calls=1]: calls that have ended have used it."""
        name, tx = words
        row = self.table.open(gid(name, tx, 2), self.now_ms + _ms(options.get("deadline", "5s")), NODE)
        row.calls = int(options.get("calls", 1))

    def _hear(self, made: Any) -> None:
        self._apply(self.table.received(made, self.now_ms))

    def do_prepare(self, words: list[str], options: Options) -> None:
        """prepare a1 tx1 [calls=1]: the coordinator says so."""
        self._hear(Prepare(xid(words[1]), branch(words[0]), int(options.get("calls", 1))))

    def do_commit_one_phase(self, words: list[str], options: Options) -> None:
        """commit-one-phase a1 tx1 [calls=1]."""
        self._hear(CommitOnePhase(xid(words[1]), branch(words[0]), int(options.get("calls", 1))))

    def do_decide(self, words: list[str], options: Options) -> None:
        """decide a1 tx1 b1 c1 [calls=1]: all others have voted, and these are prepared."""
        name, tx, *others = words
        branches = tuple(map(listed, others))
        self._hear(Decide(xid(tx), branch(name), int(options.get("calls", 1)), REGISTER, branches))

    def do_commit(self, words: list[str], _options: Options) -> None:
        """commit a1 tx1."""
        self._hear(Commit(gid(words[0], words[1], 2), "77"))

    def do_rollback(self, words: list[str], _options: Options) -> None:
        """rollback a1 tx1."""
        self._hear(Rollback(gid(words[0], words[1], 2), REASON))

    def do_abandon(self, words: list[str], _options: Options) -> None:
        """abandon tx1: it is aborted, whatever there is of it here."""
        self._apply(self.table.abandon(Abandon(xid(words[0]), REASON), ("db-a", "db-b"), 30_000, self.now_ms))

    def do_resolve(self, words: list[str], _options: Options) -> None:
        """resolve a1 tx1: how did its commit in one phase end?  (b1: of another process.)"""
        name, tx = words
        if branch(name) in self.table.rows:
            self._hear(Resolve(xid(tx), branch(name), f"db-{name[0]}", "77"))
        else:
            self._apply(self.table.resolve_foreign(gid(name, tx, 2), "77", self.now_ms))

    def do_result(self, words: list[str], _options: Options) -> None:
        """result prepared | read-only | prepare-failed | rolled-back | finished DONE | finish-failed | one-phase COMMITTED."""
        what, *rest = words
        do = self.begun.pop(0)
        kind = BranchInput(what.replace("one-phase", "one-phase-ended").replace("-", " "))
        detail: Any = None
        match kind:
            case BranchInput.PREPARED:
                detail = "77"
            case BranchInput.PREPARE_FAILED | BranchInput.FINISH_FAILED:
                detail = REASON
            case BranchInput.FINISHED:
                detail = FinishResult[rest[0]]
            case BranchInput.ONE_PHASE_ENDED:
                detail = (Outcome[rest[0]], None)
        self._apply(self.table.step(kind, do.gid.branch, self.now_ms, detail))

    def do_committing(self, words: list[str], _options: Options) -> None:
        """committing a1: COMMIT is about to go to the database."""
        sent = self.table.committing(branch(words[0]), "77")
        self.lines += [f"send {message(sent)}"] if sent is not None else []

    def do_local(self, words: list[str], options: Options) -> None:
        """local commit a1 [calls=1], local decide a1 b1 c1, local rollback a1: the root is in this very process."""
        what, name, *others = words
        if what == "decide":
            order = Deciding(int(options.get("calls", 1)), tuple(map(listed, others)))
            self._apply(self.table.step(BranchInput.LOCAL_COMMIT, branch(name), self.now_ms, order))
        elif what == "commit":
            detail: Any = int(options.get("calls", 1))
            self._apply(self.table.step(BranchInput.LOCAL_COMMIT, branch(name), self.now_ms, detail))
        else:
            self._apply(self.table.step(BranchInput.LOCAL_ROLLBACK, branch(name), self.now_ms, REASON))

    def do_connected(self, _words: list[str], _options: Options) -> None:
        """connected: a session with the coordinator has begun."""
        self._apply(self.table.connected(NODE, self.now_ms))

    def do_coordinator_is(self, words: list[str], _options: Options) -> None:
        """coordinator-is 3: in that epoch."""
        self._apply(self.table.coordinator_is(Owner(NODE, epoch(int(words[0]))), self.now_ms))

    def do_found(self, words: list[str], _options: Options) -> None:
        """found a1 tx1: the database holds it prepared."""
        self._apply(self.table.in_doubt(gid(words[0], words[1], 2), 1_000, self.now_ms))

    def do_advance(self, words: list[str], _options: Options) -> None:
        """advance 5s."""
        until_ms = self.now_ms + _ms(words[0])
        while (due_ms := self.table.state.next_wakeup_ms()) is not None and due_ms <= until_ms:
            self.now_ms = max(due_ms, self.now_ms)
            self._apply(self.table.woke(self.now_ms))
        self.now_ms = until_ms


MACHINES: dict[str, type[Machine]] = {"coordinator": CoordinatorMachine, "participant": ParticipantMachine}
