"""The keys of a log in etcd, and what their values mean.

PREFIX/version                      the version of all this
PREFIX/node/NODE                    the present epoch of a node, which is the fence, and who holds it
PREFIX/epoch/NODE/EPOCH             how far the log had come in that epoch (`Progress`); empty: nothing was written in it
PREFIX/pending/NODE/XID             a decision of which not every branch has acknowledged
PREFIX/finished/NODE/XID            one of which every branch has
PREFIX/aging/NODE/TIME/XID          since when (milliseconds since 1970), so that the oldest are found
PREFIX/forgotten/NODE               before which time finished decisions were deleted
PREFIX/incident/NODE/XID.BRANCH     a branch that did not end as decided
PREFIX/name/RESOURCE                which database a resource name means, for all nodes
PREFIX/member/NODE                  in which group a node takes part in takeovers, and since when
PREFIX/alive/NODE                   that its process lives: it goes with its lease
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeVar

from txrpc._wire.checks import epoch_from
from txrpc.errors import BadMessage
from txrpc.ids import BranchId, Epoch, Xid

__all__ = [
    "VERSION",
    "Keys",
    "Progress",
    "holder_from",
    "holder_to",
    "last_part",
    "member_from",
    "member_to",
    "number_from",
]

VERSION: Final = b"1"
_T = TypeVar("_T")


class Keys:
    """The keys of *node* under *prefix*; names need no quoting."""

    def __init__(self, prefix: str, node: str = "") -> None:
        root = f"{prefix}/".encode()
        own = node.encode()
        self.version = root + b"version"
        self.nodes = root + b"node/"
        self.node = self.nodes + own
        self.epochs = root + b"epoch/" + own + b"/"
        self.pending = root + b"pending/" + own + b"/"
        self.finished = root + b"finished/" + own + b"/"
        self.aging = root + b"aging/" + own + b"/"
        self.forgotten = root + b"forgotten/" + own
        self.incidents = root + b"incident/" + own + b"/"
        self.names = root + b"name/"
        self.members = root + b"member/"
        self.alive = root + b"alive/"

    def epoch(self, epoch: Epoch) -> bytes:
        """How far the log had come in *epoch*."""
        return self.epochs + b"%016x" % epoch

    def aged(self, done_ms: int, xid: Xid | None = None) -> bytes:
        """Since when a decision is finished; without one, the first key of that time."""
        return self.aging + b"%015d/" % max(0, done_ms) + (str(xid).encode() if xid else b"")

    def incident(self, xid: Xid, branch: BranchId) -> bytes:
        """A branch that did not end as decided."""
        return self.incidents + f"{xid}.{branch}".encode()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a log has come in an epoch."""

    position: int
    clock_ms: int
    """The greatest time at which a decision was made."""
    write: int = 0
    """The number of the write that has brought it there, of its process."""

    def to_bytes(self) -> bytes:
        """For etcd, and for people who look there."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Progress | None:
        """The reverse of `to_bytes`, or None where nothing was written; raises `BadMessage`."""
        if not value:
            return None
        return _read("progress of a log", value, lambda told: cls(*(int(told[each.name]) for each in fields(cls))))


def holder_to(epoch: Epoch, holder: str) -> bytes:
    """The value of a node's key: the fence."""
    return json.dumps({"epoch": f"{epoch:016x}", "holder": holder}).encode()


def holder_from(value: bytes) -> tuple[Epoch, str]:
    """The reverse of `holder_to`; raises `BadMessage`."""
    return _read("epoch of a node", value, lambda told: (epoch_from(int(told["epoch"], 16)), str(told["holder"])))


def member_to(group: str, started_ms: int) -> bytes:
    """The value of a member's key."""
    return json.dumps({"group": group, "started_ms": started_ms}).encode()


def member_from(value: bytes) -> tuple[str, int]:
    """The reverse of `member_to`; raises `BadMessage`."""
    return _read("member of a group", value, lambda told: (str(told["group"]), int(told["started_ms"])))


def _read(what: str, value: bytes, fields_of: Callable[[Any], _T]) -> _T:
    try:
        return fields_of(json.loads(value))
    except (ValueError, TypeError, KeyError):
        raise BadMessage(f"no {what}: {value[:100]!r}") from None


def number_from(value: bytes) -> int:
    """A number in digits; raises `BadMessage`."""
    if not value.isdigit():
        raise BadMessage(f"no number: {value[:100]!r}")
    return int(value)


def last_part(key: bytes) -> str:
    """What comes after the last slash; raises `BadMessage`."""
    try:
        return key.rpartition(b"/")[2].decode("ascii")
    except UnicodeDecodeError:
        raise BadMessage(f"no key of a log: {key[:100]!r}") from None
