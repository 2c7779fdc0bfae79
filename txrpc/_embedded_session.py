"""A coordinator inside the program: several databases in one process, and no server.

How to think of it
    The same coordinator and the same client as everywhere; only the session between them is another one: a queue in each direction,
    and one pump that empties it.  The coordinator belongs to an event loop: the program's own if it is an asyncio program,
    otherwise one in a thread of its own.  Nothing is encoded and nothing leaves the process.

    A message is never handled where it is sent.  The pump takes it once the step that sent it has ended, so that neither
    side is entered while it is in the middle of something.  The end of the session waits in the same queue, behind the replies
    that were sent before it.

    The decision log is what makes it recover: the program that opens it next finds the decisions that were not carried out, and the
    branches in its databases ask.  A second program on the same log would fence the first one; on a SQLite file it is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from txrpc._client.core import ClientCore
from txrpc._coordinator.config import CoordinatorConfig
from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._coordinator.host import Host
from txrpc._protocol.coordinator.events import Received, SessionOpened
from txrpc._protocol.messages import FromCoordinator, GoAway, ToCoordinator, Welcome
from txrpc.errors import ConfigurationError, CoordinatorUnavailable, ForkedError

__all__ = ["Embedding", "LoopSession", "ThreadSession"]

logger = logging.getLogger("txrpc.session")

_IN_DOUBT_WARN_S = 60.0
_DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a coordinator inside a program is to be: see `txrpc.embedded`."""

    log: str
    group: str
    node: str
    listen: str = ""
    tls: grpc.ServerCredentials | None = None

    def config(self) -> CoordinatorConfig:
        """The same for a coordinator that is a program of its own; raises `ConfigurationError`, `InvalidName`."""
        told: dict[str, Any] = {"listen": self.listen} if self.listen else {}
        if not self.listen:
            # No other process can know more of this log than the one that opens it, so there is none to wait for.
            told["recovery_wait_s"] = 0.0
        return CoordinatorConfig(
            log=self.log,
            node=self.node,
            group=self.group,
            in_doubt_warn_s=_IN_DOUBT_WARN_S,
            shutdown_grace_s=_DRAIN_S,
            takeover_s=0.0,
            **told,
        )


class _Session:
    """The session of a client with the coordinator in its own process.  Its two subclasses differ in who has the event loop."""

    def __init__(self, core: ClientCore, embedding: Embedding) -> None:
        self.address = embedding.node
        """Where it listens, or its name."""
        self.trouble = "it has not been started"
        self.over = self.refused = self._was_open = False
        self._core = core
        self._embedding = embedding
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop
        self._host: Host | None = None
        self._server: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._driver: CoordinatorDriver | None = None
        self._number = 0
        self._lock_file: int | None = None
        self._to_coordinator: deque[tuple[str, ToCoordinator]] = deque()
        self._to_client: deque[FromCoordinator | _End] = deque()
        self._pumping = False
        self._closed = False

    # ------------------------------------------------------------------------------------------ for the client

    def send(self, node: str, *messages: ToCoordinator) -> None:
        """See `Outbox` of `txrpc._client.coordinators`.  From any thread."""
        if os.getpid() != self._pid:
            raise ForkedError("this coordinator belongs to the process that was forked: embed one in the child")
        if self.trouble:
            raise CoordinatorUnavailable(f"the embedded coordinator is not there: {self.trouble}")
        self._to_coordinator.extend((node, message) for message in messages)
        self._wake()

    def _wake(self) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------- for the coordinator, on its loop

    def put(self, message: FromCoordinator) -> None:
        """See `Outbox` of `txrpc._coordinator.driver`."""
        self._to_client.append(message)
        self._schedule()

    def close_session(self, farewell: GoAway) -> None:
        """The coordinator ends the session.  What a server would do by itself, start again, is for the program to do."""
        self.refused, self.over = not self._was_open, True
        why = "it failed" if farewell.code == "internal" else farewell.text
        self._lost(f"{why}; start the program again")

    # ---------------------------------------------------------------------------------------------------- on the loop

    async def _open(self) -> None:
        """Open the log, serve, and say Hello; raises `ConfigurationError`."""
        from txrpc._decision_log.sql import SqlLog

        log, config = self._embedding.log, self._embedding.config()
        self._lock_file = _claim(log)
        host = Host(config, lambda: SqlLog(log), None)
        if not self._embedding.listen:
            await host.start()
        else:
            await self._serve(host, config)
        self._host, driver = host, host.home
        self._driver = driver
        driver.over.add_done_callback(self._failed)
        self._number = driver.attach(_Outbox(self))
        driver.step(SessionOpened(self._number, self._core.hello(self)))

    async def _serve(self, host: Host, config: CoordinatorConfig) -> None:
        from txrpc._coordinator.server import bind, make_server, watch_health

        self._server, health_service = make_server(config, host)
        try:
            self.address = bind(self._server, config, self._embedding.tls)
            await host.start()
            await self._server.start()
        except BaseException:
            await self._server.stop(None)
            if host.opened:
                await host.stop()
            raise
        self._watch = self._loop.create_task(watch_health(host, health_service))
        logger.info("listening", extra={"address": self.address, "node": config.node, "group": config.group})

    async def _drain(self) -> None:
        if self._host is not None and not self.over:
            await self._host.drain()  # while all goes on: what is being decided is waiting for votes

    async def _close(self) -> None:
        self._closed = True
        if self._host is not None:
            self.over = True
            await self._stop_serving()
            await self._host.stop()
        self.over, self._driver = True, None
        self._lost("this process has closed it")
        self._pump()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _failed(self, over: asyncio.Future[BaseException]) -> None:
        if self._server is not None:
            self._stopping = self._loop.create_task(self._stop_serving())
        if not self.over:
            self.over, error = True, over.result()
            logger.error("the embedded coordinator has ended", extra={"reason": str(error)})
            self._lost(f"it has ended: {error}")

    async def _stop_serving(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            await self._server.stop(1.0)

    def _lost(self, text: str) -> None:
        if self.trouble:
            self.trouble = text
        else:
            self._to_client.append(_End(text))
            self._schedule()

    def _schedule(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hand on everything that is waiting, in both directions."""
        self._pumping = False
        while self._to_client or self._to_coordinator:
            while self._to_client:
                self._take(self._to_client.popleft())
            while self._to_coordinator:
                node, message = self._to_coordinator.popleft()
                self._give(node, message)

    def _give(self, node: str, message: ToCoordinator) -> None:
        if self._driver is None or self.over:
            return
        try:
            self._driver.step(Received(self._number, node, message))
        except Exception as error:  # a mistake of ours: what it holds in memory cannot be trusted any more, its log can
            logger.exception("the embedded coordinator failed")
            self.over = True
            self._lost(f"it failed ({type(error).__name__}); start the program again")

    def _take(self, message: FromCoordinator | _End) -> None:
        try:
            if isinstance(message, _End):
                was_open, self.trouble = not self.trouble, message.text
                if was_open:
                    self._core.on_lost(self, message.text)
            elif isinstance(message, Welcome):
                self._was_open, self.trouble = True, ""  # first: what is sent in answer to it goes out
                self._core.on_welcome(self, message)
            else:
                self._core.on_message(self, self._embedding.node, message)
        except Exception:
            logger.exception("a message could not be handled", extra={"message_type": type(message).__name__})


@dataclass(frozen=True, slots=True)
class _End:
    """The session has ended, and why."""

    text: str


class _Outbox:
    """What the coordinator sees of the session."""

    def __init__(self, session: _Session) -> None:
        self.put = session.put
        self.close = session.close_session


def _claim(log: str) -> int | None:
    """Lock a SQLite file for this program, as an open file descriptor; raises `ConfigurationError` if another program has it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(log)
    except ArgumentError:
        return None  # the log says what is wrong
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    try:
        import fcntl
    except ImportError:
        return None
    path = Path(f"{url.database}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"cannot open the decision log {log}: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigurationError(
            f"another program has the decision log {log}: one program at a time can embed a coordinator with it; "
            "give each program a log of its own, or let both use a server (txrpc coordinator)"
        ) from None
    return descriptor


class ThreadSession(_Session):
    """For synchronous programs: the loop runs in a thread."""

    def start(self) -> None:
        """Open the log; raises `ConfigurationError`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="txrpc-coordinator", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def drain(self) -> None:
        """Let what is being decided be decided, and begin nothing new."""
        if not self._closed and os.getpid() == self._pid and hasattr(self, "_thread"):
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()

    def close(self) -> None:
        """Close the log.  Calling it twice is fine."""
        if self._closed or os.getpid() != self._pid or not hasattr(self, "_thread"):
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_answered(self, timeout_s: float) -> None:
        """It has: `start` waits for the log."""

    def _wake(self) -> None:
        if not self._pumping:  # what this may miss, the pump that is about to run takes along
            self._pumping = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has everything that could be sent
                self._loop.call_soon_threadsafe(self._pump)


class LoopSession(_Session):
    """For asyncio programs: the loop is theirs."""

    async def start(self) -> None:
        """Open the log; raises `ConfigurationError`."""
        self._loop = asyncio.get_running_loop()
        await self._open()

    async def drain(self) -> None:
        """Let what is being decided be decided, and begin nothing new."""
        if not self._closed and os.getpid() == self._pid:
            await self._drain()

    async def close(self) -> None:
        """Close the log.  Calling it twice is fine."""
        if not self._closed and os.getpid() == self._pid:
            await self._close()

    async def wait_answered(self, timeout_s: float) -> None:
        """It has: `start` waits for the log."""

    def _wake(self) -> None:
        self._schedule()
