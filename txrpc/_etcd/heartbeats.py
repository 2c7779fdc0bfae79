"""Heartbeats of the nodes that share a log in etcd: each keeps a key alive by a lease.

How to think of it
    The leader of etcd keeps a lease in memory, so that a heartbeat writes nothing; counting up a key would fill etcd's history with
    a million versions a day.  A process that says nothing for the time of its lease is gone, and its key with it.  An etcd without
    a leader ends no lease, and a new leader lets all of them begin anew: then no node takes over another one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from txrpc._decision_log.port import LogError
from txrpc._etcd.client import EtcdClient, EtcdError, under
from txrpc._etcd.keys import Keys, holder_from, last_part, member_from, member_to
from txrpc._etcd.url import parsed
from txrpc._protocol.takeover import LEFT, NodeRow
from txrpc._wire.v1 import etcd_pb2 as pb
from txrpc.errors import BadMessage

__all__ = ["EtcdHeartbeats"]


class EtcdHeartbeats:
    """See `txrpc._decision_log.port.Heartbeats`.  Its log must have been opened before."""

    def __init__(self, url: str, silence_s: float) -> None:
        """*silence_s*: after which a process is held to be dead, in whole seconds, and two at least, which is etcd's own limit.

        Raises `ConfigurationError` as `EtcdLog` does.
        """
        self._url = parsed(url)
        self._client = EtcdClient(self._url)
        self._keys = Keys(self._url.prefix)
        self._silence_s = max(2, math.ceil(silence_s))
        self._node = self._group = ""
        self._lease = self._beats = self._started_ms = 0

    def join(self, node: str, group: str, started_ms: int) -> None:
        """See `Heartbeats.join`."""
        self._node, self._group, self._started_ms = node, group, started_ms
        with self._errors():
            self._show()

    def beat(self) -> Sequence[NodeRow]:
        """See `Heartbeats.beat`."""
        with self._errors():
            self._client.keep(self._lease)
            members, alive, nodes = self._client.read(
                under(self._keys.members), under(self._keys.alive), under(self._keys.nodes)
            )
            self._beats += 1
            live = {last_part(each.key) for each in alive}
            held = {last_part(each.key): holder_from(each.value) for each in nodes}
            known = {last_part(each.key): member_from(each.value) for each in members}
            if self._node not in live or self._node not in known:
                self._show()  # it was asleep for longer than its lease, or etcd was restored from a backup
        # What each shows is the same to NodeWatch as a number that goes on, or has stopped for good.
        return [
            NodeRow(node, *held[node], LEFT + self._beats if node in live else LEFT, started_ms)
            for node, (group, started_ms) in sorted(known.items())
            if group == self._group and node in held
        ]

    def leave(self) -> None:
        """See `Heartbeats.leave`."""
        with self._errors():
            self._client.revoke(self._lease)

    def withdraw(self, node: str) -> None:
        """See `Heartbeats.withdraw`."""
        gone = [self._keys.members + node.encode(), self._keys.alive + node.encode()]
        with self._errors():
            deletions = [pb.EtcdOperation(delete=pb.EtcdDelete(key=key)) for key in gone]
            self._client.transact(pb.EtcdTransaction(success=deletions))

    def close(self) -> None:
        """See `Heartbeats.close`."""
        self._client.close()

    def _show(self) -> None:
        """Live under a new lease, which counts once it is there."""
        lease, node = self._client.grant(self._silence_s), self._node.encode()
        member = pb.EtcdPut(key=self._keys.members + node, value=member_to(self._group, self._started_ms))
        alive = pb.EtcdPut(key=self._keys.alive + node, lease=lease)
        shown = [pb.EtcdOperation(put=member), pb.EtcdOperation(put=alive)]
        self._client.transact(pb.EtcdTransaction(success=shown))
        self._lease = lease

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EtcdError, BadMessage) as error:
            raise LogError(f"the decision log {self._url.location} does not answer: {error}") from error
