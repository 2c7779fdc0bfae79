"""The state of a coordinator: the rows being worked on, what is remembered, and how effects are put into the output.

What a row does when something happens is in `phases`; what the outside may ask for is in `requests` and `recovery`.
"""

from __future__ import annotations

import heapq

from txrpc._protocol.coordinator.ended import EndedTransactions
from txrpc._protocol.coordinator.events import Limits, Note, Output
from txrpc._protocol.coordinator.reports import Report, Reports
from txrpc._protocol.coordinator.rows import BranchRow, Question, State, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry, SessionRegistry
from txrpc._protocol.messages import AboutEnd, FinishResult, FromCoordinator, Hello, Inquiry, Owner
from txrpc._protocol.records import Incident, Opened
from txrpc.ids import BranchId, Gid, RegisterId, Xid

__all__ = ["MARGIN_MS", "CoordinatorState", "sentence"]

MARGIN_MS = 60_000
"""How much longer than the longest timeout ended transactions are remembered: for messages on their way."""


class CoordinatorState:
    """The state of one coordinator, and the small operations on it that every rule uses."""

    def __init__(self, owner: Owner, group: str, opened: Opened, limits: Limits, now_ms: int, clock_ms: int) -> None:
        self.owner = owner
        self.group = group
        self.limits = limits
        self.lineage = frozenset(opened.lineage) | {owner.epoch}
        self.identities = dict(opened.identities)
        """Which database each resource name means, as far as one has told (rule 17)."""
        self.position = opened.position
        self.ends = dict(opened.lineage)
        self.presumes_from_ms = now_ms + (limits.recovery_wait_ms if opened.lineage else 0)
        self.held: list[tuple[int, AboutEnd | Inquiry]] = []
        """Questions about earlier epochs that came before that."""
        self.directory = SessionRegistry()
        self.transactions: dict[Xid, TransactionRow] = {}
        self.committed = self.aborted = self.heuristic = 0
        self.log_trouble = ""
        self.draining = False
        self.incidents = {(incident.xid, incident.branch): incident for incident in opened.incidents}
        """Branches that did not end as decided, until an operator closes them."""
        self.lost = 0
        self.reports = Reports()
        self.forgotten_ms = opened.forgotten_ms
        self.offset_ms = clock_ms - now_ms
        self.now_ms = self.ticked_ms = now_ms
        self.timers: list[tuple[int, Xid]] = []
        self.registers: dict[str, RegisterId] = {}
        """Of the resources that decide, by their names."""
        self.questions: dict[tuple[RegisterId, Xid], Question] = {}
        """What registers are being asked."""
        self.waiting_for_resource: dict[str, set[tuple[Xid, BranchId]]] = {}
        self.out = Output()
        self.remembered = EndedTransactions(
            (limits.max_timeout_ms + MARGIN_MS) // 1000, limits.max_remembered, self.tick
        )

    @property
    def tick(self) -> int:
        """The coordinator's own clock, in seconds."""
        return (self.now_ms + self.offset_ms) // 1000

    def state_of(self, xid: Xid) -> State:
        """The state in which the table is entered for *xid*."""
        row = self.transactions.get(xid)
        if row is not None:
            return row.state
        if xid not in self.remembered:
            return State.ABSENT
        return State.COMMITTED if self.remembered[xid] is None else State.ABORTED

    def send(self, session: int, message: FromCoordinator) -> None:
        if session in self.directory.sessions:
            self.out.send.append((session, message))

    def expect_reply(
        self, entry: SessionEntry, row: TransactionRow, branch: BranchRow, message: FromCoordinator
    ) -> None:
        """Send what must be answered: should the session end first, SESSION_LOST says so."""
        self.cancel_wait(row, branch)
        branch.session, branch.trouble = entry.session, ""
        entry.awaiting_reply.add((row.xid, branch.ref.branch))
        self.send(entry.session, message)

    def cancel_wait(self, row: TransactionRow, branch: BranchRow) -> None:
        """Stop waiting for a branch: for the session that was asked, and for one with the resource."""
        debt = row.xid, branch.ref.branch
        replier = None if branch.session is None else self.directory.sessions.get(branch.session)
        if replier is not None:
            replier.awaiting_reply.discard(debt)
        branch.session = None
        waiting = self.waiting_for_resource.get(branch.ref.resource)
        if waiting is not None:
            waiting.discard(debt)
            if not waiting:
                del self.waiting_for_resource[branch.ref.resource]

    def wait_for_resource(self, row: TransactionRow, branch: BranchRow) -> None:
        self.cancel_wait(row, branch)
        branch.trouble = f"no process with resource {branch.ref.resource} is connected"
        self.await_resource(row, branch)

    def await_resource(self, row: TransactionRow, branch: BranchRow) -> None:
        """The next session with the resource of *branch* brings SESSION_FOUND."""
        self.waiting_for_resource.setdefault(branch.ref.resource, set()).add((row.xid, branch.ref.branch))

    def bind(self, hello: Hello) -> None:
        """Names that were not known mean from now on what this process says (rule 17)."""
        for resource in hello.resources:
            if resource.identity and resource.name not in self.identities:
                self.identities[resource.name] = self.out.bind[resource.name] = resource.identity

    def hold(self, session: int, message: AboutEnd | Inquiry) -> bool:
        """Whether it is too early to presume anything about an earlier epoch; *message* is then taken again when it is not."""
        if self.now_ms >= self.presumes_from_ms:
            return False
        self.held.append((session, message))
        return True

    def wake_at(self, row: TransactionRow, due_ms: int) -> None:
        row.time_up_ms = due_ms
        heapq.heappush(self.timers, (due_ms, row.xid))

    # ----------------------------------------------------------------------------------- what an operator must know

    def incident(self, xid: Xid, branch: BranchId, resource: str, finish: FinishResult) -> None:
        """A branch did not end as decided: record it, count it, and say so, once (rules 1 and 16)."""
        held = self.incidents.get((xid, branch))
        if held is not None and held.finish is finish:
            return
        incident = Incident(xid, branch, resource, finish, self.now_ms + self.offset_ms)
        self.incidents[xid, branch] = incident
        self.out.incidents.append(incident)
        self.heuristic += finish is FinishResult.HEURISTIC
        self.lost += finish is FinishResult.LOST
        fields = {"xid": xid, "branch": branch, "resource": resource, "reason": sentence(incident)}
        self.note("error", _EVENTS[finish], **fields)

    def end_incident(self, xid: Xid, branch: BranchId, by: str) -> None:
        incident = self.incidents.pop((xid, branch), None)
        if incident is not None:
            self.out.closed.append((xid, branch))
            self.note("warning", "incident closed", xid=xid, branch=branch, resource=incident.resource, by=by)

    def report(self, gid: Gid, since_ms: int, text: str, told: bool = False, session: int | None = None) -> None:
        """A branch without a row is prepared, or may be: people must be able to see it (rule 14)."""
        began_ms = self.now_ms - since_ms
        report = Report(gid.xid, gid.branch, gid.resource, began_ms, self.now_ms, text, int(told), session)
        self.reports.add(report)

    def report_unreachable(self, gid: Gid, text: str) -> None:
        text = f"{text}; no process with resource {gid.resource} is connected"
        now_ms = self.now_ms
        self.reports.add(Report(gid.xid, gid.branch, gid.resource, now_ms, now_ms, text, unreported=True))

    def violation(self, session: int | None, message: object, text: str) -> None:
        self.note("warning", "protocol violation", session=session, message=type(message).__name__, reason=text)

    def note(self, level: str, event: str, **fields: object) -> None:
        self.out.notes.append(Note(level, event, fields))


def sentence(incident: Incident) -> str:
    """Return what happened to the branch, for people, and what there is to do."""
    return _SENTENCES[incident.finish].format(incident.resource)


_EVENTS = {
    FinishResult.NOT_HERE: "branch not here",
    FinishResult.LOST: "lost branch",
    FinishResult.HEURISTIC: "heuristic outcome",
}
_SENTENCES = {
    FinishResult.NOT_HERE: (
        "{} does not have the branch, and cannot prove how it ended: see that this name means the database that voted, look "
        "whether the work is there, and close the incident"
    ),
    FinishResult.LOST: (
        "the database of {} has lost the branch, whose transaction is committed: a standby that lagged, or a backup, has taken its "
        "place; repair its data and close the incident"
    ),
    FinishResult.HEURISTIC: (
        "the branch in {} was ended by hand against the decision: repair its data and close the incident"
    ),
}
