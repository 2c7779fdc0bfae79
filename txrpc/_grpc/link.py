"""What the two sessions share: what waits to be sent, the pace of reconnecting, and what to make of the stream's end.

Messages are encoded where they are sent and wait as bytes.  That works because protobuf messages that are written one behind the
other read as one message with all their items, so a batch is a join of what is waiting: its size is known exactly, and a message
that is too large fails its own sender instead of the stream that all share.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from txrpc import _failpoints as failpoints
from txrpc._protocol.messages import FromCoordinator, GoAway, Hello, ToCoordinator, Welcome
from txrpc._wire.codec import decode_coordinator_batch, decode_process_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2
from txrpc.errors import BadMessage, ConfigurationError, CoordinatorUnavailable, ForkedError, LimitExceeded
from txrpc.options import DEFAULTS, SessionOptions

__all__ = [
    "METHOD",
    "TOO_SLOW",
    "WAITING_MAX",
    "Backoff",
    "FromNode",
    "Link",
    "Refused",
    "Waiting",
    "channel_options",
    "check_first",
    "farewell",
    "parse",
    "passing",
]

logger = logging.getLogger("txrpc.session")

METHOD: Final = f"/{session_pb2.DESCRIPTOR.services_by_name['Coordinator'].full_name}/Session"

FromNode = tuple[str, FromCoordinator]
"""A message, and the node of the coordinator that says it."""

WAITING_MAX: Final = 100_000
"""Messages that may wait for one stream.  The coordinator has the same limit in its direction."""

TOO_SLOW: Final = f"{WAITING_MAX} messages were waiting: the coordinator does not read"


class Refused(Exception):
    """The coordinator ended the session with a GoAway.  `final`: connecting again cannot help."""

    def __init__(self, message: GoAway) -> None:
        self.final = not message.retry
        super().__init__(f"the coordinator ended the session: {message.text} ({message.code})")


class Backoff:
    """Random waits that grow up to a limit ("full jitter"), so that many processes do not come back in one moment."""

    def __init__(self, options: SessionOptions) -> None:
        self._options = options
        self._attempt = 0

    def next_s(self, lived_s: float, *, at_once: bool = True) -> float:
        """Return how long to wait now, after a session that lasted *lived_s* seconds (0: there was none).

        After a healthy one the first attempt needs no wait, unless *at_once* is False: the coordinator asked us to leave.
        """
        if lived_s > self._options.backoff_max_s:
            self._attempt = 0
            if at_once:
                return 0.0
        limit: float = min(self._options.backoff_max_s, self._options.backoff_initial_s * 2**self._attempt)
        self._attempt = min(self._attempt + 1, 30)
        return limit * random.random()


class Waiting:
    """Encoded messages that wait for one stream, in order.  Not thread-safe: each session guards it in its own way."""

    def __init__(self, options: SessionOptions) -> None:
        self._queue: deque[bytes] = deque()
        self._max_batch = options.max_batch
        self.max_bytes = options.max_message_bytes

    def encode(self, node: str, messages: Iterable[ToCoordinator]) -> list[bytes]:
        """*messages* to coordinator *node*, each as a batch of its own; raises `LimitExceeded` for one that is too large."""
        encoded = []
        for message in messages:
            data = encode_to_coordinator(node, (message,)).SerializeToString()
            if len(data) > self.max_bytes:
                name = type(message).__name__
                raise LimitExceeded(f"{name} takes {len(data)} bytes; max_message_bytes allows {self.max_bytes}")
            encoded.append(data)
        return encoded

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, encoded: list[bytes]) -> bool:
        """Queue *encoded*; False, and forget everything, if so much is waiting that the other side cannot be reading."""
        if len(self._queue) >= WAITING_MAX:
            self._queue.clear()
            return False
        self._queue.extend(encoded)
        return True

    def take(self) -> bytes:
        """The next batch: everything that is waiting, within the limits.  There must be something."""
        queue = self._queue
        batch = [queue.popleft()]
        size = len(batch[0])
        while queue and len(batch) < self._max_batch:
            size += len(queue[0])
            if size > self.max_bytes:
                break
            batch.append(queue.popleft())
        return b"".join(batch)


class Link:
    """The half of a session that neither blocks nor awaits: who is told what, and what is known of the coordinator."""

    _connect = ""
    """What to call in a forked child; set by each session."""

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], Hello],
        on_welcome: Callable[[Welcome], None],
        on_message: Callable[[str, FromCoordinator], None],
        on_lost: Callable[[str], None],
        options: SessionOptions = DEFAULTS,
        channel_credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Make a session; `start` begins to connect.

        address: ``host:port`` of the coordinator.
        hello: what to say first; asked on every attempt.
        on_welcome: a session was established; `send` works from here on.  If it raises, the session is dropped.
        on_message: a message of a coordinator arrived, in order: its node, and the message.  What it raises is logged.
        on_lost: the established session has ended, with the reason for people.  What it raises is logged.
        channel_credentials: for TLS; None connects in the clear.
        """
        self.address = address
        self.last_error = "it has not been started"
        self._hello = hello
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._on_lost = on_lost
        self._options = options
        self._credentials = channel_credentials
        self._pid = os.getpid()
        self._welcome: Welcome | None = None
        self._refused: str | None = None
        self._reported = ""
        self._abandoned = ""
        self._closed = False
        self._set_up()

    def _set_up(self) -> None:
        """What each session has besides."""
        raise NotImplementedError

    @property
    def welcome(self) -> Welcome | None:
        """Return what the coordinator said on the live session; None while there is none."""
        return self._welcome

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                "this session belongs to the process that was forked: "
                f"call {self._connect} in the child, and best only there "
                "(multiprocessing: in the function that it runs; gunicorn: in post_fork)"
            )

    def _unavailable(self) -> CoordinatorUnavailable:
        return CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")

    def _found(self) -> Welcome | None:
        """The welcome, or None while there may yet be one; raises what `wait_connected` raises."""
        if self._welcome is None and self._refused is not None:
            raise ConfigurationError(self._refused)
        if self._welcome is None and self._closed:
            raise self._unavailable()
        return self._welcome

    def _limit(self, welcome: Welcome) -> int:
        """The largest batch to send: 0 of a coordinator means that it does not say."""
        return min(self._options.max_message_bytes, welcome.max_message_bytes or self._options.max_message_bytes)

    def _deliver(self, items: list[FromNode]) -> None:
        """Hand on what has arrived; raises `Refused` if the coordinator said goodbye."""
        for node, message in items:
            farewell(message)
            try:
                self._on_message(node, message)
            except Exception:
                logger.exception("a message could not be handled", extra={"message_type": type(message).__name__})

    def _log_established(self, welcome: Welcome) -> None:
        self._reported = ""
        fields = {"address": self.address, "node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
        logger.info("session established", extra=fields)

    def _note_end(self, error: BaseException | None) -> None:
        """The stream, or the attempt at one, is over: keep why.  Whether to go on is in `_refused` and `_closed`."""
        if self._closed:
            self.last_error = "this process has closed its session"
        elif self._abandoned:
            self.last_error = self._abandoned
        elif error is None:
            self.last_error = f"the coordinator at {self.address} ended the stream"
        else:
            self.last_error = self._why(error)
        if isinstance(error, Refused) and error.final:
            self._refused = self.last_error

    def _log_end(self, established: bool) -> None:
        """Report what `_note_end` kept, and the loss to `on_lost` if there was a session to lose.

        The same trouble, attempt after attempt, is one line in the log and not thousands.
        """
        level = logging.WARNING
        if self._closed or self.last_error == self._reported:
            level = logging.DEBUG
        elif self._refused is not None:
            level = logging.ERROR
        what = "session with the coordinator lost" if established else "cannot connect to the coordinator"
        logger.log(level, "%s: %s", what, self.last_error, extra={"address": self.address})
        self._reported = self.last_error
        if established:
            try:
                self._on_lost(self.last_error)
            except Exception:
                logger.exception("the loss of the session could not be handled")

    def _why(self, error: BaseException) -> str:
        """Return what went wrong, for people.  A mistake of ours is logged with its traceback."""
        if isinstance(error, Refused):
            return str(error)
        if isinstance(error, BadMessage):
            return f"what the coordinator at {self.address} sent made no sense: {error}"
        if isinstance(error, asyncio.CancelledError):
            return f"{self.address}: the stream was cancelled"
        if isinstance(error, TimeoutError):
            return f"{self.address}: no answer within {self._options.connect_timeout_s:g} s"
        if isinstance(error, grpc.RpcError):
            status: Any = error
            if status.code() is grpc.StatusCode.UNIMPLEMENTED:
                return f"{self.address} is a gRPC server, but no coordinator: {status.details()}"
            return f"{self.address}: {status.details()} ({status.code().name})"
        logger.error("the session failed", exc_info=error, extra={"address": self.address})
        return f"{type(error).__name__}: {error}"


def channel_options(options: SessionOptions) -> list[tuple[str, Any]]:
    """One channel an attempt, so gRPC's own reconnecting, which waits for seconds, never has a say."""
    return [
        ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keepalive_timeout_s * 1000)),
        # The time-out above alone was not honoured (grpcio 1.85): a probe went unanswered for the 60 s of this one.
        ("grpc.http2.ping_timeout_ms", int(options.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.min_reconnect_backoff_ms", int(options.connect_timeout_s * 1000)),
    ]


def passing(when: str, data: bytes) -> None:
    """The failpoints of the messages in a batch that goes out."""
    if failpoints.active():
        items = decode_process_batch(session_pb2.ProcessBatch.FromString(data))
        failpoints.passing(when, [message for _, message in items])


def parse(data: bytes) -> list[FromNode]:
    """The messages of one batch, each with its node; raises `BadMessage`.

    Not left to gRPC, which would only log what was wrong.
    """
    try:
        batch = session_pb2.CoordinatorBatch.FromString(data)
    except DecodeError as error:
        raise BadMessage(f"not a batch: {error}") from None
    return decode_coordinator_batch(batch)


def check_first(items: list[FromNode]) -> tuple[Welcome, list[FromNode]]:
    """The first batch: a Welcome and perhaps more.  Raises `Refused` or `BadMessage`."""
    node, message = items[0] if items else ("", None)
    if message is not None:
        farewell(message)
    if not isinstance(message, Welcome):
        raise BadMessage("the first message of a coordinator is Welcome")
    if node != message.owner.node:
        raise BadMessage(f"node {node} welcomes in the name of {message.owner.node}")
    return message, items[1:]


def farewell(message: FromCoordinator) -> None:
    """Raise `Refused` if *message* is the last one."""
    if isinstance(message, GoAway):
        raise Refused(message)
