"""A small world in one thread: a coordinator, services with a database each, a client, and what lies between.

Everything that is under way is a job in one list: a message on a link, an operation in a database, a write to the log.
`World.step` carries one out; whoever plays with it chooses which, and what dies between two of them.  Links keep the order of their
messages, as streams do.  Databases and the log survive every crash; work that was never prepared does not survive its process.

`verification.explorer` walks through everything that can happen in such a world.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from txrpc._protocol.coordinator.events import (
    Logged,
    Looked,
    Lookup,
    Output,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.deciding import Decided, RegisterQuestion, Registers
from txrpc._protocol.messages import (
    BranchRef,
    Commit,
    CommitRequest,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    ResourceInfo,
    Rollback,
    RollbackRequest,
    Tick,
    Vote,
    Welcome,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.participant.branch import BranchState, Do
from txrpc._protocol.records import Decision, Opened, PreparedBranch
from txrpc.ids import BranchId, Epoch, RegisterId, Xid
from verification.explorer_nodes import LIMITS, LONGEST_MS, REGISTER, XID, Client, Database, Ledger, Link, Service

__all__ = ["SmallWorld", "early"]


def _order(job: tuple[Any, ...]) -> tuple[str, str]:
    kind, *arguments = job
    if kind == "operation":
        return kind, f"{arguments[0].id}{arguments[1].operation.value}{arguments[1].gid.branch}"
    if kind == "ask":
        return kind, f"{arguments[0].id}{arguments[1].claim}"
    return kind, str(arguments[0]) if kind in ("up", "down", "operator") else ""


NODE: Final = "c1"
"""The only coordinator that there is."""


class SmallWorld:
    """See the module's docstring."""

    def __init__(self, resources: int, decides: str = "") -> None:
        """*decides*: "root", a database of the client's decides; "service", one that the services reach."""
        self.ledger = Ledger("active" if decides == "root" else "elsewhere") if decides else None
        self.now_ms = 1_000_000
        self.jobs: list[tuple[Any, ...]] = []
        self.links: dict[int, Link] = {}
        self.sessions = 0
        self.log: dict[Xid, Decision] = {}
        self.done: set[Xid] = set()
        self.forced = 0
        self.counts: Counter[str] = Counter()
        self.epochs: list[Epoch] = []
        self.sleeper: Coordinator | None = None
        """One that was taken over, and has not noticed."""
        self.said: set[str] = set()
        self.repeated = False
        """Whether a message was delivered twice, which no stream does: the coordinator may call it a violation."""
        self.databases = {f"db{n}": Database() for n in range(resources)}
        self.peers: list[Service | Client] = []
        self.start_coordinator()
        self.services = [Service(self, f"db{n}", n + 1) for n in range(resources)]
        self.client = Client(self)
        self.peers = [*self.services, self.client]
        for peer in self.peers:
            self.connect(peer)
        self.run()
        self.counts.clear()

    # ------------------------------------------------------------------------------------------------------- parts

    @property
    def ledger_info(self) -> tuple[ResourceInfo, ...]:
        """What each process says of the database that decides: all reach it."""
        return (ResourceInfo("ledger", "test", register=REGISTER),) if self.ledger is not None else ()

    def start_coordinator(self) -> None:
        """A new epoch on the same log; everybody connects again."""
        self._open()
        for peer in self.peers:
            self.connect(peer)

    def _open(self) -> None:
        lineage = dict.fromkeys(self.epochs, 0)
        self.epochs.append(Epoch.make(len(self.epochs) + 1, 7))
        self.owner = Owner(NODE, self.epochs[-1])
        pending = tuple(decision for xid, decision in self.log.items() if xid not in self.done)
        opened = Opened(self.owner.epoch, lineage, pending)
        self.coordinator = Coordinator(NODE, "bank", opened, LIMITS, self.now_ms, self.now_ms)

    def connect(self, peer: Service | Client) -> None:
        """Give *peer* a new session."""
        peer.session = self.sessions + 1
        self._meet(peer)

    def _meet(self, peer: Service | Client) -> None:
        """Give *peer* a session that it listens to as soon as it is greeted there."""
        self.sessions += 1
        self.links[self.sessions] = Link(peer, self.coordinator)
        self.honour(self.coordinator.step(SessionOpened(self.sessions, peer.hello()), self.now_ms))

    def send_up(self, session: int, message: Any) -> None:
        """Send to the coordinator."""
        if session in self.links:
            self.links[session].up.append(message)
            self.jobs.append(("up", session))

    def honour(self, output: Output, coordinator: Coordinator | None = None) -> None:
        """Do what a coordinator says, which is the present one if not told otherwise."""
        coordinator = coordinator or self.coordinator
        if output.append:
            self.jobs.append(("log", coordinator, tuple(output.append)))
        for session, message in output.send:
            if isinstance(message, Registers):
                continue  # all know where the ledger decides
            self.watch(message)
            if session in self.links:
                self.links[session].down.append(message)
                self.jobs.append(("down", session))
        if output.done and coordinator is self.sleeper:
            self._fence()  # marks are written to the log as well
        elif output.done:
            held = [gid for database in self.databases.values() for gid in database.prepared]
            assert not held, "forgotten before every branch had committed"
            self.done.update(output.done)
        for lookup in output.look:
            self.jobs.append(("look", coordinator, lookup))
        for session, _ in output.close:
            self.links.pop(session, None)
        for note in output.notes:
            if note.event == "branch of a lost decision":
                row = coordinator.state.transactions.get(XID)
                assert row is None or row.state is State.LEFT, (
                    f"an operator is called, and it is {row.state.value} here"
                )
                self.jobs.append(("operator", note.fields["branch"]))
        if not self.repeated:
            assert not [note for note in output.notes if note.event == "protocol violation"], output.notes

    def watch(self, message: Any) -> None:
        """What is said must be true by then, and stay so."""
        committed = isinstance(message, Commit) or (
            isinstance(message, OutcomeReply) and message.outcome is Outcome.COMMITTED
        )
        aborted = isinstance(message, Rollback) or (
            isinstance(message, OutcomeReply) and message.outcome is Outcome.ABORTED
        )
        self.said |= {word for word, said in (("committed", committed), ("aborted", aborted)) if said}
        assert len(self.said) < 2, "said both"
        held = any(state == "prepared" for database in self.databases.values() for state in database.branches.values())
        decided = self.ledger is not None and (self.ledger.row is Found.COMMITTED or self.ledger.lost)
        assert not (committed and held) or self.log or decided, "said before it was durable"

    # -------------------------------------------------------------------------------------------------------- time

    def step(self) -> None:
        """Carry out the first job."""
        kind, *arguments = self.jobs.pop(0)
        getattr(self, f"_job_{kind}")(*arguments)

    def carry_out(self, job: tuple[Any, ...]) -> None:
        """Carry out this one, or one that is equal."""
        self.jobs.remove(job)
        kind, *arguments = job
        getattr(self, f"_job_{kind}")(*arguments)

    def _job_up(self, session: int) -> None:
        if session in self.links:
            link = self.links[session]
            message = link.up.popleft()
            self._count(message)
            self.honour(link.coordinator.step(Received(session, NODE, message), self.now_ms), link.coordinator)

    def _job_down(self, session: int) -> None:
        if session in self.links:
            link = self.links[session]
            message = link.down.popleft()
            self._count(message)
            if isinstance(message, Welcome):
                link.peer.session = session
            if link.peer.session == session:  # it does not listen to an epoch that is over
                link.peer.take(message)

    def _job_operation(self, service: Service, do: Do) -> None:
        service.end(do)

    def _job_log(self, coordinator: Coordinator, decisions: tuple[Decision, ...]) -> None:
        if coordinator is self.sleeper:
            self._fence()
            return
        self.forced += 1
        assert "aborted" not in self.said, "decided after its abort was told"
        for decision in decisions:
            self.log.setdefault(decision.xid, decision)
        self._job_heard(coordinator, decisions)

    def _job_heard(self, coordinator: Coordinator, decisions: tuple[Decision, ...]) -> None:
        self.honour(coordinator.step(Logged(tuple(d.xid for d in decisions)), self.now_ms), coordinator)

    def _job_look(self, coordinator: Coordinator, lookup: Lookup) -> None:
        self.honour(coordinator.step(Looked(lookup, self.log.get(lookup.xid)), self.now_ms), coordinator)

    def _job_insert(self, prepared: tuple[PreparedBranch, ...]) -> None:
        assert self.ledger is not None
        if self.ledger.row is Found.ABORTED or self.ledger.id != REGISTER:
            self.ledger.work = "rolled back"
            self.client.refused()
            return
        self.ledger.work, self.ledger.branches = "inserted", prepared
        self.jobs.append(("commit",))

    def _job_commit(self) -> None:
        assert self.ledger is not None
        assert "aborted" not in self.said, "decided after its abort was told"
        self.ledger.work, self.ledger.row = "committed", Found.COMMITTED
        self.client.told(Outcome.COMMITTED)
        self.send_up(self.client.session, Decided(REGISTER, XID, self.ledger.branches))

    def _job_learn(self) -> None:
        """The connection broke in COMMIT: the root asks the register."""
        assert self.ledger is not None
        found, branches = self.ledger.ask(REGISTER, True, None)
        if found is Found.COMMITTED:
            self.client.told(Outcome.COMMITTED)
            self.send_up(self.client.session, Decided(REGISTER, XID, branches))
        elif found is Found.ABORTED:
            self.client.refused()
        else:
            self.client.told(Outcome.UNKNOWN)

    def _job_operator(self, branch: BranchId) -> None:
        """A branch whose decision is lost is ended by hand, as its transaction has ended where it has."""
        for database in self.databases.values():
            if database.prepared.pop(branch, None) is not None:
                committed = "committed" in {
                    state for each in self.databases.values() for state in each.branches.values()
                }
                database.branches[branch] = "committed" if committed else "rolled back"

    def _job_ask(self, service: Service, question: RegisterQuestion) -> None:
        service.answer(question)

    def _count(self, message: Any) -> None:
        if isinstance(message, CommitRequest | RollbackRequest | OutcomeRequest | OutcomeReply):
            self.counts["client"] += 1
        elif not isinstance(message, Welcome | Tick):
            self.counts["participant"] += 1

    def run(self) -> None:
        """Carry out all jobs; no time passes."""
        while self.jobs:
            self.step()

    def settle(self) -> None:
        """Let things and time take their course until everything has ended."""
        for _ in range(2_000):
            self.run()
            if self.quiet:
                return
            self.let_time_pass()
        raise AssertionError(
            f"not quiet: {self.coordinator.state.transactions} {[s.table.rows for s in self.services]}"
        )

    def let_time_pass(self) -> None:
        """Go on to when something is due next."""
        assert self.now_ms < 1_000_000 + LONGEST_MS, "it does not end"
        coordinators = [self.coordinator, *([self.sleeper] if self.sleeper else [])]
        dues = [s.table.state.next_wakeup_ms() for s in self.services] + [c.next_wakeup_ms() for c in coordinators]
        self.now_ms = max(self.now_ms, min(due for due in dues if due is not None))
        for service in self.services:
            service.woke()
        for coordinator in coordinators:
            self.honour(coordinator.step(Woke(), self.now_ms), coordinator)

    @property
    def quiet(self) -> bool:
        """Whether every branch and every transaction has ended and the client, if it is alive, knows how."""
        rows = [row for service in self.services for row in service.table.rows.values()]
        answered = not self.client.asked or self.client.session not in self.links or bool(self.client.replies)
        ended = all(row.state is BranchState.ENDED for row in rows)
        held = any(database.prepared for database in self.databases.values())
        return ended and not held and answered and not self.coordinator.state.transactions

    # ----------------------------------------------------------------------------------------------------- crashes

    def crash_service(self, index: int, lucky: bool) -> None:
        """Kill and restart a service.  *lucky*: what it was doing still took effect, what it had sent still arrives."""
        service = self.services[index]
        link = self.links[service.session]
        if lucky:
            for message in link.up:
                self.honour(self.coordinator.step(Received(service.session, NODE, message), self.now_ms))
        del self.links[service.session]
        for job in [job for job in self.jobs if job[0] == "operation" and job[1] is service]:
            self.jobs.remove(job)
            if lucky:
                service._carry_out(job[2])
        for branch, state in service.database.branches.items():
            if state == "active":
                service.database.branches[branch] = "rolled back"
        self.honour(self.coordinator.step(SessionClosed(service.session), self.now_ms))
        self.services[index] = Service(self, service.resource, int.from_bytes(service.id, "big") + 100)
        self.peers = [*self.services, self.client]
        self.connect(self.services[index])

    def crash_coordinator(self, lucky: bool) -> None:
        """Kill and restart the coordinator.  *lucky*: what it was writing to the log got there."""
        self.links.clear()
        for job in [job for job in self.jobs if job[0] in ("log", "look")]:
            self.jobs.remove(job)
            if lucky and job[0] == "log":
                self.log.update({decision.xid: decision for decision in job[2]})
        self.start_coordinator()

    def take_over(self, landed: bool) -> None:
        """Another process opens the log, while the coordinator sleeps.  *landed*: what that one was writing got there before."""
        self.sleeper = self.coordinator
        if landed:
            for number, (kind, *arguments) in enumerate(self.jobs):
                if kind == "log":
                    self.log.update({decision.xid: decision for decision in arguments[1]})
                    self.jobs[number] = ("heard", *arguments)
        self._open()
        for peer in self.peers:
            self._meet(peer)

    def _fence(self) -> None:
        """The sleeper hears that its epoch is over, and ends."""
        self.links = {number: link for number, link in self.links.items() if link.coordinator is not self.sleeper}
        self.jobs = [job for job in self.jobs if job[0] not in ("log", "look", "heard") or job[1] is not self.sleeper]
        self.sleeper = None

    def is_asleep(self, job: tuple[Any, ...]) -> bool:
        """Whether it is the sleeper's to do: time does not wait for that."""
        kind, *arguments = job
        if kind == "up":
            return arguments[0] in self.links and self.links[arguments[0]].coordinator is self.sleeper
        return kind in ("log", "look", "heard") and arguments[0] is self.sleeper

    def has_work_in_the_ledger(self, ref: BranchRef) -> None:
        """The work of this branch is in the database that decides."""
        assert self.ledger is not None
        self.ledger.worker = ref.branch

    def fail_over(self, kept: bool) -> None:
        """A standby takes over the database that decides; *kept*: with the latest row, and the work that was committed with it."""
        ledger = self.ledger
        assert ledger is not None
        ledger.id = RegisterId(REGISTER.table + b"another!")
        if ("commit",) in self.jobs:
            self.jobs[self.jobs.index(("commit",))] = ("learn",)
            if kept:
                ledger.work, ledger.row = "committed", Found.COMMITTED
        if not kept and ledger.row is not Found.OPEN:
            ledger.row, ledger.lost = Found.OPEN, True
        after = {
            "active": "rolled back",
            "inserted": "rolled back",
            "committed": "lost" if ledger.lost else "committed",
        }
        ledger.work = after.get(ledger.work, ledger.work)
        for database in self.databases.values():
            if ledger.worker is not None and (state := database.branches.get(ledger.worker)) is not None:
                database.branches[ledger.worker] = after.get(state, state)

    def cut(self, peer: Service | Client) -> None:
        """Break the connection of *peer*, which connects again."""
        del self.links[peer.session]
        self.honour(self.coordinator.step(SessionClosed(peer.session), self.now_ms))
        self.connect(peer)

    def kill_client(self) -> None:
        """The root dies, for good; what it has sent still arrives."""
        link = self.links[self.client.session]
        for message in link.up:
            self.honour(self.coordinator.step(Received(self.client.session, NODE, message), self.now_ms))
        del self.links[self.client.session]
        self.honour(self.coordinator.step(SessionClosed(self.client.session), self.now_ms))
        self.client.asked = False
        self.jobs = [job for job in self.jobs if job[0] not in ("insert", "commit", "learn")]
        if self.ledger is not None and self.ledger.work in ("active", "inserted"):
            self.ledger.work = "rolled back"  # its database notices

    def lose(self, session: int, way: str) -> None:
        """What is on this way of a session is lost, what is on the other still arrives, and the connection breaks."""
        link = self.links[session]
        if way == "down":
            for message in link.up:
                self.honour(self.coordinator.step(Received(session, NODE, message), self.now_ms))
        else:
            for message in link.down:
                link.peer.take(message)
        self.cut(link.peer)

    def repeat(self, session: int, way: str) -> None:
        """The first message on this way of a session is delivered, and will be once more."""
        self.repeated = True
        link = self.links[session]
        if way == "up":
            self.honour(self.coordinator.step(Received(session, NODE, link.up[0]), self.now_ms))
        else:
            link.peer.take(link.down[0])

    # --------------------------------------------------------------------------------------------- for the explorer

    def peer_name(self, session: int) -> str:
        """Who is at the other end."""
        peer = self.links[session].peer
        return peer.resource if isinstance(peer, Service) else "the client"

    def is_for_an_operator(self, job: tuple[Any, ...]) -> bool:
        """Whether a person is to do it, who takes longer than any message."""
        return bool(job[0] == "operator")

    def name_of(self, job: tuple[Any, ...]) -> str:
        """A job in a few words."""
        kind, *arguments = job
        if kind in ("up", "down"):
            link = self.links.get(arguments[0])
            if link is None:
                return "a message of a broken connection is dropped"
            message = (link.up if kind == "up" else link.down)[0]
            return f"{type(message).__name__} {'from' if kind == 'up' else 'reaches'} {self.peer_name(arguments[0])}"
        if kind == "operation":
            return f"{arguments[0].resource}: {arguments[1].operation.value}"
        if kind == "ask":
            return f"the register is {'claimed' if arguments[1].claim else 'read'} through {arguments[0].resource}"
        if kind in ("insert", "commit", "learn"):
            return f"the ledger: {kind}"
        if kind == "operator":
            return "an operator ends a branch by hand"
        name = {"log": "the log writes", "look": "the log is asked", "heard": "the log has written"}[kind]
        return f"{name} (for the sleeper)" if arguments[0] is self.sleeper else name

    def tidy(self) -> None:
        """Put what has no order into one, and forget what only counts: equal worlds are to look equal."""
        self.jobs = [job for job in self.jobs if job[0] not in ("up", "down") or job[1] in self.links]
        self.jobs.sort(key=_order)
        self.forced = 0
        self.counts.clear()
        for database in self.databases.values():
            database.forced = 0
        nothing: Any = None
        for coordinator in (self.coordinator, *([self.sleeper] if self.sleeper else [])):
            coordinator.state.committed = coordinator.state.aborted = 0
            coordinator.state.out = nothing
        for service in self.services:
            service.table.state.out = nothing

    # ------------------------------------------------------------------------------------------------- the checker

    def check(self) -> Outcome | None:
        """Agreement, and the truth of what the client heard; returns that."""
        states = {state for database in self.databases.values() for state in database.branches.values()}
        states |= {self.ledger.work} if self.ledger is not None else set()
        assert not {"active", "prepared"} & states
        assert not {"committed", "rolled back"} <= states, "no agreement"
        assert self.done == set(self.log), "a record that nobody will ever mark done"
        outcomes = {reply.outcome for reply in self.client.replies}
        assert len(outcomes) <= 1
        outcome = next(iter(outcomes), None)
        if self.ledger is not None and self.ledger.lost:
            return outcome  # what was true then has been lost
        if outcome is Outcome.COMMITTED:
            assert "rolled back" not in states
        elif outcome is Outcome.ABORTED:
            assert "committed" not in states
        return outcome

    def bury(self) -> None:
        """Let the tombstones' time pass; then no service may remember anything."""
        for service in self.services:
            table = service.table
            while (due_ms := table.state.next_wakeup_ms()) is not None:
                assert not table.woke(max(due_ms, self.now_ms)).do
            assert (table.rows, table.state.by_use, table.state.closed_until_ms) == ({}, {}, {})


def early(refs: list[BranchRef], services: list[Service]) -> list[BranchRef]:
    """All services vote before they reply."""
    voted = [service.vote_early(ref) for ref, service in zip(refs, services, strict=True)]
    assert {ref.vote for ref in voted} <= set(Vote)
    return voted
