"""A coordinator of a simulated process: the real `Coordinator` and the real log interface, on a disk that can fail and tear."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from txrpc._coordinator.in_doubt import in_doubt
from txrpc._decision_log.memory import MemoryLog, MemoryStore
from txrpc._decision_log.port import DecisionLog, LogError, NotRecorded, Opened
from txrpc._protocol.coordinator.events import (
    Bound,
    Close,
    Forgot,
    Limits,
    Logged,
    LogHealth,
    Looked,
    Lookup,
    NotLogged,
    Output,
    SessionClosed,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.messages import Commit, GoAway, OutcomeReply, Owner, Rollback
from txrpc._protocol.records import Decision
from txrpc.errors import AbortCode, Fenced, Reason
from txrpc.ids import BranchId, Epoch, Xid
from verification.simulation.history import History
from verification.simulation.options import NODE, Options
from verification.simulation.process import GROUP
from verification.simulation.scheduler import Node, Scheduler

__all__ = ["LIMITS", "RETENTION_MS", "Disk", "Engine", "Host"]

LIMITS = Limits(max_timeout_ms=10_000, ack_wait_ms=500, tick_ms=5_000, recovery_wait_ms=1_500)
LONG_WAIT = replace(LIMITS, recovery_wait_ms=20_000)
"""Where logs are restored: longer than a process that knows can be cut off."""
RETENTION_MS = 120_000
_HOUSEKEEPING_MS = 500
_FORGET_MS = 5_000
_TROUBLE = Reason(AbortCode.LOG_UNAVAILABLE, "the disk failed")


class Disk(MemoryStore):
    """What the log keeps.  Decisions are forced; marks of "done" are not, until the next forced write takes them along."""

    def __init__(self, scheduler: Scheduler, options: Options) -> None:
        super().__init__(options.log_keeps)
        self._scheduler = scheduler
        self.unforced: list[tuple[str, Xid]] = []
        self.durable: set[Xid] = set()
        """Decisions that are known to be safe."""
        self.overtaken = 0
        """How often a batch landed whose writer was fenced before it heard of it."""
        self.engines: list[Engine] = []
        """All that believe to be in office."""

    @property
    def names(self) -> Mapping[str, str]:
        """What resource names mean."""
        return self.identities

    def new_log(self, _member: str) -> DecisionLog:
        """Return the log of one coordinator, in a process of that node."""
        return MemoryLog(self)

    def open(self, log: DecisionLog, node: str, holder: str, expect: Epoch | None) -> Opened:
        """See `DecisionLog.open`."""
        return log.open(node, self._scheduler.dice.getrandbits(32), holder, expect)

    def repair(self) -> None:
        """From now on nothing goes wrong."""

    def hear_of_epochs(self) -> None:
        """Heartbeats come: let them show what the logs say themselves."""

    def tells_of_epochs(self) -> bool:
        """Return whether a coordinator sees now that its log was opened anew."""
        return True

    def opening(self, node: str) -> bool:
        """*node*'s log is about to be opened anew.  What is being written reaches it just before, or will be fenced.

        Returns True if something reached it that its writer does not know yet.
        """
        landed = [engine.overtaken() for engine in self.engines if engine.node == node and not engine.over]
        self.overtaken += sum(landed)
        return any(landed)

    def picture(self) -> dict[str, Any]:
        """A backup."""
        return copy.deepcopy(vars(self.nodes[NODE]))

    def restore(self, picture: dict[str, Any]) -> list[Xid]:
        """Be as in that backup again; returns the decisions that are lost."""
        lost = set(self.nodes[NODE].decisions) - set(picture["decisions"])
        vars(self.nodes[NODE]).update(copy.deepcopy(picture))
        self.durable -= lost
        self.unforced.clear()
        return sorted(lost)

    def add(self, picture: dict[str, Any]) -> None:
        """An operator brings together what was decided on two logs that were one."""
        here = vars(self.nodes[NODE])
        for name in ("decisions", "done_ms", "incidents"):
            here[name] = {**picture[name], **here[name]}
        self.durable |= here["decisions"].keys()
        ends: dict[Epoch, int] = {}
        for epochs in (picture["epochs"], here["epochs"]):
            ends |= {epoch: max(end, ends.get(epoch, 0)) for epoch, end in epochs.items()}
        here["epochs"] = ends
        here["position"] = max(here["position"], picture["position"])
        here["forgotten_ms"] = max(here["forgotten_ms"], picture["forgotten_ms"])

    def forced(self) -> None:
        """A forced write: everything before it is safe as well."""
        self.unforced.clear()

    def crash(self, nodes: Collection[str], lost: Callable[[int], int]) -> None:
        """The machine with the coordinators of *nodes* goes down; the last so many unforced writes of theirs are gone."""
        unforced = [(node, xid) for node, xid in self.unforced if node in nodes]
        for node, xid in unforced[len(unforced) - lost(len(unforced)) :]:
            self.nodes[node].done_ms.pop(xid, None)
        self.unforced = [(node, xid) for node, xid in self.unforced if node not in nodes]


class Host(Protocol):
    """The process that an engine runs in, and what it does for it."""

    @property
    def machine(self) -> Node:
        """Its clock, its pace and its life."""

    def tell(self, session: int, node: str, message: Any) -> None:
        """Send a message."""

    def hang_up(self, session: int, node: str, farewell: GoAway) -> None:
        """End a session of that node."""

    def ended(self, engine: Engine, behind: str) -> None:
        """The engine is fenced; or its log is *behind*, and why."""

    def call_operator(self, branch: BranchId) -> None:
        """Nothing but a person can end this branch."""


class Engine:
    """One coordinator in one epoch, as `txrpc._coordinator.driver` drives it."""

    def __init__(
        self,
        host: Host,
        disk: Disk,
        options: Options,
        history: History,
        wall_ms: int,
        node: str,
        holder: str = "",
        expect: Epoch | None = None,
    ) -> None:
        """Raises `Fenced` if the node is not in the epoch *expect* any more."""
        self._host, self.machine = host, host.machine
        self._disk, self.options, self._history = disk, options, history
        self.node = node
        self.over = False
        self._log = disk.new_log(holder or node)
        opened = disk.open(self._log, node, holder, expect)
        disk.forced()
        if options.group:  # what an earlier epoch was not sure of when it ended
            self._note_durable(opened.pending)
            for incident in opened.incidents:
                history.note("incident", incident.xid, incident.branch, incident.finish)
        disk.engines = [engine for engine in disk.engines if not engine.over]
        disk.engines.append(self)
        history.note("opened", node, opened.epoch)
        self._line(lambda: f"opens the log of {node}: epoch {opened.epoch}, {len(opened.pending)} pending")
        self.owner = Owner(node, opened.epoch)
        now_ms = self.machine.clock_ms()
        clock_ms = max(wall_ms, opened.clock_ms + 1)
        self._offset_ms = clock_ms - now_ms
        limits = LONG_WAIT if options.log_restores else LIMITS
        self.core = Coordinator(node, GROUP, opened, limits, now_ms, clock_ms)
        self._waiting: deque[Decision] = deque()
        self._writing: list[Decision] = []
        self._landed = False
        """What is being written has reached the disk, and the answer is still on its way."""
        self._done: list[Xid] = []
        self._aside: list[Output] = []
        self._position = 0
        self._woken_at: int | None = None
        self._forget_at_ms = now_ms + _FORGET_MS
        self._schedule()
        self.machine.alarm(_HOUSEKEEPING_MS, self._housekeep)

    def _line(self, text: Callable[[], str]) -> None:
        self._history.line(self.machine.name, self.machine.name, text)

    # ------------------------------------------------------------------------------------------------------- the ends

    def crash(self) -> None:
        """The machine goes down, in the middle of whatever this is writing."""
        if not self.over:
            dice = self.machine.scheduler.dice
            if self._writing and dice.random() < self.options.torn_writes:
                with contextlib.suppress(LogError):
                    self._keep(self._writing[: dice.randint(0, len(self._writing))])
            self.over = True

    @property
    def writing(self) -> bool:
        """True while a batch is on its way to the disk."""
        return not self.over and bool(self._writing)

    def overtaken(self) -> bool:
        """Another coordinator is about to open the log: see `Disk.opening`.

        Returns True if it reached it: this one believes in its epoch until it asks the log for something else.
        """
        if self.writing and not self._landed and self.machine.scheduler.dice.random() < 0.5:
            with contextlib.suppress(LogError):
                self._landed = self._keep(self._writing)
        return self._landed

    def repair(self) -> None:
        """From now on the disk works."""
        self.options = self.options.without("log_errors")

    def stop(self, behind: str = "") -> None:
        """This one is over."""
        if not self.over:
            self.over = True
            self._host.ended(self, behind)

    # ------------------------------------------------------------------------------------------------------- the core

    def step(self, event: Any) -> None:
        """Take an event, unless this one is over."""
        if not self.over:
            self._apply(self.core.step(event, self.machine.clock_ms()))
            self._schedule()

    def _apply(self, out: Output) -> None:
        if out.behind:
            self._line(lambda: f"stops: {out.behind}")
            self.stop(out.behind)
            return
        self._keep_aside(out)
        if out.append:
            self._waiting.extend(out.append)
            self._write_soon()
        for session, message in out.send:
            self._observe(message)
            self._host.tell(session, self.node, message)
        self._done += out.done
        for lookup in out.look:
            self.machine.later(self.machine.scheduler.dice.randint(0, 20), self._look, lookup)
        for note in out.notes:
            if note.event == "branch of a lost decision":
                self._host.call_operator(cast("BranchId", note.fields["branch"]))
        for session, farewell in out.close:
            self._host.hang_up(session, self.node, farewell)
            self.step(SessionClosed(session))

    def _keep_aside(self, out: Output) -> None:
        """What the engine writes with the marks of done, here at once."""
        if out.bind or out.rebind or out.incidents or out.closed:
            self._aside.append(out)
            try:
                self._write_aside()
            except LogError:
                return  # with the housekeeping
            except Fenced:
                self.stop()

    def _write_aside(self) -> None:
        while self._aside:
            out = self._aside[0]
            names = self._log.bind(out.bind, out.rebind)
            self._log.report(out.incidents)
            self._log.close_incidents(out.closed, self.machine.clock_ms())
            del self._aside[0]
            self.machine.soon(self.step, Bound(names))
            for incident in out.incidents:
                self._history.note("incident", incident.xid, incident.branch, incident.finish)

    def _observe(self, message: Any) -> None:
        if isinstance(message, Commit | Rollback):
            self._history.note("ordered", message.gid.xid, message.gid.branch, isinstance(message, Commit))
        elif isinstance(message, OutcomeReply):
            self._history.note("replied", message.xid, message.outcome)

    def _schedule(self) -> None:
        due_ms = self.core.next_wakeup_ms()
        if due_ms is not None and (self._woken_at is None or due_ms < self._woken_at):
            self._woken_at = due_ms
            self.machine.alarm(due_ms - self.machine.clock_ms(), self._woke, due_ms)

    def _woke(self, due_ms: int) -> None:
        if self._woken_at == due_ms:
            self._woken_at = None
            self.step(Woke())

    # ------------------------------------------------------------------------------------------------------- the log

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = list(self._waiting)
            self._waiting.clear()
            self.machine.later(self.machine.scheduler.dice.randint(1, 30), self._write, 0)

    def _write(self, attempt: int) -> None:
        """The batch reaches the disk; or does not; or did and nobody hears of it."""
        if self.over:
            return
        dice = self.machine.scheduler.dice
        if dice.random() < self.options.log_errors:
            kept = self._landed or dice.random() < 0.5
            with contextlib.suppress(LogError):
                if kept and not self._keep(self._writing):
                    return
            self.step(LogHealth(False, _TROUBLE.text))
            if not kept and attempt == 0 and dice.random() < 0.5:
                self._ended_write(lambda xids: NotLogged(xids, _TROUBLE))
            else:
                self.machine.later(dice.randint(20, 1_000), self._write, attempt + 1)  # nobody knows: the same again
            return
        try:
            kept = self._keep(self._writing)
        except LogError as error:
            self.step(LogHealth(False, str(error)))
            if isinstance(error, NotRecorded) and attempt == 0:
                self._ended_write(lambda xids: NotLogged(xids, _TROUBLE))
            else:
                self.machine.later(dice.randint(20, 1_000), self._write, attempt + 1)
            return
        if kept:
            if self.core.state.log_trouble:
                self.step(LogHealth(True))
            self.machine.soon(self._ended_write, lambda xids: Logged(xids, self._position))

    def _ended_write(self, event: Callable[[tuple[Xid, ...]], Any]) -> None:
        if self.over:
            return
        batch, self._writing = self._writing, []
        self.step(event(tuple(decision.xid for decision in batch)))
        if self._waiting:
            self._write_soon()

    def _keep(self, batch: list[Decision]) -> bool:
        """Make *batch* durable, unless somebody else has opened the log."""
        if self._landed:
            self._landed = False
            return True
        try:
            self._position = self._log.record(batch)
        except Fenced:
            self._line(lambda: f"is fenced as {self.node}")
            self.stop()
            return False
        self._disk.forced()
        self._note_durable(batch)
        return True

    def _note_durable(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if decision.xid not in self._disk.durable:
                self._disk.durable.add(decision.xid)
                branches = [prepared.branch for prepared in decision.branches]
                self._history.note("durable", decision.xid, decision.epoch, branches)
                self._line(lambda xid=decision.xid: f"{xid} is durable")  # type: ignore[misc]

    def _look(self, lookup: Lookup) -> None:
        decision = self._log.outcome(lookup.xid)
        self.machine.later(self.machine.scheduler.dice.randint(0, 20), self.step, Looked(lookup, decision))

    def _housekeep(self) -> None:
        if self.over:
            return
        self.machine.alarm(_HOUSEKEEPING_MS, self._housekeep)
        try:
            if (
                self.core.state.log_trouble
                and not self._writing
                and self.machine.scheduler.dice.random() >= self.options.log_errors
            ):
                self._log.record([])
                self.step(LogHealth(True))
            self._write_aside()
            self._mark_done()
            self.step(Bound(self._log.bind({}, {})))
            if self.machine.clock_ms() >= self._forget_at_ms:
                self._forget_at_ms = self.machine.clock_ms() + _FORGET_MS
                self._forget()
        except LogError:
            return  # the next time
        except Fenced:
            self.stop()

    def _mark_done(self) -> None:
        done = self._done
        self._log.done(done, self.machine.clock_ms() + self._offset_ms)
        self._done = []
        self._disk.unforced += [(self.node, xid) for xid in done]
        for xid in done:
            self._history.note("done", xid)

    def _forget(self) -> None:
        retained_ms = self.machine.clock_ms() + self._offset_ms - RETENTION_MS
        before_ms = max(retained_ms, self._log.overflow_ms())
        self.step(Forgot(before_ms))
        held = sorted(xid for xid in self._disk.durable if self._log.outcome(xid) is not None)
        if self._log.forget(before_ms, 1_000):
            self._disk.forced()
            for xid in held:
                if self._log.outcome(xid) is None:
                    self._history.note("deleted", xid, before_ms > retained_ms)

    def close_incidents(self) -> None:
        """An operator has seen to all of them."""
        for xid in {xid for xid, _ in self.core.state.incidents}:
            self.step(Close(xid))

    # ------------------------------------------------------------------------------------------------ to be looked at

    def doubts(self) -> set[tuple[Xid, BranchId]]:
        """Return what an operator would be shown."""
        shown = {(doubt.xid, doubt.branch) for doubt in in_doubt(self.core, self.machine.clock_ms())}
        shown |= {
            (decision.xid, branch.branch)
            for decision in (*self._waiting, *self._writing)
            for branch in decision.branches
        }
        return shown
