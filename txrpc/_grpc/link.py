"""What the two sessions share: the pace of reconnecting, and what to make of the stream's end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from typing import Any, Final, Protocol

import grpc

from txrpc._grpc.batches import FromNode, Queue, Refused, farewell
from txrpc._protocol.messages import FromCoordinator, Hello, ToCoordinator, Welcome
from txrpc._wire.v1 import session_pb2
from txrpc.errors import BadMessage, CoordinatorUnavailable, ForkedError
from txrpc.options import DEFAULTS, SessionOptions

__all__ = ["METHOD", "Backoff", "Link", "channel_options"]

logger = logging.getLogger("txrpc.session")

METHOD: Final = f"/{session_pb2.DESCRIPTOR.services_by_name['Coordinator'].full_name}/Session"


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


class SessionUser(Protocol):
    """What a session is for: a client's core.  Each method is called with the session as its first argument."""

    def hello(self, session: Link) -> Hello:
        """Return what to say first; asked on every attempt."""

    def on_welcome(self, session: Link, welcome: Welcome) -> None:
        """A session was established; `send` works from here on.  If it raises, the session is dropped."""

    def on_message(self, session: Link, node: str, message: FromCoordinator) -> None:
        """A message of coordinator *node* arrived, in order.  What it raises is logged."""

    def on_lost(self, session: Link, text: str) -> None:
        """The established session has ended, with the reason for people.  What it raises is logged."""

    def on_refused(self, session: Link) -> None:
        """The coordinator will never have this process; `trouble` says why."""


class Link:
    """The half of a session that neither blocks nor awaits: who is told what, and what is known of the coordinator."""

    _connect = ""
    """What to call in a forked child; set by each session."""

    def __init__(
        self,
        address: str,
        user: SessionUser,
        *,
        options: SessionOptions = DEFAULTS,
        channel_credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Make a session; `start` begins to connect.

        address: ``host:port`` of the coordinator.
        channel_credentials: for TLS; None connects in the clear.
        """
        self.address = address
        self.last_error = "it has not been started"
        self._user = user
        self._options = options
        self._credentials = channel_credentials
        self._pid = os.getpid()
        self._welcome: Welcome | None = None
        self._outgoing: Queue | None = None
        self._tried = False
        self._refused: str | None = None
        self._reported = ""
        self._abandoned = ""
        self._closed = False
        self._set_up()

    def _set_up(self) -> None:
        """What each session has besides."""
        raise NotImplementedError

    @property
    def trouble(self) -> str:
        """Return why the session is not open; "" if it is."""
        return self.last_error

    @property
    def refused(self) -> bool:
        """Return whether the coordinator will never have this process."""
        return self._refused is not None

    @property
    def over(self) -> bool:
        """Return whether the session will not be open again."""
        return self._closed or self._refused is not None

    def send(self, node: str, *messages: ToCoordinator) -> None:
        """Queue *messages* to coordinator *node*, in this order; never blocks.

        Raises, and then nothing was queued: `CoordinatorUnavailable` when there is no session, `LimitExceeded` for a message that
        is too large for it, `ForkedError` in a forked child.
        """
        self._check_process()
        outgoing = self._outgoing
        if outgoing is None or not outgoing.put(outgoing.waiting.encode(node, messages)):
            raise self._unavailable()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                "this session belongs to the process that was forked: "
                f"call {self._connect} in the child, and best only there "
                "(multiprocessing: in the function that it runs; gunicorn: in post_fork)"
            )

    def _unavailable(self) -> CoordinatorUnavailable:
        return CoordinatorUnavailable(f"no session with the coordinator: {self.last_error}")

    def _answered(self) -> bool:
        """Whether the first attempt to connect has ended, or succeeded, or there will be none."""
        return self._tried or self._welcome is not None or self.over

    def _limit(self, welcome: Welcome) -> int:
        """The largest batch to send: 0 of a coordinator means that it does not say."""
        return min(self._options.max_message_bytes, welcome.max_message_bytes or self._options.max_message_bytes)

    def _deliver(self, home: str, items: list[FromNode]) -> None:
        """Hand on what has arrived; raises `Refused` if the coordinator of the address, *home*, said goodbye."""
        for node, message in items:
            if node == home:
                farewell(message)
            try:
                self._user.on_message(self, node, message)
            except Exception:
                logger.exception("a message could not be handled", extra={"message_type": type(message).__name__})

    def _log_established(self, welcome: Welcome) -> None:
        self._reported = ""
        fields = {"address": self.address, "node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
        logger.info("session established", extra=fields)

    def _note_end(self, error: BaseException | None) -> None:
        """The stream, or the attempt at one, is over: keep why.  Whether to go on is in `_refused` and `_closed`."""
        self._tried = True
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
                self._user.on_lost(self, self.last_error)
            except Exception:
                logger.exception("the loss of the session could not be handled")
        if self._refused is not None:
            self._user.on_refused(self)

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
