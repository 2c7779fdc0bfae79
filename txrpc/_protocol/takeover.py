"""Which nodes of a group live, and who takes over those that do not.

How to think of it
    Every node counts up a number in a place that all can read (its *heartbeat*).  A node whose number has stood still for long
    enough is held to be dead; one that left of its own accord says so and is dead at once.  A node's *holder* is the process
    that runs its coordinator: its own, or that of the node that has taken it over.  A node whose holder is dead is an orphan.

    Who takes the orphans over is elected as in the bully algorithm (Garcia-Molina 1982): the live node of the highest rank leads,
    and the rank is the time since which it has been there, so that one that comes and goes does not depose one that stays.
    Messages are not needed, because all read the same numbers.

    None of this is needed for safety.  Two nodes that both believe that they lead open the same log, and its fence lets one of
    them write (rule 7).  A node that is taken over by mistake is fenced, and opens its log again.

    Time is counted in observations: a machine, or a database, that stood still for a minute has made one observation in it, and
    does not conclude that all others are dead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from txrpc.ids import Epoch

__all__ = ["LEFT", "NodeRow", "NodeWatch"]

LEFT = 0
"""The heartbeat of a node that has left of its own accord."""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What a node of the group shows of itself."""

    node: str
    epoch: Epoch
    holder: str
    """The node whose process runs its coordinator in this epoch."""
    beat: int
    """Changes while its own process lives; `LEFT` once it has left."""
    started_ms: int
    """When its process began, in milliseconds since 1970 by its own clock: its rank."""


@dataclass(slots=True)
class _Seen:
    beat: int
    silent_ms: int = 0
    """For how long the heartbeat has stood still, as far as this was observed."""


class NodeWatch:
    """What one node concludes from the heartbeats of all.  Not thread-safe."""

    def __init__(self, node: str, beat_ms: int, takeover_ms: int) -> None:
        """*beat_ms*: how often a node shows that it lives; *takeover_ms*: for how long it may be silent."""
        self._node = node
        self._beat_ms = beat_ms
        self._takeover_ms = takeover_ms
        self._seen: dict[str, _Seen] = {}
        self._observed_ms: int | None = None

    def observe(self, rows: Sequence[NodeRow], mine: Collection[str], now_ms: int) -> list[NodeRow]:
        """Take in what all nodes show at monotonic time *now_ms*; return those that this node is to take over.

        *mine*: the nodes that it has taken over, or is about to.
        """
        since_ms = now_ms - self._observed_ms if self._observed_ms is not None else 0
        self._observed_ms = now_ms
        self._count(rows, min(since_ms, 2 * self._beat_ms))
        live = {row.node for row in rows if row.node == self._node or self._lives(row)}
        leads = self.leader(rows) == self._node
        return [
            row
            for row in rows
            if row.node not in live
            and row.node not in mine
            # What this node had taken over before it was restarted is its own to look after still.
            and (row.holder == self._node or (leads and row.holder not in live))
        ]

    def leader(self, rows: Sequence[NodeRow]) -> str:
        """Return the live node of the highest rank."""
        live = [row for row in rows if row.node == self._node or self._lives(row)]
        return min(live, key=lambda row: (row.started_ms, row.node)).node if live else self._node

    def live(self, rows: Sequence[NodeRow]) -> list[str]:
        """Return the nodes that are held to live, in the order of their names."""
        return sorted(row.node for row in rows if row.node == self._node or self._lives(row))

    def _count(self, rows: Sequence[NodeRow], since_ms: int) -> None:
        for row in rows:
            seen = self._seen.get(row.node)
            if seen is None or seen.beat != row.beat:
                self._seen[row.node] = _Seen(row.beat)
            else:
                seen.silent_ms += since_ms
        for node in self._seen.keys() - {row.node for row in rows}:
            del self._seen[node]

    def _lives(self, row: NodeRow) -> bool:
        return row.beat != LEFT and self._seen[row.node].silent_ms < self._takeover_ms
