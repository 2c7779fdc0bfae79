"""What PostgreSQL has answered, and whether that settles a statement: for resources and for the decision log."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.exc import DataError, DBAPIError, NotSupportedError, ProgrammingError

__all__ = ["DRIVERS_OWN", "connection_lost", "refused", "sqlstate"]

DRIVERS_OWN: Final = (ProgrammingError, DataError, NotSupportedError)
"""Without an SQLSTATE these are the driver's, about the statement or its values; the connection has nothing to do with them."""


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of a driver's error, or ""."""
    origin: Any = getattr(error, "orig", error)
    return getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None) or ""


def connection_lost(error: BaseException) -> bool:
    """Return whether *error* means that the connection is gone, so that the end of the statement is not known."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    state = sqlstate(error)
    if not state:
        return error.connection_invalidated or not isinstance(error, DRIVERS_OWN)
    return error.connection_invalidated or state[:2] == "08" or state[:3] == "57P"


def refused(error: BaseException) -> bool:
    """Return whether the server itself has said no, so that what was asked for has certainly not been done."""
    return isinstance(error, DBAPIError) and bool(sqlstate(error)) and not connection_lost(error)
