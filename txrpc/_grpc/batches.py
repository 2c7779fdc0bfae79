"""Batches of a session: what waits to be sent, and what has arrived.

Messages are encoded where they are sent and wait as bytes.  That works because protobuf messages that are written one behind the
other read as one message with all their items, so a batch is a join of what is waiting: its size is known exactly, and a message
that is too large fails its own sender instead of the stream that all share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from txrpc import _failpoints as failpoints
from txrpc._protocol.messages import FromCoordinator, GoAway, ToCoordinator, Welcome
from txrpc._wire.codec import decode_coordinator_batch, decode_process_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2
from txrpc.errors import BadMessage, LimitExceeded
from txrpc.options import SessionOptions

__all__ = [
    "TOO_SLOW",
    "WAITING_MAX",
    "FromNode",
    "Queue",
    "Refused",
    "Waiting",
    "check_first",
    "farewell",
    "parse",
    "passing",
]

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


class Queue(Protocol):
    """What waits for one stream."""

    waiting: Waiting

    def put(self, encoded: list[bytes]) -> bool:
        """Queue *encoded*; False if the stream is over, or must be because its peer does not read: then nothing was queued."""

    def close(self) -> None:
        """Let the stream end, once what is queued has gone."""


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
