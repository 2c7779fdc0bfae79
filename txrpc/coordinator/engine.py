"""The engine: feeds events to the pure coordinator and honours what comes out, in order.

How to think of it
    One event loop, one colour.  `step` is synchronous: an event goes in, messages go to outboxes, decisions go to the writer.
    The writer takes whatever is waiting as one batch into the log, in the log's own thread; while that sync runs, the next
    batch gathers.  That is the group commit.

    When the log answers "not recorded", those transactions abort; when it does not answer at COMMIT, the very same batch is
    repeated until it does, and until then new transactions are refused.  When it says "fenced", this engine is over.

    Questions to the log stand in a queue of their own, so that a thousand of them delay a commit by one batch, not by all.

    A mistake of our own in one of the engine's tasks ends the engine: what it holds in memory cannot be trusted any more, what
    the log holds can, and the next start begins from there.

Time is monotonic.  The coordinator's own clock starts at the wall clock, or at the log's if that is ahead, and no later jump of
the machine's clock reaches it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from txrpc.coordinator.doubts import Doubts
from txrpc.errors import AbortCode, Fenced, Reason, TxrpcError
from txrpc.failpoints import failpoint
from txrpc.ids import Xid
from txrpc.log.base import DecisionLog, LogError, NotRecorded, RecordUncertain
from txrpc.protocol.coordinator import Coordinator
from txrpc.protocol.events import (
    Drain,
    Event,
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
    Woke,
)
from txrpc.protocol.messages import Decision, FromCoordinator, GoAway, Owner

__all__ = ["Engine", "Outbox"]

logger = logging.getLogger("txrpc.coordinator")

_T = TypeVar("_T")

_BATCH_MAX = 1_000
_QUESTIONS_BATCH = 50
_HOUSEKEEPING_S = 0.5
_FORGET_BATCH = 1_000
_FORGET_EVERY_S = 30.0
_DONE_MAX = 1_000
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Outbox(Protocol):
    """Where a session's messages go."""

    def put(self, message: FromCoordinator) -> None:
        """Queue *message*; never blocks."""

    def close(self, farewell: GoAway) -> None:
        """End the session after *farewell*."""


class Engine:
    """One coordinator node in one epoch.  All methods belong to the event loop that `start` ran on."""

    def __init__(
        self, log: DecisionLog, node: str, group: str, limits: Limits, retention_s: float, in_doubt_warn_s: float
    ) -> None:
        self._log = log
        self._node = node
        self._group = group
        self._limits = limits
        self._retention_ms = int(retention_s * 1000)
        self._forget_every_ms = int(min(_FORGET_EVERY_S, retention_s / 10) * 1000)
        self._doubts = Doubts(int(in_doubt_warn_s * 1000))
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="txrpc-log")
        self._outboxes: dict[int, Outbox] = {}
        self._waiting: deque[Decision] = deque()
        self._work = asyncio.Event()
        self._lookups: deque[Lookup] = deque()
        self._asked = asyncio.Event()
        self._done: list[Xid] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._sessions = 0
        self._started_ms = 0
        self._clock_offset_ms = 0
        self.batches = 0
        self.records = 0
        self.messages: Counter[str] = Counter()
        """Messages by direction and kind."""
        self.questions: Counter[int] = Counter()
        """Questions to the log that have no answer yet, by session."""
        self.over: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Done when this engine must stop: `Fenced`, or a mistake of its own."""

    # ------------------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Open the log, which fences earlier epochs, and take up what they left.  Raises `ConfigurationError`."""
        nonce = int.from_bytes(os.urandom(4), "big")
        failpoint("coordinator.before_open")
        opened = await self._in_log(self._log.open, self._node, nonce)
        failpoint("coordinator.after_open")
        now_ms = self.now_ms()
        clock_ms = max(time.time_ns() // 1_000_000, opened.clock_ms + 1)
        self._started_ms, self._clock_offset_ms = now_ms, clock_ms - now_ms
        self.owner = Owner(self._node, opened.epoch)
        self.core = Coordinator(
            self.owner, self._group, opened.lineage, opened.pending, self._limits, now_ms, clock_ms, opened.forgotten_ms
        )
        fields = {
            "node": self._node,
            "epoch": str(opened.epoch),
            "log": self._log.location,
            "pending": len(opened.pending),
        }
        logger.info("log opened", extra=fields)
        for task in (self._writer(), self._looker(), self._housekeeper()):
            self._run(task)
        self._reschedule()

    async def drain(self, grace_s: float) -> None:
        """Take no new commit request and wait, at most *grace_s*, until everything under way is decided."""
        self.step(Drain())
        until_ms = self.now_ms() + int(grace_s * 1000)
        while self.core.deciding and self.now_ms() < until_ms and not self.over.done():
            await asyncio.sleep(0.02)
        if self.core.deciding:
            logger.warning("shutting down undecided", extra={"transactions": self.core.deciding})
        for number in list(self._outboxes):
            self._close(number, GoAway("shutdown", "the coordinator is shutting down", retry=True))

    async def stop(self) -> None:
        """End the tasks and close the log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if not self.over.done():
            try:
                await self._flush_done()
            except (LogError, Fenced) as error:
                logger.debug("marks of done were lost, which only repeats phase 2", extra={"reason": str(error)})
        await self._in_log(self._log.close)
        self._log_thread.shutdown(wait=False)

    # ------------------------------------------------------------------------------------------------------ events

    def now_ms(self) -> int:
        """Monotonic time."""
        return time.monotonic_ns() // 1_000_000

    @property
    def uptime_ms(self) -> int:
        """Since `start`."""
        return self.now_ms() - self._started_ms

    @property
    def log_location(self) -> str:
        """Where the log is, without a password."""
        return self._log.location

    def attach(self, outbox: Outbox) -> int:
        """A new session's number, which is never used twice."""
        self._sessions += 1
        self._outboxes[self._sessions] = outbox
        return self._sessions

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
        self._honour(self.core.step(event, self.now_ms()))
        self._reschedule()

    def _honour(self, out: Output) -> None:
        if out.append:
            self._waiting.extend(out.append)
            self._work.set()
        for number, message in out.send:
            self.messages["sent " + type(message).__name__] += 1
            outbox = self._outboxes.get(number)
            if outbox is not None:
                outbox.put(message)
        self._done += out.done
        for lookup in out.look:
            self._lookups.append(lookup)
            self.questions[lookup.session] += 1
            self._asked.set()
        for number, farewell in out.close:
            self._close(number, farewell)
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

    # ------------------------------------------------------------------------------------------------------ the log

    async def _in_log(self, verb: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._log_thread, verb, *arguments)

    async def _writer(self) -> None:
        while not self.over.done():
            await self._work.wait()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH_MAX))]
            if not self._waiting:
                self._work.clear()
            if batch:
                await self._write(batch)

    async def _write(self, batch: list[Decision]) -> None:
        """Record one batch, however long that takes."""
        xids = tuple(decision.xid for decision in batch)
        attempt = 0
        while True:
            try:
                failpoint("coordinator.before_record")
                await self._in_log(self._log.record, batch)
                failpoint("coordinator.after_record")
            except (NotRecorded, RecordUncertain) as error:
                self._log_failed(error)
                if attempt == 0 and isinstance(error, NotRecorded):
                    self.step(NotLogged(xids, Reason(AbortCode.LOG_UNAVAILABLE, str(error))))
                    return
                # That a repeat was not recorded says nothing about the first try.
                await asyncio.sleep(_backoff_s(attempt))
                attempt += 1
            except Fenced as error:
                self._fenced(error)
                return
            else:
                self.batches += 1
                self.records += len(batch)
                self._log_works()
                self.step(Logged(xids))
                return

    async def _looker(self) -> None:
        while not self.over.done():
            await self._asked.wait()
            batch = [self._lookups.popleft() for _ in range(min(len(self._lookups), _QUESTIONS_BATCH))]
            if not self._lookups:
                self._asked.clear()
            await self._look([lookup for lookup in batch if lookup.session in self._outboxes])
            self.questions.subtract(lookup.session for lookup in batch)
            self.questions = +self.questions  # without those that are at zero

    async def _look(self, batch: list[Lookup]) -> None:
        """Answer questions from the log, however long that takes."""
        attempt = 0
        while not self.over.done():
            try:
                held = await self._in_log(lambda: [self._log.outcome(lookup.xid) for lookup in batch])
            except LogError as error:
                self._log_failed(error)
                await asyncio.sleep(_backoff_s(attempt))
                attempt += 1
            else:
                for lookup, decision in zip(batch, held, strict=True):
                    self.step(Looked(lookup, decision))
                return

    def _log_failed(self, error: TxrpcError) -> None:
        if not self.core.log_trouble:
            logger.error("log trouble", extra={"log": self._log.location, "reason": str(error)})
            self.step(LogHealth(False, str(error)))

    def _log_works(self) -> None:
        if self.core.log_trouble:
            logger.info("log works again", extra={"log": self._log.location})
            self.step(LogHealth(True))

    def _fenced(self, error: Fenced) -> None:
        if not self.over.done():
            logger.critical("fenced", extra={"reason": str(error)})
            self._end(error, GoAway("fenced", str(error), retry=True))

    def _failed(self, error: BaseException) -> None:
        if not self.over.done():
            logger.critical("engine failed", exc_info=error)
            self._end(error, GoAway("internal", "the coordinator failed and starts again from its log", retry=True))

    def _end(self, error: BaseException, farewell: GoAway) -> None:
        self.over.set_result(error)
        for number in list(self._outboxes):
            self._close(number, farewell)

    # ------------------------------------------------------------------------------------------------- housekeeping

    async def _housekeeper(self) -> None:
        forget_at_ms = self.now_ms() + self._forget_every_ms
        while not self.over.done():
            await asyncio.sleep(_HOUSEKEEPING_S)
            try:
                if self.core.log_trouble:
                    await self._in_log(self._log.record, [])
                    self._log_works()
                await self._flush_done()
                if self.now_ms() >= forget_at_ms:
                    forget_at_ms = self.now_ms() + self._forget_every_ms
                    await self._forget()
            except Fenced as error:
                self._fenced(error)
            except LogError as error:
                self._log_failed(error)
            self._doubts.warn(self.core, self.now_ms())

    async def _flush_done(self) -> None:
        while self._done:
            xids = self._done[:_DONE_MAX]
            failpoint("coordinator.before_done")
            await self._in_log(self._log.done, xids, self._clock_ms())
            failpoint("coordinator.after_done")
            del self._done[: len(xids)]

    async def _forget(self) -> None:
        """Delete what the retention time has passed for, in batches."""
        before_ms = self._clock_ms() - self._retention_ms
        self.step(Forgot(before_ms))  # first: from now on the absence of so old a record proves nothing
        while await self._in_log(self._log.forget, before_ms, _FORGET_BATCH) == _FORGET_BATCH:
            pass

    def _clock_ms(self) -> int:
        return self.now_ms() + self._clock_offset_ms

    # ------------------------------------------------------------------------------------------------------ tasks

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
    """What a note says, as extra fields of a log record."""
    named = {f"{key}_name" if key in _TAKEN else key: value for key, value in fields.items()}
    return {key: str(value) if isinstance(value, bytes) else value for key, value in named.items()}


def _backoff_s(attempt: int) -> float:
    return _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)] * (0.5 + random.random())
