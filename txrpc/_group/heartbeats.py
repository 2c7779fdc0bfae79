"""Heartbeats of the members of a group, in the memory of each of them.

How to think of it
    A member tells all others its number, and hears from each what that one has heard of everyone.  So a member lives if anyone that
    can be reached has heard of it: two that cannot reach each other, while a third reaches both, do not take each other over again
    and again.

    They also tell how often each disk was written.  A disk that was written less often than another member remembers has come back
    from a backup, and must not vote: it may have promised, and forgotten.

    A member counts its number up only while a quorum answers it.  One that reaches too few can decide nothing, and must be taken
    over as if it were dead.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

from txrpc._decision_log.port import LogError
from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.peers import Peers
from txrpc._protocol.quorum.views import View
from txrpc._protocol.takeover import LEFT, NodeRow
from txrpc._wire.checks import epoch_from
from txrpc._wire.commands import view_from, view_to
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import BadMessage

__all__ = ["GroupHeartbeats"]

logger = logging.getLogger("txrpc.decision_log")

_WAIT_S: Final = 0.1
_KEEP_S: Final = 2.0
_NEVER_HEARD: Final = -1
_FRESH_S: Final = 1.0
"""An answer that is older says nothing about now."""


class GroupHeartbeats:
    """See `txrpc._decision_log.port.Heartbeats`.  `heard` and `told` may be called from any thread."""

    def __init__(self, acceptor: LocalAcceptor, peers: Peers) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._node = acceptor.name
        self._beat = self._started_ms = 0
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._nodes: dict[str, peer_pb2.NodeBeat] = {}
        """What anyone has heard of each node, as far as it was told here."""
        for peer, (incarnation, saves) in acceptor.heard().items():
            self._nodes[peer] = peer_pb2.NodeBeat(node=peer, incarnation=incarnation, saves=saves)
        self._kept: dict[str, tuple[int, int]] = {}
        self._keep_at = 0.0
        self._distrusted: Future[None] | None = None
        """The end of the last `LocalAcceptor.distrust`."""
        self._answered: dict[str, float] = {}
        self._asked: set[str] = set()
        """Peers with a question that has no answer yet."""

    def join(self, node: str, group: str, started_ms: int) -> None:
        """See `Heartbeats.join`."""
        self._beat, self._started_ms = LEFT + 1, started_ms

    def check(self) -> bool:
        """Ask the others how often this disk was written, and distrust it if it was more often; False if too few answer.

        Blocks for a moment.  Raises `DiskTrouble`.
        """
        if not self._hear_enough():
            return False
        if self._distrusted is not None:
            self._distrusted.result()
        return True

    def beat(self) -> Sequence[NodeRow]:
        """See `Heartbeats.beat`; raises `LogError` while too few members answer."""
        enough = self._hear_enough()
        self._keep()
        if not enough:
            raise LogError(self._peers.too_few())
        self._beat += self._beat != LEFT
        view = self._peers.view
        return [
            NodeRow(each.node, epoch_from(each.epoch), each.holder or each.node, _shown(each, view), each.started_ms)
            for each in self.told().nodes
            if each.epoch and view.knows(each.node)
        ]

    def leave(self) -> None:
        """See `Heartbeats.leave`."""
        self._beat = LEFT
        self._tell()
        with self._news:
            self._news.wait(_WAIT_S)

    def withdraw(self, node: str) -> None:
        """See `Heartbeats.withdraw`.  A member that never joins is not seen."""

    def close(self) -> None:
        """See `Heartbeats.close`.  The peers are the process's."""

    # ----------------------------------------------------------------------------------------------------- both sides

    def heard(self, message: peer_pb2.PeerBeat) -> peer_pb2.PeerBeats:
        """Take another member's number, and return what is known of all."""
        if message.group.sender not in self._peers.view.addresses:
            return self.told()  # it was removed, and hears of it so
        of = peer_pb2.NodeBeat(node=message.group.sender, beat=message.beat, started_ms=message.started_ms)
        with self._lock:
            known = self._merge(of)
            # Its own word about itself; a disk that has become another one begins to count anew.
            if message.incarnation != known.incarnation or message.saves > known.saves:
                known.incarnation, known.saves = message.incarnation, message.saves
        return self.told()

    def told(self) -> peer_pb2.PeerBeats:
        """Return what is known here of all nodes."""
        view = self._acceptor.view()
        with self._lock:
            if self._started_ms:
                # What others remember of an earlier process of this node may come from a clock that was ahead.
                earlier = self._nodes[self._node].started_ms if self._node in self._nodes else 0
                if earlier > self._started_ms:
                    self._started_ms = earlier + 1
                self._merge(peer_pb2.NodeBeat(node=self._node, beat=self._beat, started_ms=self._started_ms))
            for node, (epoch, holder) in view.items():
                if self._peers.view.knows(node):
                    self._merge(peer_pb2.NodeBeat(node=node, epoch=epoch, holder=holder))
            nodes = [self._nodes[node] for node in sorted(self._nodes)]
            return peer_pb2.PeerBeats(nodes=nodes, view=view_to(self._peers.view))

    def _hear_enough(self) -> bool:
        self._tell()
        until = time.monotonic() + _WAIT_S
        with self._news:
            while self._asked.intersection(self._peers.names) and (left := until - time.monotonic()) > 0:
                self._news.wait(left)
            view, fresh = self._peers.view, time.monotonic() - _FRESH_S
            answered = sum(at > fresh for peer, at in self._answered.items() if peer in view.addresses)
            return answered + (self._node in view.addresses) >= max(view.reads, view.writes)

    def _keep(self) -> None:
        """Write now and then how often the others' disks were written: all members may be restarted at once."""
        if time.monotonic() < self._keep_at:
            return
        self._keep_at = time.monotonic() + _KEEP_S
        with self._lock:
            known = [each for each in self._nodes.values() if each.node in self._peers.view.addresses]
            nodes = [each for each in known if each.incarnation and each.node != self._node]
            heard = {each.node: (each.incarnation, each.saves) for each in nodes}
        if heard != self._kept:
            self._acceptor.remember(heard)
            self._kept = heard

    def _tell(self) -> None:
        for peer in self._peers.names:
            with self._lock:
                if peer in self._asked and self._answered.get(peer, 0.0) > time.monotonic() - _FRESH_S:
                    continue
                self._asked.add(peer)
            message = peer_pb2.PeerBeat(
                group=self._peers.label(),
                beat=self._beat,
                started_ms=self._started_ms,
                incarnation=self._acceptor.standing.incarnation,
                saves=self._acceptor.saves,
            )
            self._peers.beat(peer, message, self._reader(peer))

    def _reader(self, peer: str) -> Any:
        def read(message: peer_pb2.PeerBeats) -> None:
            if message.view.number > self._peers.view.number:
                with contextlib.suppress(BadMessage):
                    self._peers.adopt(view_from(message.view))
            with self._news:
                self._asked.discard(peer)
                self._answered[peer] = time.monotonic()
                for each in message.nodes:
                    if self._peers.view.knows(each.node):
                        self._merge(each)
                    if each.node == self._node:
                        self._compare(each)
                self._news.notify_all()

        return read

    def _compare(self, remembered: peer_pb2.NodeBeat) -> None:
        """A peer says how often this disk was written."""
        standing = self._acceptor.standing
        if remembered.incarnation != standing.incarnation or remembered.saves <= self._acceptor.saves:
            return
        if self._distrusted is None or self._distrusted.done():
            fields = {"written": self._acceptor.saves, "had_been_written": remembered.saves}
            logger.critical("the disk is an older one: its logs are given to it anew", extra=fields)
            self._distrusted = self._acceptor.distrust()

    def _merge(self, news: peer_pb2.NodeBeat) -> peer_pb2.NodeBeat:
        """Take what is later: of a process, the later start and the greater number; of its log, the greater epoch."""
        old = self._nodes.setdefault(news.node, peer_pb2.NodeBeat(node=news.node))
        if _rank(news) > _rank(old):
            old.beat, old.started_ms = news.beat, news.started_ms
        if old.epoch < news.epoch < 1 << 63:
            old.epoch, old.holder = news.epoch, news.holder
        return old


def _shown(beat: peer_pb2.NodeBeat, view: View) -> int:
    """A node that has not been heard of since this process began has some time to show itself; one that was removed has left."""
    if beat.node not in view.addresses:
        return LEFT
    return beat.beat if beat.started_ms else _NEVER_HEARD


def _rank(beat: peer_pb2.NodeBeat) -> tuple[int, bool, int]:
    """Having left is the last that a process says."""
    return beat.started_ms, beat.started_ms > 0 and beat.beat == LEFT, beat.beat
