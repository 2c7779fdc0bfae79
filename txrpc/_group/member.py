"""One member of a group: its disk, its acceptor, its peers, and what they make together."""

from __future__ import annotations

import logging
import time

import grpc

from txrpc._decision_log.port import DecisionLog
from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.changes import GroupChanges
from txrpc._group.disk import MEMBER, DiskFile
from txrpc._group.founding import found
from txrpc._group.heartbeats import GroupHeartbeats
from txrpc._group.log import GroupLog
from txrpc._group.members import tolerance
from txrpc._group.peers import Peers
from txrpc._group.service import PeerService
from txrpc._group.shared import SharedLog
from txrpc._protocol.quorum.views import View

__all__ = ["GroupMember"]

logger = logging.getLogger("txrpc.decision_log")


class GroupMember:
    """See the module's docstring."""

    def __init__(
        self,
        group: str,
        node: str,
        founders: View,
        path: str,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """*founders*: the members, as far as the disk has heard of no change.

        *path*: the file that is this member's disk.  Raises `ConfigurationError` if it cannot be used.
        """
        self._acceptor = LocalAcceptor(DiskFile(path, node))
        self._peers = Peers(group, self._acceptor, founders, credentials)
        self._shared = SharedLog(self._acceptor, self._peers)
        self.heartbeats = GroupHeartbeats(self._acceptor, self._peers)
        self.changes = GroupChanges(self._acceptor, self._peers, self._shared)
        self._said = ("", "")
        view = self._peers.view
        fields = {"view": view.number, "members": ",".join(view.names), "tolerance": tolerance(view)}
        logger.info("group of coordinators", extra=fields)

    @property
    def view(self) -> View:
        """The members, as far as this one has heard of changes."""
        return self._peers.view

    @property
    def was_removed(self) -> bool:
        """Return whether it was a member, and is none any more."""
        return self._acceptor.standing.stage == MEMBER and not self._peers.is_member

    def trouble(self) -> dict[str, str]:
        """Return why the last question to another member had no answer, by name."""
        return dict(self._peers.trouble)

    def service(self) -> PeerService:
        """Return what must be served before `join`: the others ask it."""
        return PeerService(self._acceptor, self._peers, self.heartbeats)

    def join(self, timeout_s: float) -> bool:
        """Become a member, and be sure that the disk is not an older one; False if that was not possible within the time.

        Blocks.  Raises `ConfigurationError` if the members' disks do not belong together, and `DiskTrouble`.
        """
        until = time.monotonic() + timeout_s
        if not found(self._acceptor, self._peers, timeout_s, self._say):
            return False
        while not self._acceptor.ready:
            self._acceptor.ready = self.heartbeats.check()
            if time.monotonic() > until:
                break
        # It may have heard only now that it was removed while it was away.
        return self._acceptor.ready and self._peers.is_member

    def _say(self, level: int, what: str, hint: str) -> None:
        """Log what is waited for, once."""
        if (what, hint) != self._said:
            self._said = what, hint
            logger.log(level, what, extra={"hint": hint})

    def make_log(self) -> DecisionLog:
        """Return one more access to the group's log."""
        return GroupLog(self._acceptor, self._peers, self._shared)

    def close(self) -> None:
        """Release the disk and the connections.  Idempotent."""
        self._peers.close()
        self._acceptor.close()
