"""The session of an asyncio process: one bidirectional stream to the coordinator, kept up by a task.

`txrpc.rpc.session` has the theory; this is the same in the other colour.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from txrpc.errors import BadMessage, ConfigurationError, CoordinatorUnavailable, ForkedError
from txrpc.options import DEFAULTS, SessionOptions
from txrpc.protocol.messages import FromCoordinator, Hello, ToCoordinator, Welcome
from txrpc.rpc.link import Backoff, Refused, channel_options, check_first, farewell, refusal
from txrpc.wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc.wire.v1 import session_pb2_grpc

__all__ = ["AioSession"]

logger = logging.getLogger("txrpc.rpc")

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class _Outgoing:
    """The messages of one stream."""

    def __init__(self, max_batch: int) -> None:
        self._queue: deque[ToCoordinator] = deque()
        self._ready = asyncio.Event()
        self._max_batch = max_batch
        self.closed = False

    def put(self, messages: tuple[ToCoordinator, ...]) -> bool:
        """Queue *messages* in order; False if the stream is over."""
        if not self.closed:
            self._queue.extend(messages)
            self._ready.set()
        return not self.closed

    def close(self) -> None:
        """Let `write_to` end, once what is queued has gone."""
        self.closed = True
        self._ready.set()

    async def write_to(self, call: Any) -> None:
        """Write whatever is waiting as one batch, again and again."""
        while True:
            await self._ready.wait()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                await call.write(encode_to_coordinator(batch))
            if self.closed:
                await call.done_writing()
                return
            self._ready.clear()


class AioSession:
    """See the module's docstring.  Belongs to the event loop that it is started on; the callbacks must not block."""

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], Hello],
        on_welcome: Callable[[Welcome], None],
        on_message: Callable[[FromCoordinator], None],
        on_lost: Callable[[str], None],
        options: SessionOptions = DEFAULTS,
    ) -> None:
        self.address = address
        self._hello = hello
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._on_lost = on_lost
        self._options = options
        self._pid = os.getpid()
        self._changed = asyncio.Event()
        self._outgoing: _Outgoing | None = None
        self._welcome: Welcome | None = None
        self._refused: ConfigurationError | None = None
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self.last_error = "it has not been started"

    @property
    def welcome(self) -> Welcome | None:
        """What the coordinator said on the live session; None while there is none."""
        return self._welcome

    async def start(self) -> None:
        """Begin to connect, in the background."""
        self.last_error = f"the coordinator at {self.address} has not answered yet"
        self._task = asyncio.get_running_loop().create_task(self._run(), name="txrpc-session")

    async def close(self, grace_s: float = 2.0) -> None:
        """End the session for good.  What is queued still goes out, within *grace_s* seconds.  Calling it twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._signal()
        if self._outgoing is not None:
            self._outgoing.close()
        if self._task is not None:
            _done, late = await asyncio.wait({self._task}, timeout=grace_s if self._outgoing else 0)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def send(self, *messages: ToCoordinator) -> None:
        """Queue *messages*, in this order; never blocks.

        Raises `CoordinatorUnavailable` when there is no session (nothing was queued), `ForkedError` in a forked child.
        """
        if os.getpid() != self._pid:
            raise ForkedError("this session belongs to the parent process: call txrpc.aio.connect() in the child")
        if self._outgoing is None or not self._outgoing.put(messages):
            raise CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")

    async def wait_connected(self, timeout_s: float) -> Welcome:
        """Wait for a session, at most *timeout_s* seconds.

        Raises `CoordinatorUnavailable` with the last error, `ConfigurationError` if the coordinator will never have this process.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._welcome is None:
                    if self._refused is not None:
                        raise self._refused
                    if self._closed:
                        break
                    await self._changed.wait()
        except TimeoutError:
            pass
        if self._welcome is None:
            raise CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")
        return self._welcome

    # -------------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        backoff = Backoff(self._options)
        while not self._closed and self._refused is None:
            try:
                await self._connect_and_read(backoff)
                self.last_error = "the coordinator ended the stream"
            except Refused as error:
                self._note_refusal(error)
            except TimeoutError:
                self.last_error = f"{self.address}: no answer within {self._options.connect_timeout_s:g} s"
            except grpc.RpcError as error:
                self.last_error = f"{self.address}: {error.details()}"
            except BadMessage as error:
                self.last_error = f"the coordinator at {self.address} made no sense: {error}"
                logger.error("session dropped: %s", error, extra={"address": self.address})
            except asyncio.CancelledError:
                if self._closed or (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                self.last_error = f"{self.address}: the stream was cancelled"
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                logger.exception("session failed", extra={"address": self.address})
            finally:
                self._lost()
            if not self._closed and self._refused is None:
                await asyncio.sleep(backoff.next_s())

    async def _connect_and_read(self, backoff: Backoff) -> None:
        outgoing = _Outgoing(self._options.max_batch)
        async with grpc.aio.insecure_channel(self.address, options=channel_options(self._options)) as channel:
            outgoing.put((self._hello(),))
            stub: Any = session_pb2_grpc.CoordinatorStub(channel)
            call = stub.Session()
            writer = asyncio.get_running_loop().create_task(outgoing.write_to(call))
            try:
                async with asyncio.timeout(self._options.connect_timeout_s):
                    first = await call.read()
                if first is _EOF:
                    return
                welcome, rest = check_first(decode_coordinator_batch(first))
                backoff.healthy()
                self._established(welcome, outgoing)
                self._take(rest)
                while (batch := await call.read()) is not _EOF:
                    self._take(decode_coordinator_batch(batch))
            finally:
                outgoing.close()
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                call.cancel()

    def _established(self, welcome: Welcome, outgoing: _Outgoing) -> None:
        fields = {"address": self.address, "node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
        logger.info("session established", extra=fields)
        self._outgoing = outgoing
        self._on_welcome(welcome)
        self._welcome, self.last_error = welcome, ""
        self._signal()

    def _take(self, messages: list[FromCoordinator]) -> None:
        for message in messages:
            farewell(message)
            try:
                self._on_message(message)
            except Exception:
                logger.exception("a message could not be handled", extra={"message_type": type(message).__name__})

    def _lost(self) -> None:
        had, self._welcome = self._welcome, None
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            outgoing.close()
        if outgoing is not None or had is not None:
            logger.warning("session with the coordinator lost: %s", self.last_error, extra={"address": self.address})
            self._on_lost(self.last_error)

    def _note_refusal(self, error: Refused) -> None:
        self.last_error = str(error)
        if error.final:
            logger.error("session refused: %s", error, extra={"address": self.address})
            self._refused = refusal(error)
            self._signal()

    def _signal(self) -> None:
        """Wake everybody in `wait_connected`, once."""
        self._changed.set()
        self._changed = asyncio.Event()
