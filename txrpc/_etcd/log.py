"""The decision log in etcd: see `txrpc._etcd.keys` for what is where, and `txrpc._etcd.writer` for what makes a write safe.

A coordinator holds its undone decisions in memory as well, because marking one as done moves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from txrpc._decision_log.port import Decision, LogError, NotRecorded, Opened, RecordUncertain
from txrpc._etcd.client import EtcdClient, EtcdError, EtcdRefused, between, one, under
from txrpc._etcd.keys import VERSION, Keys, Progress, holder_from, last_part, number_from
from txrpc._etcd.url import parsed
from txrpc._etcd.writer import OPERATIONS, EpochWriter
from txrpc._protocol.records import Incident
from txrpc._wire.checks import parse
from txrpc._wire.commands import decision_from, decision_to, incident_from, incident_to
from txrpc._wire.v1 import etcd_pb2 as pb
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import BadMessage, ConfigurationError, Fenced
from txrpc.ids import NODE_MAX, BranchId, Epoch, Xid, check_name

__all__ = ["EtcdLog"]

_T = TypeVar("_T")

_OPEN_TRIES: Final = 10
_BATCH_BYTES: Final = 1024 * 1024
_DECISION_BYTES: Final = 1400 * 1024
"""Of one write: etcd takes 1.5 MiB by default."""
_KEPT: Final = 100_000
"""Finished decisions that are kept at most, whatever the retention time: etcd is made for some gigabytes."""
_OVERFLOW: Final = 100_000
"""So many more are forgotten at a time."""


class EtcdLog:
    """See `txrpc._decision_log.port.DecisionLog`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigurationError` if *url* is none of etcd's."""
        self._url = parsed(url)
        self.location: str = self._url.location
        self._client = EtcdClient(self._url)
        self._keys = Keys(self._url.prefix)
        self._writer = EpochWriter(self._client, self._keys, Epoch(0), "")
        self._undone: dict[Xid, bytes] = {}
        self._uncertain: set[Xid] = set()
        self._forgotten_ms = 0

    # ------------------------------------------------------------------------------------------------------ the port

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """See `DecisionLog.open`."""
        self._keys = Keys(self._url.prefix, check_name("node", node, NODE_MAX))
        self._uncertain.clear()
        try:
            return self._open(nonce, holder or node, expect)
        except (EtcdError, BadMessage) as error:
            raise ConfigurationError(f"cannot open the decision log {self.location}: {error}") from error

    def _open(self, nonce: int, holder: str, expect: Epoch | None) -> Opened:
        for _ in range(_OPEN_TRIES):
            versions, nodes = self._client.read(one(self._keys.version), one(self._keys.node))
            if versions and versions[0].value != VERSION:
                raise ConfigurationError(
                    f"the decision log {self.location} is of version {versions[0].value.decode(errors='replace')[:20]}, and this "
                    f"txrpc knows version {VERSION.decode()}: upgrade this coordinator"
                )
            before = holder_from(nodes[0].value)[0] if nodes else None
            if expect is not None and before != expect:
                raise Fenced(f"node {last_part(self._keys.node)!r} is not in epoch {expect} any more")
            epoch = Epoch.make(before.number + 1 if before else 1, nonce)
            self._writer = EpochWriter(self._client, self._keys, epoch, holder)
            reply = self._client.transact(self._opening(epoch, nodes[0].mod_revision if nodes else 0))
            if reply.succeeded:
                self._writer.revision = reply.header.revision
                return self._opened(epoch, reply.responses[-1].range.kvs)
        raise EtcdError("other coordinators open it again and again")

    def _opening(self, epoch: Epoch, revision: int) -> pb.EtcdTransaction:
        """Open *epoch*, if the node's key is as it was at *revision* (0: not there), and read all epochs at that moment."""
        keys = self._keys
        return pb.EtcdTransaction(
            compare=[pb.EtcdCompare(target=pb.EtcdCompare.MOD, key=keys.node, mod_revision=revision)],
            success=[
                _put(keys.node, self._writer.fence),
                _put(keys.version, VERSION),
                _put(keys.epoch(epoch), b""),
                pb.EtcdOperation(range=under(keys.epochs)),
            ],
        )

    def _opened(self, epoch: Epoch, epochs: Iterable[pb.EtcdKeyValue]) -> Opened:
        """No earlier epoch can write any more, so that what is read from now on stays as it is."""
        lineage: dict[Epoch, int] = {}
        last = Progress(0, 0)
        for each in epochs:  # in their order
            last = Progress.from_bytes(each.value) or last
            lineage[Epoch(int(last_part(each.key), 16))] = last.position
        del lineage[epoch]
        self._writer.progress = last
        pending = self._pending()
        self._undone = {decision.xid: _packed(decision) for decision in pending}
        incidents = [parse(peer_pb2.LogIncident, each.value) for each in self._client.read_all(self._keys.incidents)]
        (forgotten,) = self._client.read(one(self._keys.forgotten))
        self._forgotten_ms = number_from(forgotten[0].value) if forgotten else 0
        return Opened(
            epoch,
            lineage,
            tuple(pending),
            self._forgotten_ms,
            max(self._forgotten_ms, last.clock_ms),
            last.position,
            tuple(sorted(map(incident_from, incidents), key=lambda incident: incident.at_ms)),
            {name: identity for name, identity in self._names().items() if identity},
        )

    def record(self, decisions: Sequence[Decision]) -> int:
        """See `DecisionLog.record`."""
        rows = {decision.xid: _packed(decision) for decision in decisions}
        for xid, row in rows.items():
            if self._undone.get(xid, row) != row:
                raise AssertionError(f"two decisions about {xid}")
            if len(row) > _DECISION_BYTES:  # before a part of the batch is written
                raise NotRecorded(f"the decision about {xid} is too large for etcd: begin smaller transactions")
        began = not self._uncertain.isdisjoint(rows)
        try:
            for part in _in_parts(decisions, rows):
                self._writer.write([_put(self._pending_key(each.xid), rows[each.xid]) for each in part], part)
                self._undone |= {each.xid: rows[each.xid] for each in part}
                began |= bool(part)
        except EtcdError as error:
            if began or not isinstance(error, EtcdRefused):
                self._uncertain |= rows.keys()
                raise RecordUncertain(f"no answer yet from {self.location}: {error}") from error
            raise NotRecorded(f"cannot write to {self.location}: {error}") from error
        self._uncertain -= rows.keys()
        return self._writer.progress.position

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        marked = [xid for xid in xids if xid in self._undone]
        for part in _pieces(marked, OPERATIONS // 3):
            operations: list[pb.EtcdOperation] = []
            for xid in part:
                operations += [
                    _delete(self._pending_key(xid)),
                    _put(self._finished_key(xid), self._undone[xid]),
                    _put(self._keys.aged(now_ms, xid), b""),
                ]
            with self._errors():
                self._writer.write(operations)
            for xid in part:
                del self._undone[xid]

    def outcome(self, xid: Xid) -> Decision | None:
        """See `DecisionLog.outcome`."""
        with self._errors():
            found = self._client.read(one(self._pending_key(xid)), one(self._finished_key(xid)))
            return next((_decision(each[0].value) for each in found if each), None)

    def pending(self) -> Sequence[Decision]:
        """See `DecisionLog.pending`."""
        with self._errors():
            return self._pending()

    def overflow_ms(self) -> int:
        """See `DecisionLog.overflow_ms`."""
        with self._errors():
            surplus = self._client.count(self._keys.aging) - _KEPT
            if surplus <= 0:
                return 0
            (oldest,) = self._client.read(_keys_of(under(self._keys.aging, min(surplus, _OVERFLOW))))
            return _done_ms(oldest[-1].key) + 1

    def forget(self, done_before_ms: int, limit: int) -> int:
        """See `DecisionLog.forget`."""
        with self._errors():
            (old,) = self._client.read(_keys_of(between(self._keys.aging, self._keys.aged(done_before_ms), limit)))
            forgotten_ms = max(self._forgotten_ms, done_before_ms)
            if not old:
                self._writer.write([])  # whether this epoch may write still
            for part in _pieces(old, OPERATIONS // 2 - 1):
                operations = [_put(self._keys.forgotten, b"%d" % forgotten_ms)]
                for each in part:
                    operations += [_delete(self._keys.finished + last_part(each.key).encode()), _delete(each.key)]
                self._writer.write(operations)
                self._forgotten_ms = forgotten_ms
            return len(old)

    def report(self, incidents: Sequence[Incident]) -> None:
        """See `DecisionLog.report`."""
        latest = {self._keys.incident(each.xid, each.branch): each for each in incidents}
        self._write([_put(key, incident_to(each).SerializeToString()) for key, each in latest.items()])

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """See `DecisionLog.close_incidents`."""
        self._write([_delete(self._keys.incident(xid, branch)) for xid, branch in branches])

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """See `DecisionLog.bind`."""
        with self._errors():
            if first or rebound:
                held = {last_part(each.key): each for each in self._client.read_all(self._keys.names)}
                free = {name: held.get(name) for name in first.keys() - rebound.keys()}
                operations = [
                    self._bound_if_free(name, first[name], now) for name, now in free.items() if not (now and now.value)
                ]
                operations += [_put(self._keys.names + name.encode(), to.encode()) for name, to in rebound.items()]
                for part in _pieces(operations, OPERATIONS) if operations else [()]:
                    self._writer.write(part)
            return self._names()

    def close(self) -> None:
        """See `DecisionLog.close`."""
        self._client.close()

    # ------------------------------------------------------------------------------------------------------ under it

    def _write(self, operations: Sequence[pb.EtcdOperation]) -> None:
        with self._errors():
            for part in _pieces(operations, OPERATIONS):
                self._writer.write(part)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EtcdError, BadMessage) as error:
            raise LogError(f"the decision log {self.location} does not answer: {error}") from error

    def _pending(self) -> list[Decision]:
        found = [_decision(each.value) for each in self._client.read_all(self._keys.pending)]
        return sorted(found, key=lambda decision: decision.decided_ms)

    def _names(self) -> dict[str, str]:
        return {
            last_part(each.key): each.value.decode("utf-8", "replace")
            for each in self._client.read_all(self._keys.names)
        }

    def _bound_if_free(self, name: str, identity: str, now: pb.EtcdKeyValue | None) -> pb.EtcdOperation:
        """Let *name* mean *identity* if it is as it was *now*: another node may be faster, and then its word holds."""
        key = self._keys.names + name.encode()
        same = pb.EtcdCompare(target=pb.EtcdCompare.MOD, key=key, mod_revision=now.mod_revision if now else 0)
        return pb.EtcdOperation(transaction=pb.EtcdTransaction(compare=[same], success=[_put(key, identity.encode())]))

    def _pending_key(self, xid: Xid) -> bytes:
        return self._keys.pending + str(xid).encode()

    def _finished_key(self, xid: Xid) -> bytes:
        return self._keys.finished + str(xid).encode()


def _put(key: bytes, value: bytes) -> pb.EtcdOperation:
    return pb.EtcdOperation(put=pb.EtcdPut(key=key, value=value))


def _delete(key: bytes) -> pb.EtcdOperation:
    return pb.EtcdOperation(delete=pb.EtcdDelete(key=key))


def _keys_of(asked: pb.EtcdRange) -> pb.EtcdRange:
    asked.keys_only = True
    return asked


def _done_ms(key: bytes) -> int:
    return number_from(key.split(b"/")[-2])


def _packed(decision: Decision) -> bytes:
    return decision_to(decision).SerializeToString(deterministic=True)


def _decision(value: bytes) -> Decision:
    return decision_from(parse(peer_pb2.LogDecision, value))


def _in_parts(decisions: Sequence[Decision], rows: Mapping[Xid, bytes]) -> Iterator[Sequence[Decision]]:
    """Split a batch into what fits into one write each; one empty part if there is none."""
    part: list[Decision] = []
    size = 0
    for decision in decisions:
        row = len(rows[decision.xid])
        if part and (len(part) == OPERATIONS or size + row > _BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(decision)
        size += row
    yield part


def _pieces(items: Sequence[_T], most: int) -> Iterator[Sequence[_T]]:
    return (items[at : at + most] for at in range(0, len(items), most))
