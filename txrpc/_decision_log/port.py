"""The port to where a coordinator makes its decisions durable.

A commit decision is a write-once record owned by an epoch.  Only commits are recorded: by presumed abort (Mohan, Lindsay and
Obermarck 1986) a transaction without a record is aborted.

A log is used by one thread at a time (the coordinator gives it one of its own) and may block.  Implementations: `memory`
(tests), `sql`, `txrpc._etcd.log`, `txrpc._group.log`.  All pass `tests/log/test_contract.py`.

The one subtle thing is what a failure of `record` tells.  If the statement that makes the batch durable was never sent, the
batch is certainly not recorded (`NotRecorded`) and its transactions may be aborted.  If it was sent and no answer came, it is not
known (`RecordUncertain`): the coordinator must repeat the very same batch until it hears, and must abort none of it meanwhile.
Recording the same decision again is therefore not an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from txrpc._protocol.records import Decision, Incident, Opened, PreparedBranch
from txrpc._protocol.takeover import NodeRow
from txrpc.errors import TxrpcError
from txrpc.ids import BranchId, Epoch, Xid

__all__ = [
    "Decision",
    "DecisionLog",
    "Heartbeats",
    "LogError",
    "NotRecorded",
    "Opened",
    "PreparedBranch",
    "RecordUncertain",
]


class LogError(TxrpcError):
    """The log did not do what was asked; the message says why and what to change.  (`Fenced` is not one: it is final.)"""


class NotRecorded(LogError):
    """The batch is certainly not in the log."""


class RecordUncertain(LogError):
    """The batch may be in the log or not."""


class Heartbeats(Protocol):
    """Where the nodes of a group that share a log show each other that they live.  Used by one thread at a time; may block."""

    def join(self, node: str, group: str, started_ms: int) -> None:
        """Be seen from now on; raises `LogError`."""

    def beat(self) -> Sequence[NodeRow]:
        """Show that this node lives, and return what all of the group show; raises `LogError`."""

    def leave(self) -> None:
        """Show that this node has left; raises `LogError`."""

    def withdraw(self, node: str) -> None:
        """Let *node* be seen no more, as one that neither takes over nor is taken over; raises `LogError`."""

    def close(self) -> None:
        """Release connections.  Idempotent."""


class DecisionLog(Protocol):
    """Where a coordinator node makes its commit decisions durable."""

    @property
    def location(self) -> str:
        """Return where the log is, for people: no password in it."""

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """Open a new epoch of *node*: from now on every write of an earlier epoch raises `Fenced`.

        *nonce* (32 bits) tells this epoch from one of the same number in a copy of the log.  *holder*: the node that takes it over;
        "": its own process opens it.  *expect*: the epoch that it must be in; `Fenced` if it is in another one by now.
        Raises `ConfigurationError` (unreachable, read-only, missing driver, schema of a newer version, ...).
        """

    def record(self, decisions: Sequence[Decision]) -> int:
        """Make a batch of decisions durable, all or none.  Durable when it returns.  An empty batch only asks whether that works.

        Returns the log's new position (rule 18): a number that grows with every batch, in the same transaction, and never falls
        but on a log that has lost decisions.  Repeating a batch may raise it again.
        Raises `Fenced`, `NotRecorded` or `RecordUncertain`.
        """

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """Mark decisions as acknowledged by every branch.  Need not be forced: losing the mark only repeats phase 2."""

    def outcome(self, xid: Xid) -> Decision | None:
        """The record of *xid* of this node, done or not, or None."""

    def pending(self) -> Sequence[Decision]:
        """The decisions of this node that are not marked done."""

    def overflow_ms(self) -> int:
        """Return the time (milliseconds since 1970) before which done decisions must be forgotten, or 0.

        A log that cannot keep all of a busy day says so here, before it deletes any: what was told of as forgotten is never taken
        for aborted.
        """

    def forget(self, done_before_ms: int, limit: int) -> int:
        """Delete at most *limit* decisions marked done before that time (milliseconds since 1970); how many went.

        Remembers that time as `Opened.forgotten_ms`, in the same transaction, if any went.
        """

    def report(self, incidents: Sequence[Incident]) -> None:
        """Keep *incidents* until `close_incidents`; the latest of a branch replaces an earlier one."""

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """Mark the incidents of these branches closed."""

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """Note which databases resource names mean (rule 17), for all nodes that share the log; return what all names mean now.

        *first*: names that were not known; another node may have been faster, and then its word holds.
        *rebound*: what an operator says; "": the next database that comes.
        """

    def close(self) -> None:
        """Release connections.  Idempotent."""
