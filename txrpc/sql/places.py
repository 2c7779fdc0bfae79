"""Places among those that may have a connection: as many as an engine's pool has connections.

The pool's own wait for a connection knows nothing of deadlines.
"""

from __future__ import annotations

import asyncio
import threading

__all__ = ["AsyncPlaces", "Places"]

_UNBOUNDED = 1_000_000_000


class Places:
    """A semaphore with a bound on the wait.  Thread-safe."""

    def __init__(self, capacity: int | None) -> None:
        self._free = threading.Semaphore(capacity or _UNBOUNDED)
        self.release = self._free.release

    def acquire(self, timeout_s: float | None) -> bool:
        """Take a place; return False if none became free within *timeout_s* (None: wait for ever)."""
        return self._free.acquire(timeout=timeout_s)


class AsyncPlaces:
    """A semaphore with a bound on the wait, for the tasks of one event loop."""

    def __init__(self, capacity: int | None) -> None:
        self._free = asyncio.Semaphore(capacity or _UNBOUNDED)
        self.release = self._free.release

    async def acquire(self, timeout_s: float | None) -> bool:
        """Take a place; return False if none became free within *timeout_s* (None: wait for ever)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError:
            return False
        return True
