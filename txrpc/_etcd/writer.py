"""The writes of one node in one epoch: each is done once, in order, and none by an epoch that is over.

How to think of it
    Each write is one transaction of etcd's that also writes how far the log has come.  It is done only if the node is in our
    epoch still (the fence), and if the log has come just as far as we know: to the revision of our last write.  So of all tries of
    a write one is carried out, and one that was under way for long comes too late.

    A write that finds the log further than we knew looks which write has brought it there: this very one (then it was carried
    out, and its answer was lost), or an earlier one whose end we never heard of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from txrpc._etcd.client import EtcdClient, EtcdError, EtcdFull, EtcdRefused, one
from txrpc._etcd.keys import Keys, Progress, holder_from, holder_to
from txrpc._protocol.records import Decision
from txrpc._wire.v1 import etcd_pb2 as pb
from txrpc.errors import BadMessage, Fenced
from txrpc.ids import Epoch

__all__ = ["OPERATIONS", "EpochWriter"]

OPERATIONS: Final = 120
"""Of one write; etcd takes 128 in a transaction by default, and one is ours."""
_TRIES: Final = 5


class EpochWriter:
    """See the module's docstring.  Methods raise `Fenced` or `EtcdError`."""

    def __init__(self, client: EtcdClient, keys: Keys, epoch: Epoch, holder: str) -> None:
        self._client = client
        self._keys = keys
        self._epoch = epoch
        self.fence = holder_to(epoch, holder)
        """What the node's key says as long as this epoch lasts."""
        self.progress = Progress(0, 0)
        self.revision = 0
        """At which the progress was written last."""
        self._number = 0

    def write(self, operations: Sequence[pb.EtcdOperation], decisions: Sequence[Decision] = ()) -> None:
        """Carry out *operations*, which record *decisions*."""
        self._number += 1
        for _ in range(_TRIES):
            wanted = self._after(decisions)
            try:
                reply = self._client.transact(self._transaction(wanted, operations))
            except EtcdFull as error:
                if self._look() == wanted:
                    return
                raise EtcdRefused(str(error)) from error
            if reply.succeeded:
                self.revision, self.progress = reply.header.revision, wanted
                return
            if self._learn(reply.responses[0].range.kvs, reply.responses[1].range.kvs) == wanted:
                return
        raise EtcdError("another program writes under this epoch")

    def _after(self, decisions: Sequence[Decision]) -> Progress:
        clock_ms = max([self.progress.clock_ms, *(each.decided_ms for each in decisions)])
        return Progress(self.progress.position + len(decisions), clock_ms, self._number)

    def _transaction(self, wanted: Progress, operations: Sequence[pb.EtcdOperation]) -> pb.EtcdTransaction:
        here = self._keys.epoch(self._epoch)
        return pb.EtcdTransaction(
            compare=[
                pb.EtcdCompare(target=pb.EtcdCompare.VALUE, key=self._keys.node, value=self.fence),
                pb.EtcdCompare(target=pb.EtcdCompare.MOD, key=here, mod_revision=self.revision),
            ],
            success=[pb.EtcdOperation(put=pb.EtcdPut(key=here, value=wanted.to_bytes())), *operations],
            failure=[pb.EtcdOperation(range=one(self._keys.node)), pb.EtcdOperation(range=one(here))],
        )

    def _look(self) -> Progress:
        """Read how far the log has come."""
        return self._learn(*self._client.read(one(self._keys.node), one(self._keys.epoch(self._epoch))))

    def _learn(self, node: Sequence[pb.EtcdKeyValue], here: Sequence[pb.EtcdKeyValue]) -> Progress:
        if not node or node[0].value != self.fence or not here:
            raise Fenced(f"epoch {self._epoch} is over: {_present(node)}")
        try:
            self.progress = Progress.from_bytes(here[0].value) or self.progress
        except BadMessage as error:
            raise EtcdError(str(error)) from None
        self.revision = here[0].mod_revision
        return self.progress


def _present(node: Sequence[pb.EtcdKeyValue]) -> str:
    if not node:
        return "the node's key was deleted"
    try:
        return f"{holder_from(node[0].value)[0]} has opened the log"
    except BadMessage as error:
        return str(error)
