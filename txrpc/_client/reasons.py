"""From an exception to the reason for which a transaction ends."""

from __future__ import annotations

from txrpc.errors import (
    AbortCode,
    BadMessage,
    CoordinatorUnavailable,
    LimitExceeded,
    Reason,
    ResourceUnavailable,
    TxrpcError,
)

__all__ = ["cannot_tell", "reason_of"]

_TEXT_MAX = 300
_CODES: dict[type[TxrpcError], AbortCode] = {
    CoordinatorUnavailable: AbortCode.COORDINATOR_UNAVAILABLE,
    ResourceUnavailable: AbortCode.RESOURCE_UNAVAILABLE,
    LimitExceeded: AbortCode.LIMIT_EXCEEDED,
    BadMessage: AbortCode.PROTOCOL_VIOLATION,
}


def cannot_tell(name: str) -> Reason:
    """Return why the end of a commit in one phase is not known, which resource *name* cannot tell."""
    text = f"the connection to {name} broke during COMMIT, and the database cannot tell how it ended"
    return Reason(AbortCode.UNSPECIFIED, text)


def reason_of(error: BaseException) -> Reason:
    """The reason that an error of txrpc's carries or stands for; else that the application failed, and with what."""
    if not isinstance(error, TxrpcError):
        return Reason(AbortCode.APPLICATION_ERROR, f"{type(error).__name__}: {error}"[:_TEXT_MAX])
    reason = getattr(error, "reason", None)
    if isinstance(reason, Reason):
        return reason
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), AbortCode.APPLICATION_ERROR)
    return Reason(code, str(error))
