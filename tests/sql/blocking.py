"""An `AsyncResourceManager` behind blocking verbs, so that one test holds for both halves of `txrpc.sql`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import txrpc.sql

__all__ = ["ASYNC_DRIVERS", "Blocking"]

ASYNC_DRIVERS = {"asyncpg": "asyncpg", "psycopg async": "psycopg"}
"""Names of the fixture `driver`, and SQLAlchemy's."""

_T = TypeVar("_T")
_VERBS = (
    "start",
    "close",
    "begin",
    "prepare",
    "prepare_early",
    "how_it_ended",
    "rollback",
    "interrupt",
    "commit_prepared",
    "rollback_prepared",
    "in_doubt",
    "one_phase_result",
    "terminate",
)


class _Loop:
    """An event loop of its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(110)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Blocked:
    """An object whose coroutine methods block."""

    def __init__(self, wrapped: Any, loop: _Loop) -> None:
        self._wrapped, self._run_on = wrapped, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name == "connection":
            return _Blocked(value, self._run_on)
        if not asyncio.iscoroutinefunction(value):
            return value
        return lambda *arguments, **options: self._run_on.run(value(*arguments, **options))


class Blocking(_Blocked):
    """See the module's docstring.  ``engine`` is a synchronous one beside it, to look at the database with."""

    def __init__(
        self, url: sa.URL, driver: str, plain: str = "postgresql+psycopg", decides: bool = False, **options: Any
    ) -> None:
        database = url.get_backend_name()
        self._async_engine = create_async_engine(url.set(drivername=f"{database}+{driver}"), **options)
        super().__init__(txrpc.sql.AsyncResourceManager("bank", self._async_engine, decides=decides), _Loop())
        self.engine = sa.create_engine(url.set(drivername=plain), poolclass=NullPool)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        return self._verb(value) if name in _VERBS else value

    def commit_one_phase(self, work: Any, committing: Callable[[str], Any]) -> Any:
        async def tell(token: str) -> None:
            await asyncio.to_thread(committing, token)

        return self._run_on.run(self._wrapped.commit_one_phase(work._wrapped, tell))

    def stop(self) -> None:
        """Close everything."""
        self.close()
        self._run_on.run(self._async_engine.dispose())
        self._run_on.stop()

    def _verb(self, verb: Any) -> Any:
        def run(*arguments: Any) -> Any:
            plain = (each._wrapped if isinstance(each, _Blocked) else each for each in arguments)
            result = self._run_on.run(verb(*plain))
            return _Blocked(result, self._run_on) if verb.__name__ == "begin" else result

        return run
