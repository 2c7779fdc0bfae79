"""What PostgreSQL's errors, and those of its drivers, mean."""

from __future__ import annotations

import re
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from txrpc._sqlstate import DRIVERS_OWN, connection_lost, sqlstate
from txrpc.errors import AbortCode, Reason, ResourceUnavailable

__all__ = ["classify", "no_connection", "sentence"]

_BY_STATE: Final = {
    "40001": AbortCode.SERIALIZATION_FAILURE,
    "40P01": AbortCode.DEADLOCK,
    "55P03": AbortCode.LOCK_TIMEOUT,
}
_GONE: Final = (
    "the connection broke, and its driver does not say why: a restart, an administrator, or a time-out of the server's own "
    "(idle_in_transaction_session_timeout)"
)
_SAYS_NO_VALUES = ("0A", "25", "28", "3D", "40", "53", "55", "57", "58", "08")
"""Classes whose messages hold no user's data."""


def no_connection(error: BaseException) -> bool:
    """Return whether *error*, which came without a statement, means that the server could not be reached or did not let us in."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return False
    return connection_lost(error) or sqlstate(error)[:2] in ("28", "3D", "53")


def classify(error: BaseException) -> Reason | None:
    """Return why *error* ends the branch, or None if it did not come from the database."""
    if isinstance(error, ResourceUnavailable):
        return Reason(AbortCode.RESOURCE_UNAVAILABLE, str(error))
    if not isinstance(error, DBAPIError):
        return None
    return Reason(_code_of(error), sentence(error))


def _code_of(error: DBAPIError) -> AbortCode:
    state = sqlstate(error)
    if state in _BY_STATE:
        return _BY_STATE[state]
    if state == "0A000" and (error.statement or "").startswith("PREPARE TRANSACTION"):
        return AbortCode.CANNOT_PREPARE
    if state[:2] == "53" or connection_lost(error):  # 53: no room for one more, of whatever there is a limit on
        return AbortCode.RESOURCE_UNAVAILABLE
    return AbortCode.STATEMENT_FAILED


def sentence(error: BaseException) -> str:
    """Return what the database said, without any data in it."""
    origin: Any = getattr(error, "orig", None) or error
    state = sqlstate(error)
    kind = type(origin.__cause__ if type(origin).__name__ == "Error" and origin.__cause__ else origin).__name__
    if state and state[:2] not in _SAYS_NO_VALUES:
        constraint = getattr(getattr(origin, "diag", None), "constraint_name", None)
        return f"{kind} (SQLSTATE {state})" + (f" of constraint {constraint}" if constraint else "")
    if not state and isinstance(error, DRIVERS_OWN):
        return kind
    lines = str(origin).strip().splitlines()
    said = re.sub(r"^<class '[\w.]+'>: ", "", lines[0]) if lines else ""
    if not state and getattr(error, "statement", None) and connection_lost(error):
        return f"{_GONE} ({(said or kind)[:100]})"
    return f"{said or kind} (SQLSTATE {state})" if state else (said or kind)[:300]
