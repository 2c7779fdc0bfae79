"""A coordinator process: the real `Coordinator` and the real log interface, on a disk that can fail, tear and forget."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from txrpc._coordinator.in_doubt import in_doubt
from txrpc._decision_log.memory import MemoryLog, MemoryStore
from txrpc._protocol.coordinator.events import (
    Close,
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
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.messages import Commit, Hello, OutcomeReply, Owner, Rollback
from txrpc._protocol.records import Decision
from txrpc.errors import AbortCode, Fenced, Reason
from txrpc.ids import Epoch, Xid
from verification.simulation.history import History
from verification.simulation.network import Stream
from verification.simulation.options import NODE, Options
from verification.simulation.process import GROUP
from verification.simulation.scheduler import Node, Scheduler

__all__ = ["LIMITS", "RETENTION_MS", "CoordinatorProcess", "Disk"]

LIMITS = Limits(max_timeout_ms=10_000, ack_wait_ms=500, tick_ms=5_000, recovery_wait_ms=1_500)
LONG_WAIT = replace(LIMITS, recovery_wait_ms=20_000)
"""Where logs are restored: longer than a process that knows can be cut off."""
RETENTION_MS = 120_000
_HOUSEKEEPING_MS = 500
_FORGET_MS = 5_000
_TROUBLE = Reason(AbortCode.LOG_UNAVAILABLE, "the disk failed")


class Disk(MemoryStore):
    """What the log keeps.  Decisions are forced; marks of "done" are not, until the next forced write takes them along."""

    def __init__(self) -> None:
        super().__init__()
        self.unforced: list[Xid] = []

    def picture(self) -> dict[str, Any]:
        """A backup."""
        return copy.deepcopy(vars(self.nodes[NODE]))

    def restore(self, picture: dict[str, Any]) -> list[Xid]:
        """Be as in that backup again; returns the decisions that are lost."""
        lost = set(self.nodes[NODE].decisions) - set(picture["decisions"])
        vars(self.nodes[NODE]).update(copy.deepcopy(picture))
        self.unforced.clear()
        return sorted(lost)

    def add(self, picture: dict[str, Any]) -> None:
        """An operator brings together what was decided on two logs that were one."""
        here = vars(self.nodes[NODE])
        for name in ("decisions", "done_ms", "incidents"):
            here[name] = {**picture[name], **here[name]}
        ends: dict[Epoch, int] = {}
        for epochs in (picture["epochs"], here["epochs"]):
            ends |= {epoch: max(end, ends.get(epoch, 0)) for epoch, end in epochs.items()}
        here["epochs"] = ends
        here["position"] = max(here["position"], picture["position"])
        here["forgotten_ms"] = max(here["forgotten_ms"], picture["forgotten_ms"])

    def forced(self) -> None:
        """A forced write: everything before it is safe as well."""
        self.unforced.clear()

    def crash(self, lost: int) -> None:
        """The machine goes down; the last so many unforced writes are gone."""
        for xid in self.unforced[len(self.unforced) - lost :]:
            self.nodes[NODE].done_ms.pop(xid, None)
        self.unforced.clear()


class CoordinatorProcess(Node):
    """One coordinator process in one epoch.  A restart is another object, and another process may take over meanwhile."""

    def __init__(
        self, scheduler: Scheduler, name: str, disk: Disk, options: Options, history: History, wall_ms: int
    ) -> None:
        super().__init__(scheduler, name)
        self._disk, self.options, self._history = disk, options, history
        self._log = MemoryLog(disk)
        opened = self._log.open(NODE, scheduler.dice.getrandbits(32))
        history.note("opened", opened.epoch)
        history.line(name, name, lambda: f"opens the log: epoch {opened.epoch}, {len(opened.pending)} pending")
        self.owner = Owner(NODE, opened.epoch)
        now_ms = self.clock_ms()
        clock_ms = max(wall_ms, opened.clock_ms + 1)
        self._offset_ms = clock_ms - now_ms
        limits = LONG_WAIT if options.log_restores else LIMITS
        self.core = Coordinator(NODE, GROUP, opened, limits, now_ms, clock_ms)
        self.on_behind: Callable[[], None] = lambda: None
        """What an operator does about a log that has lost decisions."""
        self._streams: dict[int, Stream] = {}
        self._last_session = 0
        self._waiting: deque[Decision] = deque()
        self._writing: list[Decision] = []
        self._landed = False
        """What is being written has reached the disk, and the answer is still on its way."""
        self._done: list[Xid] = []
        self._position = 0
        self._woken_at: int | None = None
        self._forget_at_ms = now_ms + _FORGET_MS
        self._schedule()
        self.alarm(_HOUSEKEEPING_MS, self._housekeep)

    # ------------------------------------------------------------------------------------------------------- the ends

    def crash(self) -> None:
        """The machine goes down, in the middle of whatever it is writing."""
        if not self.up:
            return
        dice = self.scheduler.dice
        if self._writing and dice.random() < self.options.torn_writes:
            self._keep(self._writing[: dice.randint(0, len(self._writing))])
        unforced = len(self._disk.unforced)
        self._disk.crash(dice.randint(0, unforced) if dice.random() < self.options.lost_writes else 0)
        self._stop()

    def _stop(self) -> None:
        self.die()
        for stream in self._streams.values():
            stream.close(self.name)

    @property
    def writing(self) -> bool:
        """True while a batch is on its way to the disk."""
        return self.up and bool(self._writing)

    def overtaken(self) -> bool:
        """Another coordinator is about to open the log.  What is being written reached it just before, or will be fenced.

        Returns True if it reached it: this coordinator believes in its epoch until it asks the log for something else.
        """
        if self.writing and not self._landed and self.scheduler.dice.random() < 0.5:
            self._landed = self._keep(self._writing)
        return self._landed

    def repair(self) -> None:
        """From now on the disk works."""
        self.options = self.options.without("log_errors")

    # ------------------------------------------------------------------------------------------------------- sessions

    def accept(self, stream: Stream) -> None:
        """A process has dialled."""
        self._last_session += 1
        session = self._last_session
        stream.on_message[self.name] = lambda message: self._heard(session, stream, message)
        stream.on_end[self.name] = lambda: self._ended(session)

    def _heard(self, session: int, stream: Stream, item: tuple[str, Any]) -> None:
        node, message = item
        if session in self._streams:
            self._step(Received(session, node, message))
        elif isinstance(message, Hello):
            self._streams[session] = stream
            self._step(SessionOpened(session, message))
        else:
            stream.close(self.name)

    def _ended(self, session: int) -> None:
        if self._streams.pop(session, None) is not None:
            self._step(SessionClosed(session))

    # ------------------------------------------------------------------------------------------------------- the core

    def _step(self, event: Any) -> None:
        self._apply(self.core.step(event, self.clock_ms()))
        self._schedule()

    def _apply(self, out: Output) -> None:
        if out.behind:
            self._history.line(self.name, self.name, lambda: f"stops: {out.behind}")
            self._stop()
            self.on_behind()
            return
        self._keep_aside(out)
        if out.append:
            self._waiting.extend(out.append)
            self._write_soon()
        for session, message in out.send:
            self._observe(message)
            stream = self._streams.get(session)
            if stream is not None:
                stream.send(self.name, (NODE, message))
        self._done += out.done
        for lookup in out.look:
            self.later(self.scheduler.dice.randint(0, 20), self._look, lookup)
        for session, farewell in out.close:
            stream = self._streams.pop(session, None)
            if stream is not None:
                stream.send(self.name, (NODE, farewell))
                stream.close(self.name)
                self._step(SessionClosed(session))

    def _keep_aside(self, out: Output) -> None:
        """What the engine writes with the marks of done, here at once."""
        try:
            if out.bind or out.incidents or out.closed:
                self._log.bind(out.bind)
                self._log.report(out.incidents)
                for incident in out.incidents:
                    self._history.note("incident", incident.xid, incident.branch, incident.finish)
                self._log.close_incidents(out.closed, self.clock_ms())
        except Fenced:
            self._stop()

    def _observe(self, message: Any) -> None:
        if isinstance(message, Commit | Rollback):
            self._history.note("ordered", message.gid.xid, message.gid.branch, isinstance(message, Commit))
        elif isinstance(message, OutcomeReply):
            self._history.note("replied", message.xid, message.outcome)

    def _schedule(self) -> None:
        due_ms = self.core.next_wakeup_ms()
        if due_ms is not None and (self._woken_at is None or due_ms < self._woken_at):
            self._woken_at = due_ms
            self.alarm(due_ms - self.clock_ms(), self._woke, due_ms)

    def _woke(self, due_ms: int) -> None:
        if self._woken_at == due_ms:
            self._woken_at = None
            self._step(Woke())

    # ------------------------------------------------------------------------------------------------------- the log

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = list(self._waiting)
            self._waiting.clear()
            self.later(self.scheduler.dice.randint(1, 30), self._write, 0)

    def _write(self, attempt: int) -> None:
        """The batch reaches the disk; or does not; or did and nobody hears of it."""
        dice = self.scheduler.dice
        if dice.random() < self.options.log_errors:
            kept = self._landed or dice.random() < 0.5
            if kept and not self._keep(self._writing):
                return
            self._step(LogHealth(False, _TROUBLE.text))
            if not kept and attempt == 0 and dice.random() < 0.5:
                self._ended_write(lambda xids: NotLogged(xids, _TROUBLE))
            else:
                self.later(dice.randint(20, 1_000), self._write, attempt + 1)  # nobody knows: the same again
        elif self._keep(self._writing):
            if self.core.state.log_trouble:
                self._step(LogHealth(True))
            self.soon(self._ended_write, lambda xids: Logged(xids, self._position))

    def _ended_write(self, event: Callable[[tuple[Xid, ...]], Any]) -> None:
        batch, self._writing = self._writing, []
        self._step(event(tuple(decision.xid for decision in batch)))
        if self._waiting:
            self._write_soon()

    def _keep(self, batch: list[Decision]) -> bool:
        """Make *batch* durable, unless somebody else has opened the log."""
        if self._landed:
            self._landed = False
            return True
        new = [decision for decision in batch if self._log.outcome(decision.xid) is None]
        try:
            self._position = self._log.record(batch)
        except Fenced:
            self._history.line(self.name, self.name, lambda: "is fenced")
            self._stop()
            return False
        self._disk.forced()
        for decision in new:
            branches = [prepared.branch for prepared in decision.branches]
            self._history.note("durable", decision.xid, self.owner.epoch, branches)
            self._history.line(self.name, self.name, lambda xid=decision.xid: f"{xid} is durable")  # type: ignore[misc]
        return True

    def _look(self, lookup: Lookup) -> None:
        decision = self._log.outcome(lookup.xid)
        self.later(self.scheduler.dice.randint(0, 20), self._step, Looked(lookup, decision))

    def _housekeep(self) -> None:
        self.alarm(_HOUSEKEEPING_MS, self._housekeep)
        try:
            if (
                self.core.state.log_trouble
                and not self._writing
                and self.scheduler.dice.random() >= self.options.log_errors
            ):
                self._log.record([])
                self._step(LogHealth(True))
            self._mark_done()
            if self.clock_ms() >= self._forget_at_ms:
                self._forget_at_ms = self.clock_ms() + _FORGET_MS
                self._forget()
        except Fenced:
            self._stop()

    def _mark_done(self) -> None:
        done, self._done = self._done, []
        self._log.done(done, self.clock_ms() + self._offset_ms)
        self._disk.unforced += done
        for xid in done:
            self._history.note("done", xid)

    def _forget(self) -> None:
        before_ms = self.clock_ms() + self._offset_ms - RETENTION_MS
        self._step(Forgot(before_ms))
        held = set(self._disk.nodes[NODE].decisions)
        if self._log.forget(before_ms, 1_000):
            self._disk.forced()
            for xid in sorted(held - set(self._disk.nodes[NODE].decisions)):
                self._history.note("deleted", xid)

    def close_incidents(self) -> None:
        """An operator has seen to all of them."""
        for xid in {xid for xid, _ in self.core.state.incidents}:
            self._step(Close(xid))

    # ------------------------------------------------------------------------------------------------ to be looked at

    def show_doubts(self) -> None:
        """Say what an operator would be shown."""
        shown = {(doubt.xid, doubt.branch) for doubt in in_doubt(self.core, self.clock_ms())}
        shown |= {
            (decision.xid, branch.branch)
            for decision in (*self._waiting, *self._writing)
            for branch in decision.branches
        }
        self._history.note("doubted", shown)
