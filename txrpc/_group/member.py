"""One member of a group: its disk, its acceptor, its peers, and what they make together."""

from __future__ import annotations

import logging
import time

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
        """Become a member, and be sure that the disk is not an older one; False if that was not possible within the time.

        Blocks.  Raises `ConfigurationError` if the members' disks do not belong together, and `DiskTrouble`.
        """
        until = time.monotonic() + timeout_s
        if not found(self._acceptor, self._peers, timeout_s):
            return False
        while not self._acceptor.ready:
            self._acceptor.ready = self.heartbeats.check()
            if time.monotonic() > until:
                break
        return self._acceptor.ready

    def make_log(self) -> DecisionLog:
        """Return one more access to the group's log."""
        return GroupLog(self._acceptor, self._peers, self._names)

    def close(self) -> None:
        """Release the disk and the connections.  Idempotent."""
        self._peers.close()
        self._acceptor.close()
