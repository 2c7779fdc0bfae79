"""After a broken connection: asking how its commit ended, and ending the backend that it left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc._client.flow import Flow
from txrpc._protocol.messages import Outcome
from txrpc.sql.backend import Backend
from txrpc.sql.common import TERMINATE_BACKOFF_S

__all__ = ["ask_once", "terminate_backend"]


def ask_once(
    ask: Callable[[str], Any], break_off: Callable[[Backend], Any], token: str, backend: Backend | None
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
    break_off: Callable[[Backend], Any],
    gone: Callable[[Backend], Any],
    sleep: Callable[[float], Any],
    backend: Backend | None,
) -> Flow[None]:
    """End the *backend* of a lost connection: it may still execute what it was told last, or wait and hold its locks.

    Whatever broke the connection may break the first tries as well.  After three of them the database itself is taken for lost,
    and its backends with it; should one have lived and prepared its branch, the sweep for branches in doubt finds that.
    """
    failures = 0
    for pause_s in TERMINATE_BACKOFF_S if backend is not None else ():
        yield sleep, (pause_s,)
        try:
            yield break_off, (backend,)
            if (yield gone, (backend,)):
                return
        except Exception:
            failures += 1
            if failures == 3:
                return
