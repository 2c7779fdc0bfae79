"""Connections on which branches have been prepared, until they are finished there: see `txrpc.sql.mysql`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection

from txrpc.ids import Gid
from txrpc.sql.common import BranchWork, Guard
from txrpc.sql.mysql_finishing import CLOSING_S, finish_here, free, hang_up, take_out

__all__ = ["AsyncKept"]

_MOST: Final = 50
"""While a coordinator is away, branches that have voted may become more and more."""
_SPARE: Final = 10


class AsyncKept:
    """The connections of one resource, in no pool any more: at most 50, and ten that are free again."""

    def __init__(self) -> None:
        self._kept: dict[Gid, tuple[str, AsyncConnection, Any]] = {}
        self._free: list[tuple[AsyncConnection, Any]] = []
        self.closed = False

    async def keep(self, gid: Gid, token: str, work: BranchWork, guard: Guard) -> None:
        """Keep the connection of *work*, whose branch is prepared as *gid*; one too many is closed, the oldest.  Never raises.

        Once these are closed, none is kept: a vote may come to its end after that.
        """
        work.give_back()
        try:
            await work.connection.run_sync(guard.release)
            self._kept[gid] = (token, work.connection, await work.connection.run_sync(take_out))
        except Exception:
            with suppress(Exception):
                await work.connection.invalidate()
        while len(self._kept) > (0 if self.closed else _MOST):
            with suppress(KeyError, RuntimeError, StopIteration):  # another one was faster
                await self._close(*self._kept.pop(next(iter(self._kept)))[1:])

    async def finish(self, commit: bool, gid: Gid) -> bool:
        """Finish *gid* where it was prepared; return False if that must be done from elsewhere."""
        token, connection, driver = self._kept.pop(gid, ("", None, None))
        if connection is None:
            return False
        try:
            await connection.run_sync(finish_here, commit, token)
        except BaseException as error:  # how it has ended, another connection asks
            await self._close(connection, driver)
            if not isinstance(error, Exception):
                raise
            await asyncio.sleep(CLOSING_S)
            return False
        self._free.append((connection, driver))
        while len(self._free) > (0 if self.closed else _SPARE):
            with suppress(IndexError):  # another one was faster
                await self._close(*self._free.pop(0))
        return True

    def spare(self) -> Any:
        """Return a driver's connection that is free again, for the pool that it came from, or None.

        A new one may cost more than the branch: PyMySQL reads the system's certificates each time.
        """
        driver = None
        with suppress(IndexError):
            while driver is None:
                driver = free(*self._free.pop())
        return driver

    async def close(self) -> None:
        """Close all of them; any process can finish their branches then."""
        self.closed = True
        while self._kept:
            _gid, (_token, connection, driver) = self._kept.popitem()
            await self._close(connection, driver)
        while self._free:
            await self._close(*self._free.pop())

    async def _close(self, connection: AsyncConnection, driver: Any) -> None:
        with suppress(Exception):
            await connection.run_sync(hang_up, driver)
