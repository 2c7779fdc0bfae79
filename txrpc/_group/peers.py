"""The other members of the group, as gRPC reaches them: what is sent, and why there was no answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

import grpc

from txrpc._group.members import Members
from txrpc._wire.v1 import peer_pb2, peer_pb2_grpc

__all__ = ["Peers"]

logger = logging.getLogger("txrpc.decision_log")

_CALL_S: Final = 5.0
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", -1),  # a snapshot of a log comes in one message
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class Peers:
    """One connection to each other member.  Thread-safe; nothing blocks."""

    def __init__(
        self, group: str, node: str, members: Members, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self.members = members
        self.names = tuple(name for name in members.names if name != node)
        self.trouble: dict[str, str] = {}
        """Why the last question had no answer, by member; those that have answered are not in it."""
        self._group = group
        self._node = node
        self.group_id = 0
        """The group's own number, once it is known."""
        self._channels: dict[str, Any] = {
            name: grpc.insecure_channel(members.addresses[name], _OPTIONS)
            if credentials is None
            else grpc.secure_channel(members.addresses[name], credentials, _OPTIONS)
            for name in self.names
        }
        self._stubs: dict[str, Any] = {
            name: peer_pb2_grpc.PeerStub(channel) for name, channel in self._channels.items()
        }

    def label(self) -> peer_pb2.PeerGroup:
        """Who asks, and of which group."""
        return peer_pb2.PeerGroup(
            name=self._group,
            members=",".join(self.members.names),
            reads=self.members.quorums.reads,
            writes=self.members.quorums.writes,
            id=self.group_id,
            sender=self._node,
        )

    def misfit(self, other: peer_pb2.PeerGroup) -> str:
        """Why one that calls itself so is none of this group's members; "" if it is one."""
        mine = self.label()
        if other.name != mine.name:
            return f"this is a member of group {mine.name!r}, not of {other.name!r}"
        if other.members != mine.members:
            return f"the members are {mine.members} here, and {other.members} there"
        if (other.reads, other.writes) != (mine.reads, mine.writes):
            return f"the quorums are {mine.reads} and {mine.writes} here, and {other.reads} and {other.writes} there"
        if other.id and mine.id and other.id != mine.id:
            return "this is a member of another group of the same name: one of the two was founded anew"
        if other.sender not in self.names:
            return f"{other.sender!r} is none of the other members" if other.sender != self._node else "this is you"
        return ""

    def ask(self, member: str, message: peer_pb2.PeerQuestion, answered: Callable[[Any], None]) -> None:
        """Send *message*; *answered* gets the answer on a thread of gRPC's, or is never called."""
        self._call(member, self._stubs[member].Ask, message, answered)

    def beat(self, member: str, message: peer_pb2.PeerBeat, answered: Callable[[Any], None]) -> None:
        """See `ask`."""
        self._call(member, self._stubs[member].Beat, message, answered)

    def found(self, member: str, stage: peer_pb2.DiskStage.ValueType, answered: Callable[[Any], None]) -> None:
        """See `ask`."""
        message = peer_pb2.FoundRequest(group=self.label(), stage=stage)
        self._call(member, self._stubs[member].Found, message, answered)

    def too_few(self) -> str:
        """Say that there is no quorum: which members do not answer, and why."""
        absent = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.trouble.items()))
        return f"too few members of the group answer: {absent or 'none has answered yet'}"

    def close(self) -> None:
        """End all connections.  Idempotent."""
        for channel in self._channels.values():
            channel.close()

    def _call(self, member: str, method: Any, message: Any, answered: Callable[[Any], None]) -> None:
        def ended(call: Any) -> None:
            error = None if call.cancelled() else call.exception()
            if error is not None:
                self._failed(member, error)
            elif not call.cancelled():
                if self.trouble.pop(member, None) is not None:
                    logger.info("peer answers", extra={"peer": member})
                answered(call.result())

        with contextlib.suppress(ValueError):  # the channel is closed: the process ends
            method.future(message, timeout=_CALL_S).add_done_callback(ended)

    def _failed(self, member: str, error: Any) -> None:
        code, details = error.code(), str(error.details() or "")
        wrong = code is grpc.StatusCode.FAILED_PRECONDITION
        reason = details if wrong else f"no answer ({code.name.lower()})"
        if self.trouble.get(member) != reason:
            self.trouble[member] = reason
            logger.log(
                logging.ERROR if wrong else logging.WARNING, "peer trouble", extra={"peer": member, "reason": reason}
            )
