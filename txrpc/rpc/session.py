"""The session of a synchronous process: one bidirectional stream to the coordinator, kept up by a daemon thread.

How to think of it
    The thread connects, says Hello, waits for the Welcome and then reads until the stream ends; then it reports the loss, waits
    a little and connects anew.  gRPC pulls what is to be sent from an iterator, which hands out everything that is
    waiting as one batch.

    What was queued for a stream that broke is dropped.  Nothing is lost by that: whoever waits for an answer asks for the
    outcome on the next session, and branches in doubt ask again on every welcome.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from txrpc.errors import BadMessage, ConfigurationError, CoordinatorUnavailable, ForkedError
from txrpc.options import DEFAULTS, SessionOptions
from txrpc.protocol.messages import FromCoordinator, Hello, ToCoordinator, Welcome
from txrpc.rpc.link import Backoff, Refused, channel_options, check_first, farewell, refusal
from txrpc.wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc.wire.v1 import session_pb2, session_pb2_grpc

__all__ = ["Session"]

logger = logging.getLogger("txrpc.rpc")


class _Outgoing:
    """The messages of one stream, as the iterator that gRPC pulls batches from."""

    def __init__(self, max_batch: int) -> None:
        self._queue: deque[ToCoordinator] = deque()
        self._changed = threading.Condition()
        self._max_batch = max_batch
        self._closed = False

    def put(self, messages: tuple[ToCoordinator, ...]) -> bool:
        """Queue *messages* in order; False if the stream is over."""
        with self._changed:
            if self._closed:
                return False
            self._queue.extend(messages)
            self._changed.notify()
            return True

    def close(self) -> None:
        """End the iterator.  What is queued goes out first if the stream still lives."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[session_pb2.ProcessBatch]:
        return self

    def __next__(self) -> session_pb2.ProcessBatch:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                raise StopIteration
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
        return encode_to_coordinator(batch)


class Session:
    """See the module's docstring.  `send` is for any thread; the callbacks run on the session's own and must not block."""

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
        self._changed = threading.Condition()
        self._outgoing: _Outgoing | None = None
        self._welcome: Welcome | None = None
        self._refused: ConfigurationError | None = None
        self._closed = False
        self._call: Any = None
        self.last_error = "it has not been started"
        self._thread = threading.Thread(target=self._run, name="txrpc-session", daemon=True)

    @property
    def welcome(self) -> Welcome | None:
        """What the coordinator said on the live session; None while there is none."""
        return self._welcome

    def start(self) -> None:
        """Begin to connect, in the background."""
        self.last_error = f"the coordinator at {self.address} has not answered yet"
        self._thread.start()

    def close(self, grace_s: float = 2.0) -> None:
        """End the session for good.  What is queued still goes out, within *grace_s* seconds.  Calling it twice is fine."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            outgoing, call = self._outgoing, self._call
            self._changed.notify_all()
        if outgoing is not None:
            outgoing.close()
        if self._thread.is_alive():
            self._thread.join(grace_s)
            if self._thread.is_alive() and call is not None:
                call.cancel()
                self._thread.join(grace_s)

    def send(self, *messages: ToCoordinator) -> None:
        """Queue *messages*, in this order; never blocks.

        Raises `CoordinatorUnavailable` when there is no session (nothing was queued), `ForkedError` in a forked child.
        """
        if os.getpid() != self._pid:
            raise ForkedError("this session belongs to the parent process: call txrpc.connect() in the child")
        outgoing = self._outgoing
        if outgoing is None or not outgoing.put(messages):
            raise CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")

    def wait_connected(self, timeout_s: float) -> Welcome:
        """Wait for a session, at most *timeout_s* seconds.

        Raises `CoordinatorUnavailable` with the last error, `ConfigurationError` if the coordinator will never have this process.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._welcome is None:
                if self._refused is not None:
                    raise self._refused
                left_s = until - time.monotonic()
                if left_s <= 0 or self._closed:
                    raise CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")
                self._changed.wait(left_s)
            return self._welcome

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        backoff = Backoff(self._options)
        while not self._closed:
            try:
                self._connect_and_read(backoff)
                self.last_error = "the coordinator ended the stream"
            except Refused as error:
                self._note_refusal(error)
            except grpc.RpcError as error:
                self.last_error = f"{self.address}: {error.details()}"
            except BadMessage as error:
                self.last_error = f"the coordinator at {self.address} made no sense: {error}"
                logger.error("session dropped: %s", error, extra={"address": self.address})
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                logger.exception("session failed", extra={"address": self.address})
            self._lost()
            with self._changed:
                if self._refused is not None:
                    return
                if not self._closed:
                    self._changed.wait(backoff.next_s())

    def _connect_and_read(self, backoff: Backoff) -> None:
        outgoing = _Outgoing(self._options.max_batch)
        with grpc.insecure_channel(self.address, options=channel_options(self._options)) as channel:
            outgoing.put((self._hello(),))
            self._call = session_pb2_grpc.CoordinatorStub(channel).Session(outgoing)
            # Bounds the whole first attempt: connecting, the handshake, and a coordinator that never says Welcome.
            guard = threading.Timer(self._options.connect_timeout_s, self._call.cancel)
            guard.daemon = True
            guard.start()
            try:
                first = next(self._call, None)
                guard.cancel()
                if first is None:
                    return
                welcome, rest = check_first(decode_coordinator_batch(first))
                backoff.healthy()
                self._established(welcome, outgoing)
                self._take(rest)
                for batch in self._call:
                    self._take(decode_coordinator_batch(batch))
            finally:
                guard.cancel()
                outgoing.close()
                self._call.cancel()

    def _established(self, welcome: Welcome, outgoing: _Outgoing) -> None:
        fields = {"address": self.address, "node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
        logger.info("session established", extra=fields)
        self._outgoing = outgoing
        self._on_welcome(welcome)
        # Last: whoever waits for the session finds that everybody has been told.
        with self._changed:
            self._welcome, self.last_error = welcome, ""
            self._changed.notify_all()

    def _take(self, messages: list[FromCoordinator]) -> None:
        for message in messages:
            farewell(message)
            try:
                self._on_message(message)
            except Exception:
                logger.exception("a message could not be handled", extra={"message_type": type(message).__name__})

    def _lost(self) -> None:
        with self._changed:
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
            with self._changed:
                self._refused = refusal(error)
                self._changed.notify_all()
