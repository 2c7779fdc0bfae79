"""What the two sessions share: the pace of reconnecting, the channel's options, and what to make of a first answer."""

from __future__ import annotations

import random
from typing import Any

from txrpc.errors import BadMessage, ConfigurationError
from txrpc.options import SessionOptions
from txrpc.protocol.messages import FromCoordinator, GoAway, Welcome

__all__ = ["Backoff", "Refused", "channel_options", "check_first", "farewell"]


class Refused(Exception):
    """The coordinator ended the session with a GoAway.  `final`: connecting again cannot help."""

    def __init__(self, message: GoAway) -> None:
        self.final = not message.retry
        super().__init__(f"the coordinator ended the session: {message.text} ({message.code})")


class Backoff:
    """Random waits that grow up to a limit ("full jitter"); the first one after a healthy session is short."""

    def __init__(self, options: SessionOptions) -> None:
        self._options = options
        self._attempt = 0

    def healthy(self) -> None:
        """A session was established: begin anew."""
        self._attempt = 0

    def next_s(self) -> float:
        """How long to wait now."""
        limit: float = min(self._options.backoff_max_s, self._options.backoff_initial_s * 2**self._attempt)
        self._attempt = min(self._attempt + 1, 30)
        return limit * random.random()


def channel_options(options: SessionOptions) -> list[tuple[str, Any]]:
    """One channel an attempt, so gRPC's own reconnecting, which waits for seconds, never has a say."""
    return [
        ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.min_reconnect_backoff_ms", 1_000),
    ]


def check_first(messages: list[FromCoordinator]) -> tuple[Welcome, list[FromCoordinator]]:
    """The first batch: a Welcome and perhaps more.  Raises `Refused` or `BadMessage`."""
    for message in messages:
        farewell(message)
    if not messages or not isinstance(messages[0], Welcome):
        raise BadMessage("the first message of a coordinator is Welcome")
    return messages[0], messages[1:]


def farewell(message: FromCoordinator) -> None:
    """Raise `Refused` if *message* is the last one."""
    if isinstance(message, GoAway):
        raise Refused(message)


def refusal(error: Refused) -> ConfigurationError:
    """What a process is told that the coordinator will not have."""
    return ConfigurationError(str(error))
