"""Learning how a commit ended whose connection broke: ask the database until it knows, or has forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc.flows.driver import Flow
from txrpc.protocol.messages import OnePhaseResult
from txrpc.sql.common import TRUTH_BACKOFF_S

__all__ = ["learn"]


def learn(ask: Callable[[str], Any], sleep: Callable[[float], Any], token: str) -> Flow[OnePhaseResult]:
    """Ask for *token* until there is an answer; UNKNOWN after half a minute without the database."""
    for pause_s in TRUTH_BACKOFF_S:
        try:
            result: OnePhaseResult | None = yield ask, (token,)
        except Exception:
            result = None  # the database is not back yet
        if result is not None:
            return result
        yield sleep, (pause_s,)
    return OnePhaseResult.UNKNOWN
