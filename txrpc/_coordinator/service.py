"""The session as a gRPC stream: reads batches into the coordinators of this process, writes what they have for the other one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._coordinator.host import Host
from txrpc._failpoints import active, passing
from txrpc._protocol.coordinator.events import Limits, Received, SessionOpened
from txrpc._protocol.messages import FromCoordinator, GoAway, Hello, Takeover, ToCoordinator
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
    """The messages that wait for one stream's writer, each with the node that says it."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._queue: deque[tuple[str, FromCoordinator]] = deque()
        self._ready = asyncio.Event()
        self._closing = False
        self.patience: asyncio.Timeout | None = None
        """Over the writing of `batches`: none until `close`, then a little, for a reader that does not read."""

    def put(self, node: str, message: FromCoordinator) -> None:
        """See `Outbox`.  A reader too slow for its own traffic is let go: it will ask again when it comes back."""
        if self._closing:
            return
        self._queue.append((node, message))
        if len(self._queue) > _OUTBOX_MAX:
            self._queue.clear()
            self.close(GoAway("slow", f"more than {_OUTBOX_MAX} messages were waiting to be read", retry=True))
        self._ready.set()

    def close(self, farewell: GoAway) -> None:
        """End the stream after *farewell*."""
        if not self._closing:
            self._closing = True
            self._queue.append((self._home, farewell))
            if self.patience is not None:
                with contextlib.suppress(RuntimeError):  # everything is written already
                    self.patience.reschedule(asyncio.get_running_loop().time() + _FAREWELL_S)
        self._ready.set()

    async def batches(self) -> AsyncIterator[session_pb2.CoordinatorBatch]:
        """Everything that is waiting, again and again, until `close`."""
        while True:
            await self._ready.wait()
            while self._queue:
                node, messages = self._take()
                if active():
                    passing("before", messages)
                yield encode_from_coordinator(node, messages)
                if active():
                    passing("after", messages)
            if self._closing:
                return
            self._ready.clear()

    def _take(self) -> tuple[str, list[FromCoordinator]]:
        """The next messages of one node; nearly always there is no other."""
        node, first = self._queue.popleft()
        messages = [first]
        while self._queue and self._queue[0][0] == node and len(messages) < _BATCH_MAX:
            messages.append(self._queue.popleft()[1])
        return node, messages


class _Part:
    """What one coordinator of this process has of a stream: a session of its own."""

    def __init__(self, stream: _Stream, driver: CoordinatorDriver) -> None:
        self._stream = stream
        self.driver = driver
        self.number = driver.attach(self)

    def put(self, message: FromCoordinator) -> None:
        """See `Outbox`."""
        self._stream.mailbox.put(self.driver.node, message)

    def close(self, farewell: GoAway) -> None:
        """See `Outbox`.  A guest leaves the stream, which goes on."""
        self._stream.part_ended(self, farewell)


class _Stream:
    """One stream, and the sessions on it by node."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.home = host.home
        self.mailbox = _Mailbox(self.home.node)
        self.parts: dict[str, _Part] = {}
        self._announced: set[str] = set()
        """Guests that the process was told of.  What comes for one that is here no more is too late, and no mistake."""

    @property
    def numbers(self) -> list[int]:
        """The sessions' numbers."""
        return [part.number for part in self.parts.values()]

    @property
    def questions(self) -> int:
        """Questions to logs that have no answer yet."""
        return max((part.driver.book.questions[part.number] for part in self.parts.values()), default=0)

    def begin(self, hello: Hello) -> None:
        """The process has said Hello: its session with the home begins, and it is told of the guests."""
        if self.home.over.done():
            self.mailbox.close(GoAway("opening", "the coordinator is opening its log", retry=True))
            return
        self._open(self.home, hello)
        for guest in self._host.guests.values():
            self.taken_over(guest)
        self._host.listeners.add(self)

    def taken_over(self, guest: CoordinatorDriver) -> None:
        """See `Listener`."""
        self._announced.add(guest.node)
        self.mailbox.put(guest.node, Takeover())

    def received(self, node: str, message: ToCoordinator) -> None:
        """Give a message to the coordinator that it is for; what is for none of them, to the home, which says so."""
        guest = self._host.guests.get(node)
        if guest is not None and node not in self.parts and isinstance(message, Hello):
            self._open(guest, message)
            return
        part = self.parts.get(node if node in self._announced else self.home.node)
        if part is not None:
            part.driver.step(Received(part.number, node, message))

    def part_ended(self, part: _Part, farewell: GoAway) -> None:
        """A coordinator has ended its session."""
        if part.driver is self.home:
            self.mailbox.close(farewell)
        elif self.parts.get(part.driver.node) is part:
            del self.parts[part.driver.node]
            self.mailbox.put(part.driver.node, farewell)
            # Not at once: the coordinator is in the middle of a step.
            asyncio.get_running_loop().call_soon(part.driver.detach, part.number)

    def end(self) -> None:
        """The stream is over."""
        self._host.listeners.discard(self)
        for part in list(self.parts.values()):
            part.driver.detach(part.number)
        self.parts.clear()

    def _open(self, driver: CoordinatorDriver, hello: Hello) -> None:
        part = self.parts[driver.node] = _Part(self, driver)
        driver.step(SessionOpened(part.number, hello))


class SessionService(session_pb2_grpc.CoordinatorServicer):
    """See the module's docstring."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self._host = host
        self._limits = limits
        self.open = 0
        self.batches: Counter[str] = Counter()
        """Batches that were received and sent."""
        self._streams: dict[_Stream, str] = {}

    @property
    def peers(self) -> dict[int, str]:
        """Where each session comes from."""
        return {number: peer for stream, peer in self._streams.items() for number in stream.numbers}

    async def Session(self, request_iterator: AsyncIterator[Any], context: ServerContext) -> None:  # type: ignore[override]
        """One process's session, until either side ends it."""
        if self.open >= self._limits.max_sessions:
            text = f"the coordinator's max_sessions is {self._limits.max_sessions}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if not self._host.opened or self._host.home.over.done():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is opening its log")
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
        """The session as the coordinators see it; returns whether everything could be written."""
        stream = _Stream(self._host)
        mailbox = stream.mailbox
        self._streams[stream] = context.peer()
        reader = asyncio.get_running_loop().create_task(self._read(stream, context))
        try:
            async with asyncio.timeout(None) as mailbox.patience:
                async for batch in mailbox.batches():
                    self.batches["sent"] += 1
                    await context.write(batch)
        except TimeoutError:
            logger.warning("session did not read", extra={"peer": context.peer()})
            return False
        finally:
            mailbox.patience = None  # it is over; the reader may still send a farewell, which is dropped
            reader.cancel()
            del self._streams[stream]
            stream.end()
        return True

    async def _read(self, stream: _Stream, context: ServerContext) -> None:
        farewell = GoAway("closed", "the process ended the session", retry=True)
        try:
            await self._converse(stream, context)
        except (BadMessage, DecodeError) as error:
            reason = str(error) if isinstance(error, BadMessage) else "what was sent is no batch of messages"
            logger.warning("session made no sense", extra={"peer": context.peer(), "reason": reason})
            farewell = GoAway("protocol", reason, retry=True)
        except TimeoutError:
            farewell = GoAway("protocol", f"no Hello within {_HELLO_S:.0f} s", retry=True)
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError):
            pass  # the stream is over
        except Exception:
            logger.exception("session failed", extra={"peer": context.peer()})
            farewell = GoAway("internal", "the coordinator failed on this session's messages", retry=True)
        stream.mailbox.close(farewell)

    async def _converse(self, stream: _Stream, context: ServerContext) -> None:
        first = await asyncio.wait_for(context.read(), _HELLO_S)
        if first is _EOF:
            return
        self._take_in(first)
        items = decode_process_batch(first)
        if not items or not isinstance(items[0][1], Hello):
            raise BadMessage("the first message of a session is Hello")
        stream.begin(items[0][1])
        rest = items[1:]
        while True:
            for node, message in rest:
                stream.received(node, message)
            while stream.questions > _QUESTIONS_MAX:
                await asyncio.sleep(_BREATH_S)  # not read meanwhile: gRPC's flow control holds the process back
            batch = await context.read()
            if batch is _EOF:
                return
            self._take_in(batch)
            rest = decode_process_batch(batch)

    def _take_in(self, batch: session_pb2.ProcessBatch) -> None:
        """Count it; refuse what is too long, as gRPC does, unless this server takes longer messages of its peers."""
        self.batches["received"] += 1
        if batch.ByteSize() > self._limits.max_message_bytes:
            raise BadMessage(
                f"a batch of {batch.ByteSize():,} bytes: max_message_bytes is {self._limits.max_message_bytes:,}"
            )
