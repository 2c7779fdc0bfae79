"""The driver's hand on the decision log: what waits to be written, asked and marked, and when that is done.

How to think of it
    The writer takes whatever is waiting as one batch into the log, in the log's own thread; while that sync runs, the next
    batch gathers.  That is the group commit.

    When the log answers "not recorded", those transactions abort; when it does not answer at COMMIT, the very same batch is
    repeated until it does, and until then new transactions are refused.

    Questions to the log stand in a queue of their own, so that a thousand of them delay a commit by one batch, not by all.

    What need not be forced (marks of "done") is written twice a second, incidents before the marks: a transaction is never marked
    done while an incident of it exists in memory alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from txrpc._decision_log.port import DecisionLog, LogError, NotRecorded, RecordUncertain
from txrpc._failpoints import failpoint
from txrpc._protocol.coordinator.events import (
    Bound,
    Event,
    Forgot,
    Logged,
    LogHealth,
    Looked,
    Lookup,
    NotLogged,
    Output,
)
from txrpc._protocol.records import Decision, Incident
from txrpc.errors import AbortCode, Fenced, Reason, TxrpcError
from txrpc.ids import BranchId, Xid

__all__ = ["Logbook", "Reader"]

logger = logging.getLogger("txrpc.coordinator")

_T = TypeVar("_T")

_BATCH_MAX = 1_000
_QUESTIONS_BATCH = 50
_FORGET_BATCH = 1_000
_FORGET_EVERY_S = 30.0
_DONE_MAX = 1_000
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Reader(Protocol):
    """Whom a `Logbook` tells what the log says: the engine."""

    over: asyncio.Future[BaseException]

    def step(self, event: Event) -> None:
        """Take what the log has answered."""

    def is_open(self, session: int) -> bool:
        """Return whether a root still waits on that session."""

    def clock_ms(self) -> int:
        """The coordinator's own clock, in milliseconds since 1970."""

    def fenced(self, error: Fenced) -> None:
        """A later epoch has opened the log."""


class Logbook:
    """See the module's docstring.  All methods belong to one event loop."""

    def __init__(self, log: DecisionLog, retention_s: float, reader: Reader) -> None:
        self._log = log
        self._reader = reader
        self._retention_ms = int(retention_s * 1000)
        self._forget_every_ms = int(min(_FORGET_EVERY_S, retention_s / 10) * 1000)
        self._forget_at_ms = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="txrpc-log")
        self._waiting: deque[Decision] = deque()
        self._work = asyncio.Event()
        self._lookups: deque[Lookup] = deque()
        self._asked = asyncio.Event()
        self._bind: dict[str, str] = {}
        self._rebind: dict[str, str] = {}
        self.shared = False
        """Whether other coordinators use the log as well."""
        self._incidents: list[Incident] = []
        self._closed: list[tuple[Xid, BranchId]] = []
        self._done: list[Xid] = []
        self.trouble = False
        """Whether the log did not do the last thing that was asked of it."""
        self._is_closed = False
        self.batches = 0
        self.records = 0
        self.questions: Counter[int] = Counter()
        """Questions to the log that have no answer yet, by session."""

    async def run(self, verb: Callable[..., _T], *arguments: Any) -> _T:
        """Call *verb* in the log's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, verb, *arguments)

    def take(self, out: Output) -> None:
        """What a step of the core wants written and asked."""
        if out.append:
            self._waiting.extend(out.append)
            self._work.set()
        self._bind |= out.bind
        self._rebind |= out.rebind
        self._incidents += out.incidents
        self._closed += out.closed
        self._done += out.done
        for lookup in out.look:
            self._lookups.append(lookup)
            self.questions[lookup.session] += 1
            self._asked.set()

    def tasks(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """Return what must run for as long as the engine does."""
        self._forget_at_ms = self._reader.clock_ms() + self._forget_every_ms
        return self._writer(), self._looker()

    async def close(self) -> None:
        """Write what is left, unless the engine is over, and close the log.  Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._reader.over.done():
            try:
                await self._flush()
            except (LogError, Fenced) as error:
                logger.debug("marks of done were lost, which only repeats phase 2", extra={"reason": str(error)})
        await self.run(self._log.close)
        self._thread.shutdown(wait=False)

    # ------------------------------------------------------------------------------------------------------ decisions

    async def _writer(self) -> None:
        while not self._reader.over.done():
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
                position = await self.run(self._log.record, batch)
                failpoint("coordinator.after_record")
            except (NotRecorded, RecordUncertain) as error:
                self._failed(error)
                if attempt == 0 and isinstance(error, NotRecorded):
                    self._reader.step(NotLogged(xids, Reason(AbortCode.LOG_UNAVAILABLE, str(error))))
                    return
                # That a repeat was not recorded says nothing about the first try.
                await asyncio.sleep(_backoff_s(attempt))
                attempt += 1
            except Fenced as error:
                self._reader.fenced(error)
                return
            else:
                self.batches += 1
                self.records += len(batch)
                self._works()
                self._reader.step(Logged(xids, position))
                return

    # ------------------------------------------------------------------------------------------------------ questions

    async def _looker(self) -> None:
        while not self._reader.over.done():
            await self._asked.wait()
            batch = [self._lookups.popleft() for _ in range(min(len(self._lookups), _QUESTIONS_BATCH))]
            if not self._lookups:
                self._asked.clear()
            await self._look([lookup for lookup in batch if self._reader.is_open(lookup.session)])
            self.questions.subtract(lookup.session for lookup in batch)
            self.questions = +self.questions  # without those that are at zero

    async def _look(self, batch: list[Lookup]) -> None:
        """Answer questions from the log, however long that takes."""
        attempt = 0
        while not self._reader.over.done():
            try:
                held = await self.run(lambda: [self._log.outcome(lookup.xid) for lookup in batch])
            except LogError as error:
                self._failed(error)
                await asyncio.sleep(_backoff_s(attempt))
                attempt += 1
            else:
                for lookup, decision in zip(batch, held, strict=True):
                    self._reader.step(Looked(lookup, decision))
                return

    # --------------------------------------------------------------------------------------------------- housekeeping

    async def keep_house(self) -> None:
        """Write what need not be forced, delete what has had its time, and see whether the log works again."""
        try:
            if self.trouble:
                await self.run(self._log.record, [])
                self._works()
            if self.shared:
                await self._write_names()
            await self._flush()
            if self._reader.clock_ms() >= self._forget_at_ms:
                self._forget_at_ms = self._reader.clock_ms() + self._forget_every_ms
                await self._forget()
        except Fenced as error:
            self._reader.fenced(error)
        except LogError as error:
            self._failed(error)

    async def _flush(self) -> None:
        while self._bind or self._rebind or self._incidents or self._closed or self._done:
            incidents, closed, done = self._incidents[:], self._closed[:], self._done[:_DONE_MAX]
            failpoint("coordinator.before_done")
            if self._bind or self._rebind:
                await self._write_names()
            if incidents:
                await self.run(self._log.report, incidents)
                del self._incidents[: len(incidents)]
            if closed:
                await self.run(self._log.close_incidents, closed, self._reader.clock_ms())
                del self._closed[: len(closed)]
            if done:
                await self.run(self._log.done, done, self._reader.clock_ms())
                del self._done[: len(done)]
            failpoint("coordinator.after_done")

    async def _write_names(self) -> None:
        """Write what resource names mean, and hear what they mean to the coordinators that share the log."""
        first, rebound = dict(self._bind), dict(self._rebind)
        found = await self.run(self._log.bind, first, rebound)
        self._bind = {name: identity for name, identity in self._bind.items() if first.get(name) != identity}
        self._rebind = {name: identity for name, identity in self._rebind.items() if rebound.get(name) != identity}
        unwritten = self._bind.keys() | self._rebind.keys()
        self._reader.step(Bound({name: identity for name, identity in found.items() if name not in unwritten}))

    async def _forget(self) -> None:
        """Delete what the retention time has passed for, and what the log has no room for, in batches."""
        before_ms = max(self._reader.clock_ms() - self._retention_ms, await self.run(self._log.overflow_ms))
        self._reader.step(Forgot(before_ms))  # first: from now on the absence of so old a record proves nothing
        while await self.run(self._log.forget, before_ms, _FORGET_BATCH) == _FORGET_BATCH:
            pass

    # --------------------------------------------------------------------------------------------------------- health

    def _failed(self, error: TxrpcError) -> None:
        if not self.trouble:
            self.trouble = True
            logger.error("log trouble", extra={"log": self._log.location, "reason": str(error)})
            self._reader.step(LogHealth(False, str(error)))

    def _works(self) -> None:
        if self.trouble:
            self.trouble = False
            logger.info("log works again", extra={"log": self._log.location})
            self._reader.step(LogHealth(True))


def _backoff_s(attempt: int) -> float:
    return _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)] * (0.5 + random.random())
