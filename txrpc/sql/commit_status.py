"""After a broken connection: asking how its commit ended, and ending the backend that it left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc._client.flow import Flow
from txrpc._protocol.messages import Outcome
from txrpc.sql.common import BranchWork, ServerEnd

__all__ = ["ask_once", "terminate_backend"]

_FAILURES_MAX = 3
_TRIES_MAX = 7
"""The client waits two seconds between them, together: a backend that has not gone by then does not listen."""


def ask_once(
    ask: Callable[[str], Any], break_off: Callable[[ServerEnd], Any], token: str, backend: ServerEnd | None
) -> Flow[Outcome | None]:
    """Ask for *token*; None if it is not known yet.

    A transaction that is still in progress may never have heard of its COMMIT, nor that its client is gone: its *backend* is broken
    off, which settles it one way or the other, unless it waits for a synchronous standby (rule 22).
    """
    try:
        result: Outcome | None = yield ask, (token,)
        if result is None and backend is not None:
            yield break_off, (backend,)
    except Exception:
        return None  # the database is not back yet
    return result


def terminate_backend(
    break_off: Callable[[ServerEnd], Any], gone: Callable[[ServerEnd], Any], work: BranchWork
) -> Flow[bool]:
    """End the backend that *work* has left behind: it may still execute what it was told last, or wait and hold its locks.

    Returns whether it has gone, or is taken for gone.  Whatever broke the connection may break the first tries as well.  After
    three of them the database itself is taken for lost, and its backends with it; should one have lived and prepared its branch,
    the sweep for branches in doubt finds that.
    """
    if not work.left_behind or work.backend is None:
        return True
    tries = work.terminating
    tries.made += 1
    try:
        yield break_off, (work.backend,)
        if (yield gone, (work.backend,)):
            return True
    except Exception:
        tries.failed += 1
    return tries.failed == _FAILURES_MAX or tries.made == _TRIES_MAX
