"""Our errors as gRPC statuses with rich details (``google.rpc.Status`` with an ``ErrorInfo``), and back.

The domain of the `ErrorInfo` is ``txrpc``, its reason the name of the exception type, its metadata ``xid``, and ``code`` and
``text`` of the `Reason`; so the caller gets the same type with the same reason.  The exception's own sentence is the status's
message, which is the call's details as well (``grpc_status.from_call`` insists on that).

Whether the *end* of a call is known is a question of its own: it is, if the status comes from our server interceptor, which
marks every reply of a joined call with `BRANCHES_KEY` and every refusal with an `ErrorInfo`.  Anything else (a deadline, a lost
connection, a proxy's answer) says nothing about what the handler did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from txrpc import errors as e
from txrpc._wire.metadata import BRANCHES_KEY
from txrpc.ids import Xid

__all__ = ["CODES", "DOMAIN", "STATUS_KEY", "code_of", "details_of", "end_is_known", "from_trailing", "to_trailing"]

DOMAIN: Final = "txrpc"
STATUS_KEY: Final = "grpc-status-details-bin"

CODES: Final[dict[type[e.TxrpcError], grpc.StatusCode]] = {
    e.TransactionTimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
    e.TransactionAborted: grpc.StatusCode.ABORTED,
    e.OutcomeUnknown: grpc.StatusCode.UNKNOWN,
    e.HeuristicOutcome: grpc.StatusCode.DATA_LOSS,
    e.CoordinatorUnavailable: grpc.StatusCode.UNAVAILABLE,
    e.ResourceUnavailable: grpc.StatusCode.UNAVAILABLE,
    e.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    e.Unavailable: grpc.StatusCode.UNAVAILABLE,
    e.IllegalState: grpc.StatusCode.FAILED_PRECONDITION,
    e.NoTransaction: grpc.StatusCode.FAILED_PRECONDITION,
    e.TransactionExists: grpc.StatusCode.FAILED_PRECONDITION,
    e.NotJoined: grpc.StatusCode.FAILED_PRECONDITION,
    e.CallsInFlight: grpc.StatusCode.FAILED_PRECONDITION,
    e.ForkedError: grpc.StatusCode.FAILED_PRECONDITION,
    e.InvalidName: grpc.StatusCode.INVALID_ARGUMENT,
    e.UsageError: grpc.StatusCode.FAILED_PRECONDITION,
    e.ConfigurationError: grpc.StatusCode.FAILED_PRECONDITION,
    e.Fenced: grpc.StatusCode.FAILED_PRECONDITION,
    e.LogBehind: grpc.StatusCode.FAILED_PRECONDITION,
    e.BadMessage: grpc.StatusCode.INVALID_ARGUMENT,
    e.TxrpcError: grpc.StatusCode.UNKNOWN,
}
"""The status of each error; of a type that is not listed, its nearest base's."""

_SENTENCE_MAX_BYTES = 500
"""In bytes, because gRPC percent-encodes each of them that is not ASCII as three, and all metadata together has 8 KiB."""

_BY_NAME: Final = {kind.__name__: kind for kind in CODES}


def code_of(error: e.TxrpcError) -> grpc.StatusCode:
    """The status code of *error*."""
    return CODES[_listed(error)]


def details_of(error: e.TxrpcError) -> str:
    """The sentence that goes with `code_of`: of a length that fits into a header beside the rest."""
    return _cut(str(error))


def to_trailing(error: e.TxrpcError) -> tuple[str, bytes]:
    """The entry of trailing metadata that carries *error*; goes with `code_of` and `details_of`."""
    metadata = {}
    reason = getattr(error, "reason", None)
    if isinstance(reason, e.Reason):
        metadata = {"code": str(int(reason.code)), "text": _cut(reason.text)}
    xid = getattr(error, "xid", None)
    if xid is not None:
        metadata["xid"] = str(xid)
    info = ErrorInfo(reason=_listed(error).__name__, domain=DOMAIN, metadata=metadata)
    packed = AnyMessage()
    packed.Pack(info)
    status = Status(code=code_of(error).value[0], message=details_of(error), details=[packed])
    return STATUS_KEY, status.SerializeToString()


def from_trailing(metadata: Iterable[Any] | None) -> e.TxrpcError | None:
    """The error that trailing metadata carries, or None if it carries none of ours.  Raises nothing."""
    for key, value in metadata or ():
        if key == STATUS_KEY:
            return _from_status(value)
    return None


def end_is_known(metadata: Iterable[Any] | None) -> bool:
    """Return whether a call whose trailing metadata is *metadata* has certainly ended at the server, or never began there."""
    entries = list(metadata or ())
    return any(key == BRANCHES_KEY for key, _ in entries) or from_trailing(entries) is not None


def _from_status(data: Any) -> e.TxrpcError | None:
    try:
        status = Status.FromString(data)
        for packed in status.details:
            info = ErrorInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                return _rebuild(info, status.message)
    except (DecodeError, TypeError, ValueError):
        return None
    return None


def _rebuild(info: ErrorInfo, sentence: str) -> e.TxrpcError | None:
    kind = _BY_NAME.get(info.reason)
    if kind is None:
        return None
    if not issubclass(kind, e.TransactionAborted | e.OutcomeUnknown | e.HeuristicOutcome):
        return kind(sentence)
    code = info.metadata.get("code", "0")
    known = code.isdigit() and int(code) in list(e.AbortCode)
    reason = e.Reason(e.AbortCode(int(code)) if known else e.AbortCode.UNSPECIFIED, info.metadata.get("text", ""))
    xid = info.metadata.get("xid")
    return kind(Xid.parse(xid) if xid else None, reason, sentence)


def _cut(text: str) -> str:
    """At most `_SENTENCE_MAX_BYTES` of UTF-8, without lone surrogates."""
    return text.encode("utf-8", "replace")[:_SENTENCE_MAX_BYTES].decode("utf-8", "ignore")


def _listed(error: e.TxrpcError) -> type[e.TxrpcError]:
    for kind in type(error).__mro__:
        if kind in CODES:
            return kind
    return e.TxrpcError
