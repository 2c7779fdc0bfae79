"""What goes wrong in a cluster, each thing once when it is called; the cluster decides when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from txrpc._protocol.messages import (
    Acked,
    Committing,
    FinishResult,
    Inquiry,
    OnePhaseDone,
    Outcome,
    Resolved,
    Vote,
    Voted,
)
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId
from verification.simulation.coordinator import CoordinatorProcess
from verification.simulation.database import Database
from verification.simulation.engine import RETENTION_MS, Disk
from verification.simulation.group_disk import GroupDisk
from verification.simulation.history import History
from verification.simulation.network import Network
from verification.simulation.options import NODE, Options
from verification.simulation.process import Process
from verification.simulation.scheduler import Node, Scheduler

__all__ = ["Troubled", "troubles"]


class Troubled(Protocol):
    """What trouble needs to know of a cluster."""

    options: Options
    scheduler: Scheduler
    network: Network
    databases: list[Database]
    clients: list[Process]
    processes: list[Process]
    coordinators: dict[str, CoordinatorProcess]
    gone: set[str]
    disk: Disk
    old: list[CoordinatorProcess]
    wall_ms: int
    faults: Counter[str]
    history: History
    right_log: dict[str, Any] | None
    """What an operator will find, if the log is one that has been restored."""

    @property
    def coordinator(self) -> CoordinatorProcess:
        """The latest process of the first node."""

    def start_coordinator(self, node: str = NODE) -> None:
        """The next process of a node, on the same log."""

    def note_fault(self, name: str, where: str, text: str) -> None:
        """Count it, and write it down."""


def troubles(cluster: Troubled) -> Sequence[Callable[[], None]]:
    """All that is going to go wrong, in no order."""
    made = _Troubles(cluster)
    options = cluster.options
    return [
        *[made.partition] * options.partitions,
        *[made.one_way] * options.one_way,
        *[made.crash_process] * options.crashes,
        *[made.client_dies] * options.client_deaths,
        *[made.crash_coordinator] * options.coordinator_crashes,
        *[made.coordinator_dies] * options.coordinator_deaths,
        *[made.take_over] * options.takeovers,
        *[made.usurp] * options.usurpations,
        *[made.restore_log] * options.log_restores,
        *[made.crash_database] * options.database_crashes,
        *[made.fail_over] * options.amnesia,
        *[made.lay_hand_on] * options.hands,
        *[made.freeze] * options.freezes,
        *[made.jump] * options.clock_jumps,
        *[made.drift] * options.drifts,
        *[made.sleep] * options.sleeps,
        *[made.forge] * options.forgeries,
        *[made.misname] * options.misnames,
        *[made.ask_late] * options.late_requests,
        *[made.lose_disk] * options.disk_losses,
        *[made.change_members] * options.view_changes,
    ]


class _Troubles:
    def __init__(self, cluster: Troubled) -> None:
        self._cluster = cluster
        self._dice = cluster.scheduler.dice
        self._until_ms = cluster.scheduler.now_ms + cluster.options.trouble_ms
        self._away_ms = 0
        """How far the coordinator's wall clock is from the truth."""

    # ---------------------------------------------------------------------------------------------------- the network

    def partition(self) -> None:
        one, other = self._two_nodes()
        self._cut("partition", one, other, {(one.name, other.name), (other.name, one.name)})

    def one_way(self) -> None:
        one, other = self._two_nodes()
        self._cut("one-way partition", one, other, {(one.name, other.name)})

    def _two_nodes(self) -> tuple[Node, Node]:
        nodes: list[Node] = [*self._cluster.processes, *self._cluster.coordinators.values()]
        one, other = self._dice.sample(nodes, 2)
        return one, other

    def _cut(self, name: str, one: Node, other: Node, pairs: set[tuple[str, str]]) -> None:
        cut = self._cluster.network.cut
        cut |= pairs
        self._cluster.note_fault(name, one.name, f"cannot reach {other.name}")
        self._later(8_000, cut.difference_update, pairs)

    # --------------------------------------------------------------------------------------------------- the processes

    def crash_process(self) -> None:
        process = self._dice.choice(self._cluster.processes)
        if process.up:
            self._cluster.note_fault("process crash", process.name, "crashes")
            process.crash()
            self._later(3_000, self._restart, process)

    def _restart(self, process: Process) -> None:
        if not process.up:
            process.start()

    def misname(self) -> None:
        """A process comes back with another database under one of its names, and is corrected later."""
        cluster = self._cluster
        process, wrong = self._dice.choice(cluster.processes), self._dice.choice(cluster.databases)
        name = self._dice.choice(sorted(process.state.resources))
        known = cluster.disk.names
        if not process.up or name == wrong.name or known.get(name) != name:
            return  # whoever is the first to bind a name is right
        cluster.note_fault("misname", process.name, f"takes {wrong.name} for {name}")
        process.crash()
        process.misnamed = {name: wrong}
        process.start()
        self._later(6_000, self._correct, process)

    def _correct(self, process: Process) -> None:
        if process.misnamed:
            process.crash()
            process.misnamed = {}
            process.start()

    def ask_late(self) -> None:
        """A root's request comes again, long after everything has been repaired and, perhaps, forgotten."""
        self._cluster.scheduler.after(self._dice.randint(20_000, RETENTION_MS), self._ask_again)

    def _ask_again(self) -> None:
        cluster = self._cluster
        asker = self._dice.choice(cluster.processes)
        asked = [request for process in cluster.processes for request in process.requests]
        if asked and asker.up and asker.state.chosen is not None:
            cluster.note_fault("late request", asker.name, "repeats what a root has asked long ago")
            asker.say(*self._dice.choice(asked))

    def client_dies(self) -> None:
        client = self._dice.choice(self._cluster.clients)
        self._cluster.note_fault("client death", client.name, "dies")
        client.crash()

    def freeze(self) -> None:
        cluster = self._cluster
        node: Node = self._dice.choice([*cluster.processes, *cluster.databases, *cluster.coordinators.values()])
        cluster.note_fault("freeze", node.name, "stands still")
        node.freeze(self._dice.randint(100, 5_000))

    def sleep(self) -> None:
        cluster = self._cluster
        node: Node = self._dice.choice([*cluster.processes, *cluster.coordinators.values()])
        cluster.note_fault("sleep", node.name, "sleeps, and its clock with it")
        node.sleep(self._dice.randint(100, 120_000))

    def drift(self) -> None:
        cluster = self._cluster
        node: Node = self._dice.choice([*cluster.processes, *cluster.coordinators.values()])
        speed = self._dice.uniform(0.8, 1.25)
        cluster.note_fault("drift", node.name, f"has a clock that goes {speed:.2f} times as fast")
        node.drift(speed)

    def forge(self) -> None:
        """A process says things about branches that are none of its own."""
        cluster = self._cluster
        liar = self._dice.choice(cluster.processes)
        gids = {gid for database in cluster.databases for gid, _, _ in database.prepared.values()}
        gids |= {row.gid for process in cluster.processes for row in process.state.participant.rows.values()}
        # What the liar was itself asked to finish is its own to answer for: nobody can tell that answer from a true one.
        asked = liar.state.participant.rows
        known = sorted(
            (gid for gid in gids if gid.participant != liar.state.participant_id and gid.branch not in asked), key=str
        )
        if not known or not liar.up or liar.state.chosen is None:
            return
        gid = self._dice.choice(known)
        lies: list[Any] = [
            Voted(gid.xid, gid.branch, Vote.PREPARED, None, "7"),
            Voted(gid.xid, gid.branch, Vote.ABORT, Reason(AbortCode.UNSPECIFIED, "a lie")),
            Acked(gid.xid, gid.branch, FinishResult.DONE),
            Committing(gid.xid, gid.branch, "999999"),
            OnePhaseDone(gid.xid, gid.branch, Outcome.COMMITTED),
            OnePhaseDone(gid.xid, gid.branch, Outcome.ABORTED),
            Resolved(gid.xid, gid.branch, Outcome.COMMITTED),
            Acked(gid.xid, BranchId(self._dice.randbytes(8)), FinishResult.DONE),
            Inquiry(gid, 0, 1_000),
        ]
        cluster.note_fault("forgery", liar.name, "lies")
        liar.say(gid.node, self._dice.choice(lies))

    # ------------------------------------------------------------------------------------------- coordinators, databases

    def _a_coordinator(self) -> CoordinatorProcess:
        processes = list(self._cluster.coordinators.values())
        return processes[0] if len(processes) == 1 else self._dice.choice(processes)

    def crash_coordinator(self) -> None:
        coordinator = self._a_coordinator()
        if coordinator.up:
            self._cluster.note_fault("coordinator crash", coordinator.name, "crashes")
            coordinator.crash()
            self._later(4_000, self._coordinator_back, coordinator.node)

    def _coordinator_back(self, node: str) -> None:
        if not self._cluster.coordinators[node].up and node not in self._cluster.gone:
            self._cluster.start_coordinator(node)

    def coordinator_dies(self) -> None:
        coordinator = self._a_coordinator()
        self._cluster.note_fault("coordinator death", coordinator.name, "dies")
        self._cluster.gone.add(coordinator.node)
        if len(self._cluster.gone) == len(self._cluster.coordinators):
            self._cluster.gone.clear()
        for process in (coordinator, *self._cluster.old):
            if process.node == coordinator.node:
                process.crash()

    def usurp(self) -> None:
        """One takes another one over that is in the best of health, because it could not see it."""
        usurper, other = self._a_coordinator(), self._a_coordinator()
        if usurper.up and usurper is not other and other.node not in usurper.guests:
            self._cluster.note_fault("usurpation", usurper.name, f"takes {other.name} for dead")
            usurper.take_over(other.node)

    def take_over(self) -> None:
        if self._dice.random() < 0.5:
            self._take_over_from_writer()
        else:
            self._take_over()

    def _take_over_from_writer(self) -> None:
        """As soon as the coordinator writes, if it does before all trouble is over."""
        if self._cluster.coordinator.writing:
            self._take_over()
        elif self._cluster.scheduler.now_ms < self._until_ms:
            self._cluster.scheduler.after(10, self._take_over_from_writer)

    def _take_over(self) -> None:
        old = self._cluster.coordinator
        if old.node in self._cluster.gone:
            return
        self._cluster.note_fault("takeover", old.name, "stands still, and another one is started")
        old.freeze(self._dice.randint(1, 6_000))
        self._cluster.old.append(old)
        self._cluster.start_coordinator(old.node)

    def restore_log(self) -> None:
        """A backup is made now, and is all that is left a while later."""
        self._later(4_000, self._lose_log, self._cluster.disk.picture())

    def _lose_log(self, backup: dict[str, Any]) -> None:
        cluster = self._cluster
        if (
            not cluster.coordinator.up
            or cluster.right_log
            or cluster.coordinator.home.owner.epoch != max(backup["epochs"])
        ):
            return  # whoever has seen a later epoch would take it for another coordinator's
        cluster.note_fault("log restore", cluster.coordinator.name, "loses its log, which is restored from a backup")
        cluster.coordinator.crash()
        cluster.right_log = cluster.disk.picture()
        cluster.history.note("lost", cluster.disk.restore(backup))
        cluster.start_coordinator()

    def lose_disk(self) -> None:
        """A member of the group has an empty disk from now on."""
        disk = self._cluster.disk
        assert isinstance(disk, GroupDisk)
        if name := disk.lose_disk():
            self._cluster.note_fault("lost disk", name, "has lost its disk")

    def change_members(self) -> None:
        """A member comes or goes, perhaps in the middle of a takeover."""
        disk = self._cluster.disk
        assert isinstance(disk, GroupDisk)
        if names := disk.change():
            self._cluster.note_fault("change of members", "group", f"is {names} from now on")

    def crash_database(self) -> None:
        database = self._dice.choice(self._cluster.databases)
        if database.up:
            self._cluster.note_fault("database crash", database.name, "crashes")
            database.crash()
            self._later(3_000, database.restart)

    def fail_over(self) -> None:
        database = self._with_prepared(self.fail_over)
        if database is not None:
            self._cluster.note_fault("fail-over", database.name, "fails over to a standby that has lagged")
            database.crash()
            database.fail_over()
            self._later(3_000, database.restart)

    def _with_prepared(self, again: Callable[[], None]) -> Database | None:
        """A database that holds a prepared branch; if there is none, try *again* a little later, for as long as trouble lasts."""
        held = [database for database in self._cluster.databases if database.up and database.prepared]
        if held:
            return self._dice.choice(held)
        if self._cluster.scheduler.now_ms < self._until_ms:
            self._later(200, again)
        return None

    def lay_hand_on(self) -> None:
        database = self._with_prepared(self.lay_hand_on)
        if database is not None:
            branch = self._dice.choice(sorted(database.prepared))
            self._cluster.note_fault("hand", database.name, "has a prepared branch ended by hand")
            database.by_hand(branch, self._dice.random() < 0.5)

    def jump(self) -> None:
        cluster = self._cluster
        cluster.note_fault("clock jump", "clocks", "jump")
        if self._dice.random() < 0.5:
            # All jumps together within what the retention allows for: of a record that is too old nobody can know whether there was
            # one, and the application would rightly be told that.
            away_ms = self._dice.randint(-RETENTION_MS // 8, RETENTION_MS // 8)
            cluster.wall_ms += away_ms - self._away_ms
            self._away_ms = away_ms
        else:
            self._dice.choice(cluster.processes).wall_offset_ms += self._dice.randint(-86_400_000, 86_400_000)

    def _later(self, most_ms: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._cluster.scheduler.after(self._dice.randint(50, most_ms), function, *arguments)
