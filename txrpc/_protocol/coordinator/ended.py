"""Ended transactions, remembered until no request about them can come any more (rules 5, 10 and 12).

How to think of it: every request names the coordinator's own clock as its client knew it at begin, the *tick*.  Ended
transactions are kept in generations, youngest last.  When a generation goes, `floor` rises to the tick at which it was closed:
whatever ended in it began before, so every request about it is below the floor, and requests below the floor are refused.
Memory is bounded by time and by number, and forgetting is safe by arithmetic on one clock; clients' clocks do not matter.
"""

from __future__ import annotations

from collections import deque

from txrpc.errors import Reason
from txrpc.ids import Xid

__all__ = ["EndedTransactions"]

_GENERATIONS = 4


class EndedTransactions:
    """A map from XID to how it ended (None for COMMITTED, the reason for ABORTED), in generations."""

    def __init__(self, horizon: int, limit: int, tick: int) -> None:
        """*horizon* in ticks: how long at least to remember; *limit*: how many entries at most, all generations together."""
        self._span = max(1, -(-horizon // (_GENERATIONS - 1)))
        self._limit = max(1, limit // _GENERATIONS)
        self._old: deque[tuple[int, dict[Xid, Reason | None]]] = deque()
        self._young: dict[Xid, Reason | None] = {}
        self._opened = tick
        self.floor = 0
        """The tick below which nothing is remembered any more, so that the absence of an entry proves nothing."""

    def __contains__(self, xid: Xid) -> bool:
        return xid in self._young or any(xid in entries for _, entries in self._old)

    def __len__(self) -> int:
        return len(self._young) + sum(len(entries) for _, entries in self._old)

    def __getitem__(self, xid: Xid) -> Reason | None:
        for entries in (self._young, *(old for _, old in self._old)):
            if xid in entries:
                return entries[xid]
        raise KeyError(xid)

    def add(self, xid: Xid, ended: Reason | None) -> None:
        """Remember how *xid* ended.  The first end stands: it is what others have been told."""
        if xid not in self:
            self._young[xid] = ended

    def discard(self, xid: Xid) -> None:
        """Remember it no more."""
        for entries in (self._young, *(old for _, old in self._old)):
            entries.pop(xid, None)

    def advance(self, tick: int) -> None:
        """Let go of what no request above the floor can ask for."""
        if tick - self._opened < self._span and len(self._young) < self._limit:
            return
        # Strictly above every tick at which something in this generation can have begun.
        self._old.append((tick + 1, self._young))
        self._young, self._opened = {}, tick
        while len(self._old) >= _GENERATIONS:
            self.floor = self._old.popleft()[0]
