"""The session of an asyncio process: one bidirectional stream to the coordinator, kept up by a task.

`txrpc._grpc.session` has the theory; this is the same for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

import grpc

from txrpc._grpc.batches import TOO_SLOW, FromNode, Refused, Waiting, check_first, parse, passing
from txrpc._grpc.link import METHOD, Backoff, Link, channel_options
from txrpc._protocol.messages import Welcome
from txrpc.options import SessionOptions

__all__ = ["AsyncSession"]

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class _Outgoing:
    """What waits for one stream."""

    def __init__(self, options: SessionOptions, abandon: Callable[[str], None]) -> None:
        self.waiting = Waiting(options)
        self._abandon = abandon
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, encoded: list[bytes]) -> bool:
        """Queue *encoded*; False if the stream is over, or must be because its peer does not read: then nothing was queued."""
        if self._closed:
            return False
        self._closed = full = not self.waiting.add(encoded)
        self._ready.set()
        if full:
            self._abandon(TOO_SLOW)
        return not full

    def close(self) -> None:
        """Let `write_to` end, once what is queued has gone."""
        self._closed = True
        self._ready.set()

    async def write_to(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Write whatever is waiting as one batch, again and again."""
        while True:
            await self._ready.wait()
            while self.waiting:
                await self._write(call, self.waiting.take())
            if self._closed:
                await call.done_writing()
                return
            self._ready.clear()

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any], batch: bytes) -> None:
        try:
            passing("before", batch)
            await call.write(batch)
            passing("after", batch)
        except (grpc.RpcError, asyncio.InvalidStateError):
            raise  # the stream is over, and its reader knows why
        except Exception as error:
            # The reader would go on without a writer.
            self._abandon(f"what was to be sent could not be written: {error}")
            raise


class AsyncSession(Link):
    """See the module's docstring.

    Belongs to the event loop that it is started on: every method is called there, the callbacks too, which must not block.
    """

    _connect = "txrpc.aio.connect()"

    def _set_up(self) -> None:
        self._changed = asyncio.Event()
        self._call: Any = None
        self._welcomed_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to connect, in the background.  Once only."""
        self._check_process()
        self.last_error = f"the coordinator at {self.address} has not answered yet"
        self._task = asyncio.get_running_loop().create_task(self._run(), name="txrpc-session")

    async def drain(self) -> None:
        """See `AsyncSessionPort` of `txrpc._client.client_async`: the coordinator is elsewhere."""

    async def close(self, grace_s: float = 2.0) -> None:
        """End the session for good.  What is queued still goes out, within *grace_s* seconds.  Calling it twice is fine.

        In a forked child it does nothing: the session is the parent's.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._signal()
        if self._task is None:
            return
        if self._outgoing is not None:
            self._outgoing.close()
            await asyncio.wait({self._task}, timeout=grace_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def wait_answered(self, timeout_s: float) -> None:
        """Wait until the first attempt to connect has ended in one way or the other, at most *timeout_s* seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._answered():
                    await self._changed.wait()

    # -------------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        backoff = Backoff(self._options)
        while not self._closed and self._refused is None:
            error: BaseException | None = None
            try:
                await self._connect_and_read()
            except asyncio.CancelledError as caught:
                # gRPC says the same when the call was cancelled, and not this task.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    self._ended(caught)
                    raise
                error = caught
            except Exception as caught:
                error = caught
            lived_s = self._ended(error)
            if not self._closed and self._refused is None:
                await asyncio.sleep(backoff.next_s(lived_s, at_once=not isinstance(error, Refused)))

    async def _connect_and_read(self) -> None:
        self._abandoned = ""
        hello = self._user.hello(self)
        async with self._channel() as channel:
            outgoing = _Outgoing(self._options, self._abandon)
            outgoing.put(outgoing.waiting.encode("", (hello,)))
            call = channel.stream_stream(METHOD)()
            self._call = call
            writer = asyncio.get_running_loop().create_task(outgoing.write_to(call), name="txrpc-session-writer")
            try:
                welcome, rest = await self._first(call)
                self._established(welcome, outgoing)
                self._deliver(welcome.owner.node, rest)
                while (data := await call.read()) is not _EOF:
                    self._deliver(welcome.owner.node, parse(data))
            finally:
                outgoing.close()
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _channel(self) -> Any:
        options = channel_options(self._options)
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self._credentials, options=options)

    async def _first(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> tuple[Welcome, list[FromNode]]:
        # Bounds the whole attempt: connecting, the handshake, and a coordinator that never says Welcome.
        async with asyncio.timeout(self._options.connect_timeout_s):
            data: Any = await call.read()
        return check_first(parse(data) if data is not _EOF else [])

    def _abandon(self, text: str) -> None:
        self._abandoned = text
        self._call.cancel()

    def _established(self, welcome: Welcome, outgoing: _Outgoing) -> None:
        outgoing.waiting.max_bytes = self._limit(welcome)
        self._log_established(welcome)
        self._welcomed_at = asyncio.get_running_loop().time()
        self._outgoing = outgoing
        self._user.on_welcome(self, welcome)
        # Last: code that waits for the session finds that all callbacks have run.
        self._welcome, self.last_error = welcome, ""
        self._signal()

    def _ended(self, error: BaseException | None) -> float:
        """Note that the stream, or the attempt at one, is over; return for how many seconds it was established."""
        established, self._outgoing, self._welcome = self._outgoing is not None, None, None
        self._note_end(error)
        self._signal()
        self._log_end(established)
        return asyncio.get_running_loop().time() - self._welcomed_at if established else 0.0

    def _signal(self) -> None:
        """Wake every waiter in `wait_connected`, once."""
        self._changed.set()
        self._changed = asyncio.Event()
