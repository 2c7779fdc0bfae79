"""After a broken connection: learning how its commit ended, and ending the backend that it left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc.flows.driver import Flow
from txrpc.protocol.messages import OnePhaseResult
from txrpc.sql.common import SEE_OFF_BACKOFF_S, TRUTH_BACKOFF_S

__all__ = ["learn", "see_off"]


def learn(
    ask: Callable[[str], Any], break_off: Callable[[int], Any], sleep: Callable[[float], Any], token: str, pid: int
) -> Flow[OnePhaseResult]:
    """Ask for *token* until there is an answer; UNKNOWN after half a minute without the database.

    A transaction that is still in progress may never have heard of its COMMIT, nor that its client is gone: its backend *pid* is
    broken off, which settles it one way or the other.  (In progress, its backend lives, so *pid* is nobody else's.)
    """
    for pause_s in TRUTH_BACKOFF_S:
        try:
            result: OnePhaseResult | None = yield ask, (token,)
            if result is None:
                yield break_off, (pid,)
        except Exception:
            result = None  # the database is not back yet
        if result is not None:
            return result
        yield sleep, (pause_s,)
    return OnePhaseResult.UNKNOWN


def see_off(
    break_off: Callable[[int], Any], gone: Callable[[int], Any], sleep: Callable[[float], Any], pid: int
) -> Flow[None]:
    """End the backend *pid* of a lost connection: it may still execute what it was told last, or wait and hold its locks.

    Whatever broke the connection may break the first tries as well.  After three of them the database itself is taken for lost,
    and its backends with it; should one have lived and prepared its branch, the sweep for branches in doubt finds that.
    """
    failures = 0
    for pause_s in SEE_OFF_BACKOFF_S if pid else ():
        yield sleep, (pause_s,)
        try:
            yield break_off, (pid,)
            if (yield gone, (pid,)):
                return
        except Exception:
            failures += 1
            if failures == 3:
                return
