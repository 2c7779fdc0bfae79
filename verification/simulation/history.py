"""What an observer outside can see of a run: databases, the log's disk, messages, and what applications are told.

Checkers subscribe by having methods with the names of facts.  Nothing here knows how the protocol works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

__all__ = ["FACTS", "History", "Violation"]

FACTS: Final = {
    "saw": "the root saw a call that writes complete: xid, call",
    "listed": "the root asks for the commit of these branches: xid, branches",
    "wrote": "a call wrote in a branch's database transaction: xid, branch, call, incarnation of the process",
    "voted": "a participant says how a branch votes: xid, branch, vote",
    "prepared": "a database has made a branch survive: xid, branch",
    "only_read": "a database has ended a branch that wrote nothing: xid, branch",
    "committed": "a database has committed a branch: xid, branch, calls, was_prepared",
    "undone": "a database has rolled a branch back: xid, branch, was_prepared",
    "ordered": "the coordinator tells a branch how it ends: xid, branch, commit",
    "replied": "the coordinator tells a root how its transaction ended: xid, outcome",
    "told": "the application is told how its transaction ended: xid, outcome",
    "opened": "a coordinator opens the log: node, epoch",
    "registered": "a database has committed a decision with the branch that decided: xid, branch, prepared branches",
    "refused": "a database has it that a transaction is aborted: xid",
    "durable": "a decision is durable: xid, epoch, branches",
    "done": "a decision is marked done: xid",
    "deleted": "a decision's record is deleted: xid, and whether before the retention time",
    "lost": "the log, or a register, comes back without these decisions: xids",
    "reborn": "a register is in another incarnation: what it does not know may have been decided",
    "damaged": "a branch is not what it was: ended by hand, or lost by its database: xid, branch",
    "as_decided": "a damaged branch was found to have ended as decided all the same: branch",
    "incident": "the coordinator keeps it that a branch did not end as decided: xid, branch, finish",
    "doubted": "what the coordinator in office says is in doubt: set of (xid, branch)",
    "rest": "all is repaired and quiet; nothing",
}
"""The facts and their arguments; the time is told to all."""


class Violation(BaseException):
    """A rule is broken.  Not an `Exception`: what catches those on its way must not catch this."""

    def __init__(self, rule: int, text: str) -> None:
        super().__init__(f"rule {rule}: {text}")
        self.rule = rule


class History:
    """Tells facts to checkers, and writes them down if somebody wants to read them."""

    def __init__(self, checkers: Iterable[Any], now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self.lines: list[tuple[int, str, str, str]] | None = None
        """(time, from, to, text), if it is to be read."""
        self._handlers = {
            fact: [getattr(checker, fact) for checker in checkers if hasattr(checker, fact)] for fact in FACTS
        }

    def note(self, fact: str, *arguments: Any) -> None:
        """It is so."""
        now_ms = self._now_ms()
        for handler in self._handlers[fact]:
            handler(now_ms, *arguments)

    def line(self, source: str, target: str, text: Callable[[], str]) -> None:
        """Something that a reader of the trace wants to see: at *source*, or on its way from there to *target*."""
        if self.lines is not None:
            self.lines.append((self._now_ms(), source, target, text()))
