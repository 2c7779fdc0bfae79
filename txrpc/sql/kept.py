"""Connections on which branches have been prepared, until they are finished there: see `txrpc.sql.mysql`."""

# Written by scripts/twins.py from kept_async.py: change that one.

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.engine import Connection

from txrpc.ids import Gid
from txrpc.sql.common import BranchWork, Guard
from txrpc.sql.mysql_finishing import CLOSING_S, finish_here, hang_up, take_out

__all__ = ["Kept"]

_MOST: Final = 50
"""While a coordinator is away, branches that have voted may become more and more."""


class Kept:
    """The connections of one resource, in no pool any more: at most 50."""

    def __init__(self) -> None:
        self._kept: dict[Gid, tuple[str, Connection, Any]] = {}

    def keep(self, gid: Gid, token: str, work: BranchWork, guard: Guard) -> None:
        """Keep the connection of *work*, whose branch is prepared as *gid*; one too many is closed, the oldest.  Never raises.

        Once *guard* is removed, none is kept: a vote may come to its end after the resource was closed.
        """
        work.give_back()
        try:
            guard.release(work.connection)
            self._kept[gid] = (token, work.connection, take_out(work.connection))
        except Exception:
            with suppress(Exception):
                work.connection.invalidate()
        while len(self._kept) > (0 if guard.removed else _MOST):
            with suppress(KeyError, RuntimeError, StopIteration):  # another one was faster
                self._close(*self._kept.pop(next(iter(self._kept)))[1:])

    def finish(self, commit: bool, gid: Gid) -> bool:
        """Finish *gid* where it was prepared; return False if that must be done from elsewhere.  Closes the connection."""
        token, connection, driver = self._kept.pop(gid, ("", None, None))
        if connection is None:
            return False
        try:
            finish_here(connection, commit, token)
            ended = True
        except Exception:  # how it has ended, another connection asks
            ended = False
        finally:
            self._close(connection, driver)
        if not ended:
            time.sleep(CLOSING_S)
        return ended

    def close(self) -> None:
        """Close all of them; any process can finish their branches then."""
        while self._kept:
            _gid, (_token, connection, driver) = self._kept.popitem()
            self._close(connection, driver)

    def _close(self, connection: Connection, driver: Any) -> None:
        with suppress(Exception):
            hang_up(connection, driver)
