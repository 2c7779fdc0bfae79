"""What the errors of MySQL and MariaDB, and those of their drivers, mean."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from txrpc.errors import AbortCode, Reason, ResourceUnavailable

__all__ = [
    "DUPLICATE",
    "NO_SUCH_XA",
    "OUTSIDE",
    "classify",
    "code_of",
    "connection_lost",
    "is_locked",
    "no_connection",
    "refused",
    "sentence",
]

DUPLICATE: Final = 1062
LOCK_WAIT: Final = 1205
DEADLOCK: Final = 1213
NO_SUCH_XA: Final = 1397
XA_STATE: Final = 1399
OUTSIDE: Final = 1400

_CODES: Final = {
    LOCK_WAIT: AbortCode.LOCK_TIMEOUT,
    3572: AbortCode.LOCK_TIMEOUT,  # NOWAIT, MySQL's
    1613: AbortCode.LOCK_TIMEOUT,  # XA_RBTIMEOUT
    DEADLOCK: AbortCode.DEADLOCK,
    1614: AbortCode.DEADLOCK,  # XA_RBDEADLOCK
    1020: AbortCode.SERIALIZATION_FAILURE,  # MariaDB, innodb_snapshot_isolation
    1040: AbortCode.RESOURCE_UNAVAILABLE,  # too many connections
    1203: AbortCode.RESOURCE_UNAVAILABLE,
    1021: AbortCode.RESOURCE_UNAVAILABLE,  # the disk is full
    1041: AbortCode.RESOURCE_UNAVAILABLE,  # out of memory
    1114: AbortCode.RESOURCE_UNAVAILABLE,  # the table is full
    1290: AbortCode.RESOURCE_UNAVAILABLE,  # read only, or another such option
    1836: AbortCode.RESOURCE_UNAVAILABLE,
}
_GONE: Final = frozenset({1053, 1077, 1079, 1080, 1152, 1153, 1158, 1159, 1160, 1161, 1317, 1927, 3024, 4031})
"""The server is shutting down, or has broken off the connection or the statement."""
_NO_ENTRY: Final = frozenset({1040, 1044, 1045, 1049, 1129, 1130, 1203, 1226, 1698})
"""What a server says to one that it does not let in."""
_SAYS_NO_VALUES: Final = _GONE | _NO_ENTRY | set(_CODES) | {NO_SUCH_XA, XA_STATE, OUTSIDE, 1142, 1146, 1227, 1792}
"""Errors whose messages hold no user's data."""


def code_of(error: BaseException) -> int:
    """The number of a server's or a driver's error; 0 if it has none."""
    arguments = getattr(getattr(error, "orig", error), "args", ())
    first: Any = arguments[0] if arguments else 0
    return first if isinstance(first, int) else 0


def _is_servers(code: int) -> bool:
    """2000 to 2999, and 5000 and more, are the clients' own."""
    return 1000 <= code < 2000 or 3000 <= code < 5000


def connection_lost(error: BaseException) -> bool:
    """Return whether *error* means that the connection is gone, so that the end of the statement is not known."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    code = code_of(error)
    return error.connection_invalidated or code in _GONE or not _is_servers(code)


def no_connection(error: BaseException) -> bool:
    """Return whether *error*, which came without a statement, means that the server could not be reached or did not let us in."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return False
    return connection_lost(error) or code_of(error) in _NO_ENTRY


def refused(error: BaseException) -> bool:
    """Return whether the server itself has said no, so that what was asked for has certainly not been done."""
    return isinstance(error, DBAPIError) and _is_servers(code_of(error)) and not connection_lost(error)


def is_locked(error: BaseException) -> bool:
    """Return whether another transaction holds what *error*'s statement wanted."""
    return _CODES.get(code_of(error)) in (AbortCode.LOCK_TIMEOUT, AbortCode.DEADLOCK)


def classify(error: BaseException) -> Reason | None:
    """Return why *error* ends the branch, or None if it did not come from the database."""
    if isinstance(error, ResourceUnavailable):
        return Reason(AbortCode.RESOURCE_UNAVAILABLE, str(error))
    if not isinstance(error, DBAPIError):
        return None
    lost = AbortCode.RESOURCE_UNAVAILABLE if connection_lost(error) else AbortCode.STATEMENT_FAILED
    return Reason(_CODES.get(code_of(error), lost), sentence(error))


def sentence(error: BaseException) -> str:
    """Return what the database said, without any data in it."""
    origin: Any = getattr(error, "orig", None) or error
    code = code_of(error)
    said = str(origin.args[1]) if len(getattr(origin, "args", ())) > 1 else ""
    if not code or not said or (_is_servers(code) and code not in _SAYS_NO_VALUES):
        return f"{type(origin).__name__} ({code})" if code else type(origin).__name__
    return f"{said[:300]} ({code})"
