"""The other members of the group, as gRPC reaches them: what is sent, and why there was no answer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc

from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.inbox import Inbox
from txrpc._group.members import tolerance
from txrpc._protocol.quorum.views import View
from txrpc._wire.commands import view_to
from txrpc._wire.v1 import peer_pb2, peer_pb2_grpc
from txrpc.errors import ConfigurationError

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
    """One connection to each other member.  Thread-safe; nothing blocks but `probe`."""

    def __init__(
        self, group: str, acceptor: LocalAcceptor, view: View, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """*view*: the members, as this process was told; what the acceptor's disk has heard of later counts more."""
        self.trouble: dict[str, str] = {}
        """Why the last question had no answer, by member; those that have answered are not in it."""
        self.group_id = 0
        """The group's own number, once it is known."""
        self._group = group
        self._node = acceptor.name
        self._acceptor = acceptor
        self._credentials = credentials
        self._lock = threading.Lock()
        self._channels: dict[str, Any] = {}
        """By address."""
        self._stubs: dict[str, Any] = {}
        self._take(acceptor.kept_view() or view)

    @property
    def view(self) -> View:
        """The members, as far as this process has heard of changes."""
        return self._view

    @property
    def names(self) -> tuple[str, ...]:
        """The other members."""
        return tuple(self._stubs)

    @property
    def is_member(self) -> bool:
        """Return whether this node is one."""
        return self._node in self._view.addresses

    def adopt(self, view: View) -> None:
        """Take in a view that was decided, and have it kept on the disk; earlier ones are nothing new."""
        with self._lock:
            if view.number <= self._view.number:
                return
            self._take(view)
        self._acceptor.keep_view(view)
        fields = {"view": view.number, "members": ",".join(view.names), "tolerance": tolerance(view)}
        logger.warning("the group has changed", extra=fields)

    def _take(self, view: View) -> None:
        self._view = view
        self._told = view_to(view)
        others = {name: address for name, address in view.addresses.items() if name != self._node}
        for address in others.values():
            if address not in self._channels:
                self._channels[address] = self._connect(address)
        self._stubs = {name: peer_pb2_grpc.PeerStub(self._channels[address]) for name, address in others.items()}
        self.trouble = {name: why for name, why in self.trouble.items() if name in others}
        for address in self._channels.keys() - set(others.values()):
            self._channels.pop(address).close()

    def _connect(self, address: str) -> Any:
        if self._credentials is None:
            return grpc.insecure_channel(address, _OPTIONS)
        return grpc.secure_channel(address, self._credentials, _OPTIONS)

    def label(self) -> peer_pb2.PeerGroup:
        """Who asks, and of which group."""
        return peer_pb2.PeerGroup(name=self._group, id=self.group_id, sender=self._node, view=self._told)

    def misfit(self, other: peer_pb2.PeerGroup, *, founding: bool = False) -> str:
        """Why one that calls itself so cannot be answered; "" if it can.

        *founding*: a group is about to begin, of those that it names.
        """
        mine = self._told
        if other.name != self._group:
            return f"this is a member of group {self._group!r}, not of {other.name!r}"
        if other.id and self.group_id and other.id != self.group_id:
            return "this is a member of another group of the same name: one of the two was founded anew"
        if other.sender == self._node:
            return "this is you"
        if not (founding or other.id == self.group_id) or other.view.number != mine.number:
            return ""  # one that is new here, or away for some time: it is told who the members are
        here, there = (",".join(sorted(view.addresses)) for view in (mine, other.view))
        if here != there:
            return f"the members are {here} here, and {there} there"
        here, there = (f"{view.reads} and {view.writes}" for view in (mine, other.view))
        if here != there:
            return f"the quorums are {here} here, and {there} there"
        # One that was removed may say the last of its log, until another one has taken it over.
        return "" if self._view.knows(other.sender) else f"{other.sender!r} is none of the other members"

    def inbox(self) -> Inbox:
        """Return what the answers to a proposer's questions are put into."""
        return Inbox()

    def ask(self, member: str, message: peer_pb2.PeerQuestion, answered: Callable[[Any], None]) -> None:
        """Send *message*; *answered* gets the answer on a thread of gRPC's, or is never called."""
        self._call(member, "Ask", message, answered)

    def beat(self, member: str, message: peer_pb2.PeerBeat, answered: Callable[[Any], None]) -> None:
        """See `ask`."""
        self._call(member, "Beat", message, answered)

    def found(self, member: str, stage: peer_pb2.DiskStage.ValueType, answered: Callable[[Any], None]) -> None:
        """See `ask`."""
        message = peer_pb2.FoundRequest(group=self.label(), stage=stage)
        self._call(member, "Found", message, answered)

    def probe(self, address: str, timeout_s: float) -> peer_pb2.FoundReply:
        """Return what a process at *address*, which is no member yet, says of its disk; blocks.  Raises `ConfigurationError`."""
        with self._connect(address) as channel:
            message = peer_pb2.FoundRequest(group=self.label(), stage=peer_pb2.DISK_STAGE_EMPTY)
            try:
                reply: peer_pb2.FoundReply = peer_pb2_grpc.PeerStub(channel).Found(message, timeout=timeout_s)
            except grpc.RpcError as error:
                raise ConfigurationError(
                    f"no coordinator of the group answers at {address}: {_reason(error)}"
                ) from None
        return reply

    def too_few(self) -> str:
        """Say that there is no quorum: which members do not answer, and why."""
        absent = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.trouble.items()))
        return f"too few members of the group answer: {absent or 'none has answered yet'}"

    def close(self) -> None:
        """End all connections.  Idempotent."""
        for channel in self._channels.values():
            channel.close()

    def _call(self, member: str, verb: str, message: Any, answered: Callable[[Any], None]) -> None:
        if (stub := self._stubs.get(member)) is None:
            return  # it was removed just now

        def ended(call: Any) -> None:
            error = None if call.cancelled() else call.exception()
            if error is not None:
                self._failed(member, error)
            elif not call.cancelled():
                if self.trouble.pop(member, None) is not None:
                    logger.info("peer answers", extra={"peer": member})
                answered(call.result())

        with contextlib.suppress(ValueError):  # the channel is closed: the process ends
            getattr(stub, verb).future(message, timeout=_CALL_S).add_done_callback(ended)

    def _failed(self, member: str, error: Any) -> None:
        wrong, reason = error.code() is grpc.StatusCode.FAILED_PRECONDITION, _reason(error)
        if self.trouble.get(member) != reason:
            self.trouble[member] = reason
            logger.log(
                logging.ERROR if wrong else logging.WARNING, "peer trouble", extra={"peer": member, "reason": reason}
            )


def _reason(error: Any) -> str:
    """What is told of a call that has failed: a peer's own words, if it has refused."""
    code = error.code()
    refused = code is grpc.StatusCode.FAILED_PRECONDITION
    return str(error.details() or "") if refused else f"no answer ({code.name.lower()})"
