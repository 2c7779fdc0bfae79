"""Wait for what happens, never for a time.  Bounds are generous, and a bound that is reached says what it waited for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from tests.postgres import Server

__all__ = ["aeventually", "eventually", "is_alive", "until_a_backend_waits_for"]

PATIENCE_S = 30.0


def eventually(holds: Callable[[], object], timeout_s: float = PATIENCE_S, evidence: Callable[[], str] = str) -> None:
    """Wait until *holds*; fails with *evidence* if it does not in time."""
    until = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until:
            raise AssertionError(f"{_what(holds)} did not come true in {timeout_s} s\n{evidence()}")
        time.sleep(0.02)


async def aeventually(
    holds: Callable[[], object], timeout_s: float = PATIENCE_S, evidence: Callable[[], str] = str
) -> None:
    """`eventually` for something that happens on this event loop."""
    until = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until:
            raise AssertionError(f"{_what(holds)} did not come true in {timeout_s} s\n{evidence()}")
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until_a_backend_waits_for(server: Server, database: str, event: str) -> None:
    """Wait until a backend of *database* waits for *event*, as pg_stat_activity calls it: PgSleep, transactionid, ..."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND wait_event = '{event}'"
    eventually(lambda: server.execute(query)[0][0], evidence=lambda: f"no backend of {database} waits for {event}")


def _what(holds: Callable[[], object]) -> str:
    code = getattr(holds, "__code__", None)
    return f"what {code.co_filename}:{code.co_firstlineno} waits for" if code else repr(holds)
