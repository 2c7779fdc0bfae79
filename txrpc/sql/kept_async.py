"""Connections on which branches have been prepared, until they are finished there: see `txrpc.sql.mysql`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection

from txrpc.ids import Gid
from txrpc.sql.common import BranchWork, Guard
from txrpc.sql.mysql_finishing import CLOSING_S, finish_here, hang_up, take_out

__all__ = ["AsyncKept"]

_MOST: Final = 50
"""While a coordinator is away, branches that have voted may become more and more."""


class AsyncKept:
    """The connections of one resource, in no pool any more: at most 50."""

    def __init__(self) -> None:
        self._kept: dict[Gid, tuple[str, AsyncConnection, Any]] = {}

    async def keep(self, gid: Gid, token: str, work: BranchWork, guard: Guard) -> None:
        """Keep the connection of *work*, whose branch is prepared as *gid*; one too many is closed, the oldest.  Never raises.

        Once *guard* is removed, none is kept: a vote may come to its end after the resource was closed.
        """
        work.give_back()
        try:
            await work.connection.run_sync(guard.release)
            self._kept[gid] = (token, work.connection, await work.connection.run_sync(take_out))
        except Exception:
            with suppress(Exception):
                await work.connection.invalidate()
        while len(self._kept) > (0 if guard.removed else _MOST):
            with suppress(KeyError, RuntimeError, StopIteration):  # another one was faster
                await self._close(*self._kept.pop(next(iter(self._kept)))[1:])

    async def finish(self, commit: bool, gid: Gid) -> bool:
        """Finish *gid* where it was prepared; return False if that must be done from elsewhere.  Closes the connection."""
        token, connection, driver = self._kept.pop(gid, ("", None, None))
        if connection is None:
            return False
        try:
            await connection.run_sync(finish_here, commit, token)
            ended = True
        except Exception:  # how it has ended, another connection asks
            ended = False
        finally:
            await self._close(connection, driver)
        if not ended:
            await asyncio.sleep(CLOSING_S)
        return ended

    async def close(self) -> None:
        """Close all of them; any process can finish their branches then."""
        while self._kept:
            _gid, (_token, connection, driver) = self._kept.popitem()
            await self._close(connection, driver)

    async def _close(self, connection: AsyncConnection, driver: Any) -> None:
        with suppress(Exception):
            await connection.run_sync(hang_up, driver)
