"""The checkers of what an operator must see: branches in doubt, and branches that did not end as decided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verification.simulation.history import Violation

__all__ = ["IN_DOUBT"]


class NothingInTheDark:
    """14: what is decided and not finished is shown by the coordinator in office; in the end nothing is."""

    def __init__(self) -> None:
        self._open: dict[Any, Any] = {}
        self._gone: set[Any] = set()
        self._prepared: set[Any] = set()

    def prepared(self, _now_ms: int, _xid: Any, branch: Any) -> None:
        self._prepared.add(branch)

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, branches: Iterable[Any]) -> None:
        self._open.update({branch: xid for branch in branches if branch in self._prepared - self._gone})

    def committed(self, _now_ms: int, _xid: Any, branch: Any, _calls: Any, _was_prepared: bool) -> None:
        self._open.pop(branch, None)
        self._prepared.discard(branch)

    def undone(self, _now_ms: int, _xid: Any, branch: Any, _was_prepared: bool) -> None:
        self._prepared.discard(branch)

    def lost(self, _now_ms: int, xids: Iterable[Any]) -> None:
        gone = set(xids)
        self._open = {branch: xid for branch, xid in self._open.items() if xid not in gone}

    def damaged(self, _now_ms: int, _xid: Any, branch: Any) -> None:
        self._open.pop(branch, None)
        self._gone.add(branch)
        self._prepared.discard(branch)

    def doubted(self, _now_ms: int, shown: set[tuple[Any, Any]]) -> None:
        for branch, xid in self._open.items():
            if (xid, branch) not in shown:
                raise Violation(
                    14, f"{xid}: branch {branch} is decided and not finished, and the coordinator does not show it"
                )

    def rest(self, _now_ms: int) -> None:
        if self._prepared:
            raise Violation(14, f"still in doubt: {self._prepared}")


class Incidents:
    """16: a branch of a committed transaction that its database has lost, or that was rolled back by hand, is an incident."""

    def __init__(self) -> None:
        self._damaged: dict[Any, Any] = {}
        self._decided: dict[Any, set[Any]] = {}
        self._kept: set[Any] = set()

    def damaged(self, _now_ms: int, xid: Any, branch: Any) -> None:
        self._damaged[branch] = xid

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, branches: Iterable[Any]) -> None:
        self._decided[xid] = set(branches)

    def registered(self, now_ms: int, xid: Any, _branch: Any, branches: Iterable[Any]) -> None:
        self.durable(now_ms, xid, None, branches)

    def lost(self, _now_ms: int, xids: Iterable[Any]) -> None:
        for xid in xids:
            self._decided.pop(xid, None)

    def incident(self, _now_ms: int, _xid: Any, branch: Any, _finish: Any) -> None:
        self._kept.add(branch)

    def as_decided(self, _now_ms: int, branch: Any) -> None:
        self._damaged.pop(branch, None)

    def rest(self, _now_ms: int) -> None:
        dark = [b for b, xid in self._damaged.items() if b in self._decided.get(xid, ()) and b not in self._kept]
        if dark:
            raise Violation(16, f"branches that did not end as decided, and are no incident: {dark}")


IN_DOUBT: tuple[type[Any], ...] = (NothingInTheDark, Incidents)
