"""A whole cluster in one thread, from one seed: it works, things go wrong, everything is repaired, and it must come to rest."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from txrpc._client import completion
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.reasons import reason_of
from txrpc._protocol.messages import (
    Outcome,
    Wait,
)
from txrpc.errors import (
    AbortCode,
    HeuristicOutcome,
    IllegalState,
    OutcomeUnknown,
    Reason,
    ResourceUnavailable,
    TransactionAborted,
    TxrpcError,
)
from txrpc.ids import BranchId
from verification.simulation.checkers import all_checkers
from verification.simulation.coordinator import CoordinatorProcess
from verification.simulation.database import Database, Refused
from verification.simulation.engine import RETENTION_MS, Disk
from verification.simulation.group_disk import GroupDisk
from verification.simulation.history import History, Violation
from verification.simulation.network import Network, Stream
from verification.simulation.options import NODE, Options
from verification.simulation.process import Call, Process, result_of
from verification.simulation.scheduler import Scheduler, Task
from verification.simulation.troubles import troubles

__all__ = ["Cluster", "Run", "simulate"]

_REPAIRED_MS = 150_000
"""How long after the repair everything must have ended: the longest deadline, patience, and the slowest paces of asking."""


@dataclass(slots=True)
class Run:
    """What came of one seed."""

    seed: int
    options: Options
    steps: int
    outcomes: Counter[str]
    faults: Counter[str]
    violation: BaseException | None
    lines: list[tuple[int, str, str, str]]


def simulate(seed: int, options: Options | None = None, trace: bool = False) -> Run:
    """Run the world of *seed*; a broken rule is in the result, as is a mistake of any kind."""
    options = options or Options.of(seed)
    cluster = Cluster(seed, options, trace)
    violation: BaseException | None = None
    try:
        cluster.run()
    except (Exception, Violation) as error:
        violation = error
    lines = cluster.history.lines or []
    return Run(seed, options, cluster.scheduler.steps, cluster.outcomes, cluster.faults, violation, lines)


class Cluster:
    """The nodes, the story of every root, and the troubles."""

    def __init__(self, seed: int, options: Options, trace: bool = False) -> None:
        self.options = options
        self.scheduler = Scheduler(seed)
        self._dice = self.scheduler.dice
        self._final_dice = random.Random(f"final {seed}")
        self._deciding_dice = random.Random(f"deciding {seed}")
        self.history = History(all_checkers(), lambda: self.scheduler.now_ms)
        if trace:
            self.history.lines = []
        self.network = Network(self.scheduler, options)
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wall_ms = 1_700_000_000_000
        self.disk = GroupDisk(self.scheduler, options, seed) if options.group else Disk(self.scheduler, options)
        self.right_log: dict[str, Any] | None = None
        self._started = 0
        self.nodes = tuple(f"c{number + 1}" for number in range(options.nodes))
        self.coordinators: dict[str, CoordinatorProcess] = {}
        """The latest process of each node."""
        self.gone: set[str] = set()
        """Nodes whose process has died for good."""
        self.old: list[CoordinatorProcess] = []
        names = [f"db-{n}" for n in range(options.databases)]
        self.databases = [Database(self.scheduler, name, options, self.history) for name in names]
        for node in self.nodes:
            self.start_coordinator(node)
        services = [self._process(f"service-{n}", n) for n in range(options.services)]
        clients = [self._process(f"client-{n}", n) for n in range(options.clients)]
        self.services, self.clients = services, clients
        self.processes = services + clients
        for process in self.processes:
            process.peers = {service.name: service for service in services}
            if self._dice.random() < options.slow:
                process.slow = 10
        for client in clients:
            for number in range(options.transactions):
                at_ms = self._dice.randint(0, options.trouble_ms)
                self.scheduler.after(at_ms, self._begin, client, f"{client.name}.{number}")

    def _process(self, name: str, number: int) -> Process:
        """Every process can reach two databases at most, so that some share one and some do not."""
        chosen = {
            f"db-{n % len(self.databases)}": self.databases[n % len(self.databases)] for n in (number, number + 1)
        }
        return Process(self.scheduler, name, self.network, self.history, chosen, self.nodes, self._dial)

    # ------------------------------------------------------------------------------------------------- the coordinator

    @property
    def coordinator(self) -> CoordinatorProcess:
        """The latest process of the first node."""
        return self.coordinators[NODE]

    def start_coordinator(self, node: str = NODE) -> None:
        """The next process of a node, on the same log."""
        self._started += 1
        wall_ms = self.wall_ms + self.scheduler.now_ms
        name = f"coordinator-{self._started}"
        process = CoordinatorProcess(self.scheduler, name, node, self.disk, self.options, self.history, wall_ms)
        process.on_behind = lambda: self.scheduler.after(self._dice.randint(50, 2_000), self._bring_log_back)
        process.call_operator = self._end_by_hand
        self.coordinators[node] = process

    def _end_by_hand(self, branch: BranchId) -> None:
        """An operator is told of a branch whose decision is lost."""
        held = next((database for database in self.databases if branch in database.prepared), None)
        if held is not None:
            self.note_fault("branch of a lost decision", held.name, "has a branch that is ended by hand")
            held.by_hand(branch, False)

    def _bring_log_back(self) -> None:
        """An operator has found the right log after all."""
        if self.right_log is not None:
            self.disk.add(self.right_log)
            self.right_log = None
            self.note_fault("log brought back", self.coordinator.name, "is given the right log")
        if not self.coordinator.up:
            self.start_coordinator()

    def _dial(self, process: Process, address: str) -> Stream | None:
        coordinator = self.coordinators[address]
        if not coordinator.up:  # an earlier process of that name may have been frozen when it was replaced
            coordinator = next((old for old in self.old if old.node == address and old.up), coordinator)
        if not coordinator.up or self.network.lost(process, coordinator) or self.network.lost(coordinator, process):
            return None
        stream = Stream(self.network, self.scheduler, self.history, process, coordinator)
        coordinator.accept(stream)
        return stream

    # --------------------------------------------------------------------------------------------------- the roots' work

    def _begin(self, client: Process, name: str) -> None:
        if client.up:
            Task(client, self._root(client, name)).end.then(result_of)

    def _root(self, client: Process, name: str) -> Flow[None]:
        timeout_s = self._dice.choice((0.5, 2.0, 5.0, 10.0))
        if client.state.chosen is None:
            try:
                yield client.runtime.reconnect, ("", 5.0)
            except TxrpcError:
                self.outcomes["no coordinator"] += 1
                return
        try:
            part = client.core.begin_part(timeout_s, False, self._decider(client))
        except ResourceUnavailable:
            self.outcomes["no register"] += 1
            return
        try:
            yield from self._work(client, part, name)
        except (TxrpcError, Refused) as error:
            yield from self._give_up(client, part, reason_of(error))
            return
        if self._dice.random() < self.options.gives_up:
            yield from self._give_up(client, part, Reason(AbortCode.REQUESTED, "changed its mind"))
        else:
            yield from self._commit(client, part)

    def _decider(self, client: Process) -> str | None:
        """The resource of *client* that is to decide the next transaction, if one is."""
        if self._deciding_dice.random() >= self.options.decides:
            return None
        elsewhere = sorted({*client.state.registers} - {*client.state.resources})
        if elsewhere and self._deciding_dice.random() < 0.5:
            return self._deciding_dice.choice(elsewhere)
        return self._deciding_dice.choice(sorted(client.state.resources))

    def _work(self, client: Process, part: LocalTransaction, name: str) -> Flow[None]:
        for number in range(self._dice.randint(1, self.options.calls)):
            call = self._draw_call(f"{name}/{number}", 0)
            if self._dice.random() < self.options.own_resource:
                own = Call(call.name, client.name, self._dice.choice(sorted(client.state.resources)), call.writes)
                yield from client.work(part, own, joined=False)
                call = own
            else:
                yield from client.call(part, self._perhaps_final(call))
            self._saw(part, call)
        elsewhere = part.decides_in and part.decides_in not in client.state.resources
        if elsewhere and self._deciding_dice.random() < 0.5:  # the others are decided when they are committed
            yield from self._decide_elsewhere(client, part, f"{name}/last")

    def _decide_elsewhere(self, client: Process, part: LocalTransaction, name: str) -> Flow[None]:
        """The last call goes to a service whose database decides."""
        able = [each for each in self.services if part.decides_in in each.state.resources]
        if not able:
            return
        target = self._deciding_dice.choice(able)
        call = Call(name, target.name, part.decides_in, True, decides=True)
        self._saw(part, call)
        self.history.note("listed", part.xid, [ref.branch for ref in part.refs])
        yield from client.call(part, call)

    def _perhaps_final(self, call: Call) -> Call:
        """It may be true, as far as this root's own calls go, or a mistake."""
        return replace(
            call,
            then=tuple(self._perhaps_final(further) for further in call.then),
            final=self._final_dice.random() < self.options.final_calls,
        )

    def _saw(self, part: LocalTransaction, call: Call) -> None:
        if call.writes:
            self.history.note("saw", part.xid, call.name)
        for further in call.then:
            self._saw(part, further)

    def _draw_call(self, name: str, depth: int) -> Call:
        target = self._dice.choice(self.services)
        resource = self._dice.choice(sorted(target.state.resources))
        writes = self._dice.random() >= self.options.read_only
        then: tuple[Call, ...] = ()
        if depth < 2 and self._dice.random() < self.options.nested:
            then = (self._draw_call(f"{name}.{depth}", depth + 1),)
        return Call(name, target.name, resource, writes, then)

    def _give_up(self, client: Process, part: LocalTransaction, reason: Reason) -> Flow[None]:
        try:
            yield from completion.rollback(client.state, part, reason)
        except OutcomeUnknown:  # its last call was to decide it, and has not been answered
            completion.keep_unknown(client.state, part)
            self._told(part, Outcome.UNKNOWN)
            yield from self._ask_again(client, part)
        except IllegalState:
            self._told(part, Outcome.COMMITTED)
        else:
            self._told(part, Outcome.ABORTED)

    def _commit(self, client: Process, part: LocalTransaction) -> Flow[None]:
        wait = self._dice.choice((Wait.ACKNOWLEDGED, Wait.DECISION))
        self.history.note("listed", part.xid, [ref.branch for ref in part.refs])
        try:
            yield from completion.commit(client.state, part, wait)
        except TransactionAborted:
            self._told(part, Outcome.ABORTED)
        except OutcomeUnknown:
            completion.keep_unknown(client.state, part)
            self._told(part, Outcome.UNKNOWN)
            yield from self._ask_again(client, part)
        except HeuristicOutcome:
            self._told(part, Outcome.COMMITTED)
        else:
            self._told(part, Outcome.COMMITTED)

    def _ask_again(self, client: Process, part: LocalTransaction) -> Flow[None]:
        """An application that wants to know asks until it does: for longer than what was sent before the repair can take."""
        until_ms = client.state.now_ms() + RETENTION_MS // 2 + (20_000 if self.options.log_restores else 0)
        while client.state.now_ms() < until_ms:
            outcome = yield from client.ask(part.xid, client.state.now_ms() + 5_000)
            if outcome is not Outcome.UNKNOWN:
                self._told(part, outcome)
                return
            yield client.runtime.pause, (2.0,)

    def _told(self, part: LocalTransaction, outcome: Outcome) -> None:
        self.outcomes[outcome.name.lower()] += 1
        self.history.note("told", part.xid, outcome)
        self.history.line("application", "application", lambda: f"{part.xid} {outcome.name}")

    # -------------------------------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Trouble, repair, rest.  Raises `Violation`."""
        scheduler = self.scheduler
        start_ms = scheduler.now_ms
        for trouble in troubles(self):
            scheduler.after(self._dice.randint(0, self.options.trouble_ms), trouble)
        for quarter in range(1, 25):
            scheduler.run(start_ms + quarter * self.options.trouble_ms // 24)
            self._show_doubts()
        self._repair()
        for seconds in range(40, 140, 10):
            scheduler.after(seconds * 1_000, self._close_incidents)
        scheduler.run(scheduler.now_ms + _REPAIRED_MS, self._at_rest)
        if not self._at_rest():
            raise Violation(
                14, f"not at rest {_REPAIRED_MS // 1000} s after everything was repaired: {self._restless()}"
            )
        # Two coordinators' clocks may be a quarter of that apart, and the mark of done be of the one that was ahead.
        scheduler.run(scheduler.now_ms + RETENTION_MS + RETENTION_MS // 4 + 15_000)
        self.history.note("rest")
        if self.disk.overtaken:
            self.faults["overtaken write"] = self.disk.overtaken

    def _show_doubts(self) -> None:
        """What operators would be shown, if every node has a coordinator in office that can be asked."""
        up = [process for process in self.coordinators.values() if process.up]
        held = {engine.node for process in up for engine in process.engines if not engine.over}
        if not self.old and held == set(self.nodes):
            self.history.note("doubted", {doubt for process in up for doubt in process.doubts()})

    def _close_incidents(self) -> None:
        for process in self.coordinators.values():
            if process.up:
                process.close_incidents()

    def _at_rest(self) -> bool:
        return not self._restless()

    def _restless(self) -> str:
        sessions = [session for process in self.processes for session in process.sessions]
        if any(not session.open for session in sessions if session.address not in self.gone):
            return "a process has no session"
        for database in self.databases:
            if database.works or database.prepared:
                return (
                    f"{database.name} holds {len(database.works)} open and {len(database.prepared)} prepared branches"
                )
        asking = [row for process in self.processes if process.up for row in process.in_doubt()]
        if asking:
            return f"a process is in doubt about {asking}"
        processes = [*self.coordinators.values(), *self.old]
        engines = [engine for process in processes if process.up for engine in process.engines]
        missing = set(self.nodes) - {engine.node for engine in engines if not engine.over}
        if missing:
            return f"there is no coordinator for {missing}"
        rows = [row for engine in engines if not engine.over for row in engine.core.state.transactions.values()]
        known = [row for row in rows if row.state.value != "one phase" or row.waiters]
        return f"a coordinator works on {known}" if known else ""

    def _repair(self) -> None:
        self.network.repair()
        self.disk.repair()
        for database in self.databases:
            database.repair()
            if not database.up:
                database.restart()
            database.thaw()
        for old in self.old:
            old.thaw()
        for node in self.nodes:
            if not self.coordinators[node].up and node not in self.gone:
                self.start_coordinator(node)
            self.coordinators[node].repair()
            self.coordinators[node].thaw()
        for process in self.processes:
            process.slow = 1
            process.thaw()
            if process.misnamed:
                process.crash()
                process.misnamed = {}
            if not process.up:
                process.start()

    def note_fault(self, name: str, where: str, text: str) -> None:
        """Count what goes wrong, and write it down."""
        self.faults[name] += 1
        self.history.line(where, where, lambda: f"*** {text}")
