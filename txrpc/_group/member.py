"""One member of a group: its disk, its acceptor, its peers, and what they make together."""

from __future__ import annotations

import logging

import grpc

from txrpc._decision_log.port import DecisionLog
from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.disk import DiskFile
from txrpc._group.founding import found
from txrpc._group.heartbeats import GroupHeartbeats
from txrpc._group.log import GroupLog
from txrpc._group.members import Members
from txrpc._group.names import SharedNames
from txrpc._group.peers import Peers
from txrpc._group.service import PeerService

__all__ = ["GroupMember"]

logger = logging.getLogger("txrpc.decision_log")


class GroupMember:
    """See the module's docstring."""

    def __init__(
        self,
        group: str,
        node: str,
        members: Members,
        path: str,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """*path*: the file that is this member's disk.  Raises `ConfigurationError` if it cannot be used."""
        self._acceptor = LocalAcceptor(DiskFile(path, node))
        self._peers = Peers(group, node, members, credentials)
        self._names = SharedNames(self._acceptor, self._peers)
        self.heartbeats = GroupHeartbeats(self._acceptor, self._peers)
        fields = {"members": ",".join(members.names), "tolerance": members.tolerance()}
        logger.info("group of coordinators", extra=fields)

    def service(self) -> PeerService:
        """Return what must be served before `join`: the others ask it."""
        return PeerService(self._acceptor, self._peers, self.heartbeats)

    def join(self, timeout_s: float) -> bool:
        """See `found`.  Blocks."""
        return found(self._acceptor, self._peers, timeout_s)

    def make_log(self) -> DecisionLog:
        """Return one more access to the group's log."""
        return GroupLog(self._acceptor, self._peers, self._names)

    def close(self) -> None:
        """Release the disk and the connections.  Idempotent."""
        self._peers.close()
        self._acceptor.close()
