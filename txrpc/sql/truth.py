"""Learning how a commit ended whose connection broke: ask the database until it knows, or has forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc.flows.driver import Flow
from txrpc.protocol.messages import OnePhaseResult
from txrpc.sql.common import TRUTH_BACKOFF_S

__all__ = ["learn"]


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
