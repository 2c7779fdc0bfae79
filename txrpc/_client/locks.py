"""The lock of an open branch: whose turn it is to use its work, for threads and for tasks."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

__all__ = ["AsyncBranchLock", "BranchLock"]


class BranchLock:
    """A lock that its holder's thread may take again, and that any thread may give back."""

    __slots__ = ("_depth", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._depth = 0

    def acquire(self, timeout_s: float) -> bool:
        """Take it, waiting for at most *timeout_s*."""
        me = threading.get_ident()
        if self._owner != me:
            if not self._lock.acquire(timeout=max(0.0, timeout_s)):
                return False
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back."""
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._lock.release()


class AsyncBranchLock:
    """A lock that its holder's task may take again, and that any task may give back."""

    __slots__ = ("_depth", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self._depth = 0

    async def acquire(self, timeout_s: float) -> bool:
        """Take it, waiting for at most *timeout_s*."""
        me = asyncio.current_task()
        if self._owner is not me or me is None:
            try:
                async with asyncio.timeout(max(0.0, timeout_s)):
                    await self._lock.acquire()
            except TimeoutError:
                return False
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
