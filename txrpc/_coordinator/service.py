"""The session as a gRPC stream: reads batches into the engine, writes what the engine has for this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._failpoints import active, passing
from txrpc._protocol.coordinator.events import Limits, Received, SessionOpened
from txrpc._protocol.messages import FromCoordinator, GoAway, Hello
from txrpc._wire.codec import decode_process_batch, encode_from_coordinator
from txrpc._wire.v1 import session_pb2, session_pb2_grpc
from txrpc.errors import BadMessage

__all__ = ["ServerContext", "SessionService"]

ServerContext = grpc.aio.ServicerContext[Any, Any]
logger = logging.getLogger("txrpc.coordinator")

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_HELLO_S = 10.0
_BATCH_MAX = 500
_OUTBOX_MAX = 100_000
_QUESTIONS_MAX = 1_000
_FAREWELL_S = 2.0
_BREATH_S = 0.02


class _Mailbox:
    """The messages that wait for one session's writer."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._queue: deque[FromCoordinator] = deque()
        self._ready = asyncio.Event()
        self._closing = False
        self.patience: asyncio.Timeout | None = None
        """Over the writing of `batches`: none until `close`, then a little, for a reader that does not read."""

    def put(self, message: FromCoordinator) -> None:
        """See `Outbox`.  A reader too slow for its own traffic is let go: it will ask again when it comes back."""
        if self._closing:
            return
        self._queue.append(message)
        if len(self._queue) > _OUTBOX_MAX:
            self._queue.clear()
            self.close(GoAway("slow", f"more than {_OUTBOX_MAX} messages were waiting to be read", retry=True))
        self._ready.set()

    def close(self, farewell: GoAway) -> None:
        """See `Outbox`."""
        if not self._closing:
            self._closing = True
            self._queue.append(farewell)
            if self.patience is not None:
                with contextlib.suppress(RuntimeError):  # everything is written already
                    self.patience.reschedule(asyncio.get_running_loop().time() + _FAREWELL_S)
        self._ready.set()

    async def batches(self) -> AsyncIterator[session_pb2.CoordinatorBatch]:
        """Everything that is waiting, again and again, until `close`."""
        while True:
            await self._ready.wait()
            while self._queue:
                messages = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_MAX))]
                if active():
                    passing("before", messages)
                yield encode_from_coordinator(self._node, messages)
                if active():
                    passing("after", messages)
            if self._closing:
                return
            self._ready.clear()


class SessionService(session_pb2_grpc.CoordinatorServicer):
    """See the module's docstring."""

    def __init__(self, driver: CoordinatorDriver, limits: Limits) -> None:
        self._driver = driver
        self._limits = limits
        self.open = 0
        self.peers: dict[int, str] = {}

    async def Session(self, request_iterator: AsyncIterator[Any], context: ServerContext) -> None:  # type: ignore[override]
        """One process's session, until either side ends it."""
        if self.open >= self._limits.max_sessions:
            text = f"the coordinator's max_sessions is {self._limits.max_sessions}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self.open += 1
        try:
            read_it_all = await self._serve(context)
            if not read_it_all:
                # This waits until the process reads or its connection ends, with a slot but no longer as a session.
                with contextlib.suppress(grpc.aio.InternalError):  # raised when the connection ended first
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the session's messages were not read")
        finally:
            self.open -= 1

    async def _serve(self, context: ServerContext) -> bool:
        """The session as the engine sees it; returns whether everything could be written."""
        mailbox = _Mailbox(self._driver.core.state.owner.node)
        number = self._driver.attach(mailbox)
        self.peers[number] = context.peer()
        reader = asyncio.get_running_loop().create_task(self._read(number, context, mailbox))
        try:
            async with asyncio.timeout(None) as mailbox.patience:
                async for batch in mailbox.batches():
                    await context.write(batch)
        except TimeoutError:
            logger.warning("session did not read", extra={"session": number, "peer": context.peer()})
            return False
        finally:
            mailbox.patience = None  # it is over; the reader may still send a farewell, which is dropped
            reader.cancel()
            self.peers.pop(number, None)
            self._driver.detach(number)
        return True

    async def _read(self, number: int, context: ServerContext, mailbox: _Mailbox) -> None:
        farewell = GoAway("closed", "the process ended the session", retry=True)
        try:
            await self._converse(number, context)
        except (BadMessage, DecodeError) as error:
            reason = str(error) if isinstance(error, BadMessage) else "what was sent is no batch of messages"
            logger.warning("session made no sense", extra={"session": number, "peer": context.peer(), "reason": reason})
            farewell = GoAway("protocol", reason, retry=True)
        except TimeoutError:
            farewell = GoAway("protocol", f"no Hello within {_HELLO_S:.0f} s", retry=True)
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError):
            pass  # the stream is over
        except Exception:
            logger.exception("session failed", extra={"session": number})
            farewell = GoAway("internal", "the coordinator failed on this session's messages", retry=True)
        mailbox.close(farewell)

    async def _converse(self, number: int, context: ServerContext) -> None:
        first = await asyncio.wait_for(context.read(), _HELLO_S)
        if first is _EOF:
            return
        items = decode_process_batch(first)
        if not items or not isinstance(items[0][1], Hello):
            raise BadMessage("the first message of a session is Hello")
        self._driver.step(SessionOpened(number, items[0][1]))
        rest = items[1:]
        while True:
            for node, message in rest:
                self._driver.step(Received(number, node, message))
            while self._driver.book.questions[number] > _QUESTIONS_MAX:
                await asyncio.sleep(_BREATH_S)  # not read meanwhile: gRPC's flow control holds the process back
            batch = await context.read()
            if batch is _EOF:
                return
            rest = decode_process_batch(batch)
