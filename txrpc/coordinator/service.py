"""The session as a gRPC stream: reads batches into the engine, writes what the engine has for this process."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc

from txrpc.coordinator.engine import Engine
from txrpc.errors import BadMessage
from txrpc.protocol.events import Limits, Received, SessionOpened
from txrpc.protocol.messages import FromCoordinator, GoAway, Hello
from txrpc.wire.codec import decode_process_batch, encode_from_coordinator
from txrpc.wire.v1 import session_pb2, session_pb2_grpc

__all__ = ["SessionService"]

logger = logging.getLogger("txrpc.coordinator")

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_HELLO_S = 10.0
_BATCH_MAX = 500
_OUTBOX_MAX = 100_000


class _Mailbox:
    """The messages that wait for one session's writer."""

    def __init__(self) -> None:
        self._queue: deque[FromCoordinator] = deque()
        self._ready = asyncio.Event()
        self._closing = False

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
        self._ready.set()

    async def batches(self) -> AsyncIterator[session_pb2.CoordinatorBatch]:
        """Everything that is waiting, again and again, until `close`."""
        while True:
            await self._ready.wait()
            while self._queue:
                messages = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_MAX))]
                yield encode_from_coordinator(messages)
            if self._closing:
                return
            self._ready.clear()


class SessionService(session_pb2_grpc.CoordinatorServicer):
    """See the module's docstring."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._open = 0
        self.peers: dict[int, str] = {}

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """One process's session, until either side ends it."""
        if self._open >= self._limits.max_sessions:
            text = f"the coordinator's max_sessions is {self._limits.max_sessions}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._open += 1
        mailbox = _Mailbox()
        number = self._engine.attach(mailbox)
        self.peers[number] = context.peer()
        reader = asyncio.get_running_loop().create_task(self._read(number, context, mailbox))
        try:
            async for batch in mailbox.batches():
                await context.write(batch)
        finally:
            reader.cancel()
            self._open -= 1
            self.peers.pop(number, None)
            self._engine.detach(number)

    async def _read(self, number: int, context: Any, mailbox: _Mailbox) -> None:
        farewell = GoAway("closed", "the process ended the session", retry=True)
        try:
            await self._converse(number, context)
        except BadMessage as error:
            logger.warning(
                "session made no sense", extra={"session": number, "peer": context.peer(), "reason": str(error)}
            )
            farewell = GoAway("protocol", str(error), retry=True)
        except TimeoutError:
            farewell = GoAway("protocol", f"no Hello within {_HELLO_S:.0f} s", retry=True)
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError):
            pass  # the stream is over
        except Exception:
            logger.exception("session failed", extra={"session": number})
            farewell = GoAway("internal", "the coordinator failed on this session's messages", retry=True)
        mailbox.close(farewell)

    async def _converse(self, number: int, context: Any) -> None:
        first = await asyncio.wait_for(context.read(), _HELLO_S)
        if first is _EOF:
            return
        messages = decode_process_batch(first)
        if not messages or not isinstance(messages[0], Hello):
            raise BadMessage("the first message of a session is Hello")
        self._engine.step(SessionOpened(number, messages[0]))
        rest = messages[1:]
        while True:
            for message in rest:
                self._engine.step(Received(number, message))
            batch = await context.read()
            if batch is _EOF:
                return
            rest = decode_process_batch(batch)
