"""The engine: feeds events to the pure coordinator and honours what comes out, in order.

How to think of it
    One event loop.  `step` is synchronous: an event goes in, messages go to outboxes, and what is for the log goes to
    the `Logbook`, which answers with further events.  When the log says "fenced", this engine is over.

    A mistake of our own in one of the driver's tasks ends the driver: what it holds in memory cannot be trusted any more, what
    the log holds can, and the next start begins from there.

Time is monotonic.  The coordinator's own clock starts at the wall clock, or at the log's if that is ahead, and no later jump of
the machine's clock reaches it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from txrpc._coordinator.in_doubt import InDoubtReporter
from txrpc._coordinator.log_writer import Logbook
from txrpc._decision_log.port import DecisionLog
from txrpc._failpoints import failpoint
from txrpc._protocol.coordinator.events import (
    Drain,
    Event,
    Limits,
    Output,
    Received,
    SessionClosed,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.messages import FromCoordinator, GoAway, Owner
from txrpc.errors import Fenced, LogBehind
from txrpc.ids import Epoch

__all__ = ["CoordinatorDriver", "Outbox"]

logger = logging.getLogger("txrpc.coordinator")

_HOUSEKEEPING_S = 0.5
_numbers = itertools.count(1)


class Outbox(Protocol):
    """Where a session's messages go."""

    def put(self, message: FromCoordinator) -> None:
        """Queue *message*; never blocks."""

    def close(self, farewell: GoAway) -> None:
        """End the session after *farewell*."""


class CoordinatorDriver:
    """One coordinator node in one epoch.  All methods belong to the event loop that `start` ran on."""

    def __init__(
        self, log: DecisionLog, node: str, group: str, limits: Limits, retention_s: float, in_doubt_warn_s: float
    ) -> None:
        self._log = log
        self._node = node
        self._group = group
        self._limits = limits
        self._doubts = InDoubtReporter(int(in_doubt_warn_s * 1000))
        self._outboxes: dict[int, Outbox] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._started_ms = 0
        self._clock_offset_ms = 0
        self.book = Logbook(log, retention_s, self)
        self.messages: Counter[str] = Counter()
        """Messages by direction and kind."""
        self.over: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Done when this engine must stop: `Fenced`, `LogBehind`, or a mistake of its own."""

    # ------------------------------------------------------------------------------------------------------ life

    async def start(self, holder: str = "", expect: Epoch | None = None) -> None:
        """Open the log, which fences earlier epochs, and take up what they left.

        *holder* and *expect*: see `DecisionLog.open`.  Raises `ConfigurationError`, `Fenced`.
        """
        nonce = int.from_bytes(os.urandom(4), "big")
        failpoint("coordinator.before_open")
        opened = await self.book.run(self._log.open, self._node, nonce, holder, expect)
        failpoint("coordinator.after_open")
        now_ms = self.now_ms()
        clock_ms = max(time.time_ns() // 1_000_000, opened.clock_ms + 1)
        self._started_ms, self._clock_offset_ms = now_ms, clock_ms - now_ms
        self.owner = Owner(self._node, opened.epoch)
        self.core = Coordinator(self._node, self._group, opened, self._limits, now_ms, clock_ms)
        fields = {
            "node": self._node,
            "epoch": str(opened.epoch),
            "log": self._log.location,
            "pending": len(opened.pending),
        }
        logger.info("log opened", extra=fields)
        for task in (*self.book.tasks(), self._housekeeper()):
            self._run(task)
        self._reschedule()

    async def abandon(self) -> None:
        """Close the log of a coordinator that could not be started."""
        await self.book.close()

    async def drain(self, grace_s: float) -> None:
        """Take no new commit request and wait, at most *grace_s*, until everything under way is decided."""
        self.step(Drain())
        until_ms = self.now_ms() + int(grace_s * 1000)
        farewell = GoAway("shutdown", "the coordinator is shutting down", retry=True)
        while self.core.deciding and self.now_ms() < until_ms and not self.over.done():
            for number in self.core.idle_sessions():  # their next coordinator may be there already
                self._close(number, farewell)
            await asyncio.sleep(0.02)
        if self.core.deciding:
            logger.warning("shutting down undecided", extra={"transactions": self.core.deciding})
        for number in list(self._outboxes):
            self._close(number, farewell)

    async def stop(self) -> None:
        """End the tasks and close the log.  Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        await self.book.close()

    # ------------------------------------------------------------------------------------------------------ events

    def now_ms(self) -> int:
        """Monotonic time."""
        return time.monotonic_ns() // 1_000_000

    def clock_ms(self) -> int:
        """See `Reader`."""
        return self.now_ms() + self._clock_offset_ms

    def is_open(self, session: int) -> bool:
        """See `Reader`."""
        return session in self._outboxes

    @property
    def uptime_ms(self) -> int:
        """Since `start`."""
        return self.now_ms() - self._started_ms

    @property
    def node(self) -> str:
        """The coordinator's name."""
        return self._node

    @property
    def log_location(self) -> str:
        """Return where the log is, without a password."""
        return self._log.location

    def attach(self, outbox: Outbox) -> int:
        """A new session's number, which is never used twice in this process."""
        number = next(_numbers)
        self._outboxes[number] = outbox
        return number

    def detach(self, number: int) -> None:
        """The session's stream has ended."""
        if self._outboxes.pop(number, None) is not None:
            self.step(SessionClosed(number))

    def step(self, event: Event) -> None:
        """Take one event and honour its effects."""
        if self.over.done():
            return
        if isinstance(event, Received):
            self.messages["received " + type(event.message).__name__] += 1
        self._apply(self.core.step(event, self.now_ms()))
        self._reschedule()

    def _apply(self, out: Output) -> None:
        self.book.take(out)
        for number, message in out.send:
            self.messages["sent " + type(message).__name__] += 1
            outbox = self._outboxes.get(number)
            if outbox is not None:
                outbox.put(message)
        for number, farewell in out.close:
            self._close(number, farewell)
        if out.behind:
            logger.critical("log behind", extra={"reason": out.behind})
            self._end(LogBehind(out.behind), GoAway("log_behind", out.behind, retry=True))
        for note in out.notes:
            logger.log(_LEVELS[note.level], note.event, extra=_fields(note.fields))

    def _close(self, number: int, farewell: GoAway) -> None:
        outbox = self._outboxes.get(number)
        if outbox is not None:
            outbox.close(farewell)

    def _reschedule(self) -> None:
        due_ms = self.core.next_wakeup_ms()
        if due_ms is None or (self._timer is not None and self._timer_ms <= due_ms):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = due_ms
        delay_s = max(0, due_ms - self.now_ms()) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._woke)

    def _woke(self) -> None:
        self._timer = None
        try:
            self.step(Woke())
        except Exception as error:
            self._failed(error)

    # ---------------------------------------------------------------------------------------------------- its end

    def fenced(self, error: Fenced) -> None:
        """See `Reader`."""
        if not self.over.done():
            logger.warning("fenced", extra={"node": self._node, "reason": str(error)})
            self._end(error, GoAway("fenced", str(error), retry=True))

    def _failed(self, error: BaseException) -> None:
        if not self.over.done():
            logger.critical("engine failed", exc_info=error)
            self._end(error, GoAway("internal", "the coordinator failed and starts again from its log", retry=True))

    def _end(self, error: BaseException, farewell: GoAway) -> None:
        self.over.set_result(error)
        for number in list(self._outboxes):
            self._close(number, farewell)

    # ------------------------------------------------------------------------------------------------------ tasks

    async def _housekeeper(self) -> None:
        while not self.over.done():
            await asyncio.sleep(_HOUSEKEEPING_S)
            await self.book.keep_house()
            self._doubts.warn(self.core, self.now_ms())

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)


_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_TAKEN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""Names that a log record has for itself, among them ``process``, or will have."""


def _fields(fields: Mapping[str, object]) -> dict[str, object]:
    """Return what a note says, as extra fields of a log record."""
    named = {f"{key}_name" if key in _TAKEN else key: value for key, value in fields.items()}
    return {key: str(value) if isinstance(value, bytes) else value for key, value in named.items()}
