"""The coordinators that run in one process: that of its own node, and those of nodes that it has taken over.

How to think of it
    Each node has a coordinator of its own, wherever it runs: taking a node over is opening its log and running its coordinator
    beside one's own.  So nothing in the protocol knows of it, and every proof about one coordinator holds for the other.

    A session's stream serves all of them.  It begins with the process's own node, the *home*; a *guest* says Takeover on it, and
    the process greets the guest with a Hello of its own.

    A node whose process is back opens its log again, and thereby fences the guest, which ends.  The home itself is fenced when it
    was silent for so long that another node took it over (it was frozen, or cut off from the log): then it opens its log again.
    If it was fenced by a process of its own name, there are two of them, and this one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from txrpc._coordinator.config import CoordinatorConfig
from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._decision_log.port import DecisionLog, Heartbeats, LogError
from txrpc._protocol.takeover import NodeRow, NodeWatch
from txrpc.errors import ConfigurationError, Fenced

__all__ = ["Host", "Listener"]

logger = logging.getLogger("txrpc.coordinator")

_BEAT_S = 0.25
"""Between two heartbeats.  All nodes have the same, whatever their `takeover_s`: each must be heard by all."""
_RETRY_S = 0.5
_PAUSE_MS = 2_000
_HEARSAY_MS = 5_000


class Listener(Protocol):
    """What is told of takeovers: an open session."""

    def taken_over(self, guest: CoordinatorDriver) -> None:
        """*guest* runs here from now on."""


class Host:
    """See the module's docstring.  All methods belong to one event loop."""

    def __init__(
        self, config: CoordinatorConfig, make_log: Callable[[], DecisionLog], heartbeats: Heartbeats | None
    ) -> None:
        """*heartbeats*: None if this node neither takes over nor is taken over."""
        self._config = config
        self._make_log = make_log
        self._heartbeats = heartbeats
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="txrpc-heartbeat")
        self._watch = NodeWatch(config.node, int(_BEAT_S * 1000), int(config.takeover_s * 1000))
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[str] = set()
        self._unfit: set[str] = set()
        """Nodes whose coordinator has failed here, until they are back: another try would fail as well."""
        self._troubles: dict[str, str] = {}
        """Why nodes are not run here that should be."""
        self._rows: Sequence[NodeRow] = ()
        self._silent = False
        """Whether the last heartbeat has failed."""
        self._pauses: dict[str, int] = {}
        """Until when nodes are let be whose log could not be opened, by monotonic time in milliseconds."""
        self.opened = False
        """Whether there is a home: it has opened its log once."""
        self.home: CoordinatorDriver
        self.guests: dict[str, CoordinatorDriver] = {}
        self.listeners: set[Listener] = set()

    @property
    def drivers(self) -> list[CoordinatorDriver]:
        """The home first."""
        return [self.home, *self.guests.values()]

    def view(self) -> list[tuple[NodeRow, bool, bool, str]]:
        """All nodes as last seen: whether each lives, whether it leads, and why it is not run here though it should be."""
        live, leader = self._watch.live(self._rows), self._watch.leader(self._rows)
        return [(row, row.node in live, row.node == leader, self._troubles.get(row.node, "")) for row in self._rows]

    # ------------------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Open the home's log; raises `ConfigurationError`."""
        self.home = await self._open_home()
        self.opened = True
        if self._heartbeats is not None and not self._config.takeover_s:
            await self._run(self._heartbeats.withdraw, self._config.node)
            await self._run(self._heartbeats.close)
            self._heartbeats = None
        if self._heartbeats is not None:
            await self._run(self._heartbeats.join, self._config.node, self._config.group, time.time_ns() // 1_000_000)
            self._spawn(self._observe())

    async def until_over(self, stop: asyncio.Event) -> BaseException | None:
        """Wait until told to *stop*, which returns None, or until the home has ended for good: why."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while True:
                futures: set[asyncio.Future[Any]] = {stopping, self.home.over}
                await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    return None
                error = self.home.over.result()
                if not isinstance(error, Fenced):
                    return error
                if not await self._was_taken_over(stop):
                    if stop.is_set():
                        return None
                    logger.critical("another process has this node's name", extra={"node": self._config.node})
                    return error
                if not await self._come_back(stop):
                    return None
        finally:
            stopping.cancel()

    async def drain(self) -> None:
        """Let all coordinators finish what is under way, within the time that the configuration gives."""
        await asyncio.gather(*(each.drain(self._config.shutdown_grace_s) for each in self.drivers))

    async def stop(self) -> None:
        """End everything; a node that leaves of its own accord says so."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(each.stop() for each in self.drivers))
        if self._heartbeats is not None:
            try:
                if not self.home.over.done():
                    await self._run(self._heartbeats.leave)
            except LogError as error:
                logger.debug("others will notice only later that this node has left", extra={"reason": str(error)})
            await self._run(self._heartbeats.close)
        self._thread.shutdown(wait=False)

    async def _open_home(self) -> CoordinatorDriver:
        driver = self._make_driver(self._config.node)
        try:
            await driver.start()
        except BaseException:
            await driver.abandon()
            raise
        return driver

    def _make_driver(self, node: str) -> CoordinatorDriver:
        config = self._config
        limits, retention_s, warn_s = config.limits(), config.retention_s, config.in_doubt_warn_s
        # The processes that may know better than the log are connected to this coordinator: they need not come back first.
        if node != config.node:
            limits = replace(limits, recovery_wait_ms=limits.recovery_wait_ms // 2)
        return CoordinatorDriver(self._make_log(), node, config.group, limits, retention_s, warn_s)

    # -------------------------------------------------------------------------------------------- being taken over

    async def _was_taken_over(self, stop: asyncio.Event) -> bool:
        """Whether another node holds this one, and not a process of the same name."""
        until_ms = self.home.now_ms() + _HEARSAY_MS
        while self._heartbeats is not None and not stop.is_set():
            with contextlib.suppress(LogError):
                rows = await self._run(self._heartbeats.beat)
                own = [row for row in rows if row.node == self._config.node]
                # In a group it is heard of the epoch that fences, and only then who holds it.
                if any(row.epoch > self.home.owner.epoch for row in own) or self.home.now_ms() > until_ms:
                    return any(row.holder != row.node for row in own)
            await asyncio.sleep(_BEAT_S)
        return False

    async def _come_back(self, stop: asyncio.Event) -> bool:
        """Open the home's log again, as soon as that works; False if told to stop meanwhile."""
        await self.home.stop()
        said = ""
        while not stop.is_set():
            try:
                self.home = await self._open_home()
            except (Fenced, ConfigurationError) as error:
                if str(error) != said:
                    said = str(error)
                    logger.error("cannot come back", extra={"reason": said})
                await asyncio.sleep(_RETRY_S)
            else:
                logger.warning("back after a takeover", extra={"epoch": str(self.home.owner.epoch)})
                return True
        return False

    # ----------------------------------------------------------------------------------------------- taking over

    async def _observe(self) -> None:
        assert self._heartbeats is not None
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                rows = await self._run(self._heartbeats.beat)
            except LogError as error:
                if not self._silent:
                    logger.warning("no heartbeat: others may take this node over", extra={"reason": str(error)})
                self._silent = True
                continue
            self._silent = False
            epochs = {row.node: row.epoch for row in rows}
            for driver in self.drivers:
                driver.book.shared = len(rows) > 1
                if epochs.get(driver.node, 0) > driver.owner.epoch:
                    driver.fenced(Fenced(f"epoch {driver.owner.epoch} of node {driver.node!r} is over"))
            self._unfit -= {row.node for row in rows if row.holder == row.node}
            now_ms = self.home.now_ms()
            self._pauses = {node: until_ms for node, until_ms in self._pauses.items() if until_ms > now_ms}
            mine = {*self.guests, *self._opening, *self._unfit, *self._pauses}
            orphans = self._watch.observe(rows, mine, now_ms)
            live = self._watch.live(rows)
            self._troubles = {node: why for node, why in self._troubles.items() if node not in live}
            self._rows = rows
            for row in orphans:
                self._opening.add(row.node)
                self._spawn(self._take_over(row))

    async def _take_over(self, row: NodeRow) -> None:
        guest = self._make_driver(row.node)
        try:
            await guest.start(self._config.node, row.epoch)
        except (Fenced, ConfigurationError) as error:
            logger.info("not taken over", extra={"node": row.node, "reason": str(error)})
            if isinstance(error, ConfigurationError):  # it will most likely be the same in a moment
                self._pauses[row.node] = self.home.now_ms() + _PAUSE_MS
                self._troubles[row.node] = str(error)
            await guest.abandon()
            return
        finally:
            self._opening.discard(row.node)
        pending = len(guest.core.state.transactions)
        fields = {"node": row.node, "epoch": str(guest.owner.epoch), "from": row.holder, "pending": pending}
        logger.warning("taken over", extra=fields)
        self.guests[row.node] = guest
        self._troubles.pop(row.node, None)
        for listener in list(self.listeners):
            listener.taken_over(guest)
        why = await asyncio.shield(guest.over)
        if not isinstance(why, Fenced):
            self._unfit.add(row.node)
            self._troubles[row.node] = str(why)
        del self.guests[row.node]
        logger.warning("given back", extra={"node": row.node, "reason": str(why)})
        await guest.stop()

    # ------------------------------------------------------------------------------------------------------ under it

    async def _run(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, verb, *arguments)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a takeover failed", exc_info=error)
