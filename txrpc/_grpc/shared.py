"""What the synchronous and the asyncio interceptors decide alike: which metadata goes out, and what the end of a call means."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import grpc

from txrpc._client.reasons import reason_of
from txrpc._context import bind, current, current_decides
from txrpc._failpoints import failpoint
from txrpc._grpc.ports import AsyncServerContext, Handle, Metadata, OutgoingCallPort, ServerContext
from txrpc._protocol.messages import CallReport, TransactionContext
from txrpc._wire.metadata import BRANCHES_KEY, CONTEXT_KEY, XID_KEY, encode_context, encode_report, find_report
from txrpc._wire.status import code_of, details_of, end_is_known, from_trailing, to_trailing
from txrpc.errors import (
    AbortCode,
    BadMessage,
    ConfigurationError,
    LimitExceeded,
    NotJoined,
    Reason,
    TxrpcError,
    UsageError,
    aborted,
)

__all__ = [
    "NO_PART",
    "REPLACED",
    "ContextEntry",
    "Ending",
    "Failed",
    "Outside",
    "bound",
    "check_sent",
    "conclude",
    "ending_of",
    "has_context",
    "has_failed",
    "has_joined",
    "lost_reason",
    "outgoing_fields",
    "plain_ending_of",
    "refusal_of",
    "refuse_stream",
    "replaced",
    "trailing_of",
]

logger = logging.getLogger("txrpc.session")

NO_PART = (
    "the server that answered takes no part in transactions, or something on the way took its answer's trailing metadata, and "
    "what it did stays: build it with txrpc.server_interceptors(); or say that the call is meant to be outside, with "
    "client_interceptors(outside=[{!r}]) or in a block of transaction(propagation='not_supported')"
)
REPLACED = (
    "an interceptor put something else in place of the call: txrpc's interceptors must be next to the network, below it; "
    "txrpc.intercept_channel(channel) puts them there, and grpc.aio takes them last in interceptors=[...]"
)


def bound(handle: Handle, iterator: Iterator[Any]) -> Iterator[Any]:
    """The items of *iterator*, with *handle* current while it makes them and only then."""
    while True:
        with bind(handle):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


# ------------------------------------------------------------------------------------------------------- client side


class Outside:
    """Which methods are called outside of any transaction: ``/package.Service/Method``, or ``/package.Service/*``."""

    def __init__(self, methods: Iterable[str]) -> None:
        """Raises `ConfigurationError` for what is no method."""
        given = [methods] if isinstance(methods, str) else list(methods)
        for method in given:
            if not isinstance(method, str) or not _METHOD.fullmatch(method):
                raise ConfigurationError(f"outside= takes methods as '/package.Service/Method', not {method!r}")
        self._methods = frozenset(method for method in given if not method.endswith("*"))
        self._services = tuple(method[:-1] for method in given if method.endswith("*"))

    def __contains__(self, method: str) -> bool:
        return method in self._methods or (bool(self._services) and method.startswith(self._services))


_METHOD = re.compile(r"/[\w.]+/(?:\w+|\*)")


class ContextEntry(NamedTuple):
    """The metadata's entry with the transaction's context, as an interceptor of ours makes it.

    What a user passes on from an incoming call is a plain tuple.
    """

    key: str
    value: bytes


def refuse_stream(responses: bool) -> None:
    """Raise `UsageError` if the call is to decide its transaction, and *responses* may come before it has."""
    if responses and current_decides():
        raise UsageError(
            "the call that decides a transaction has one response: of a stream the first ones would come too early"
        )


def has_context(metadata: Iterable[Any] | None) -> bool:
    """True if an interceptor of ours has already added the context: it was given twice, and the outer one does the work."""
    return any(isinstance(entry, ContextEntry) for entry in metadata or ())


def has_joined(transaction: TransactionContext) -> bool:
    """True if the running code is in a call of *transaction* that has been joined: the interceptor was given twice."""
    handle: Handle | None = current()
    return handle is not None and handle.joined and handle.xid == transaction.xid


def outgoing_fields(
    out: OutgoingCallPort, timeout: float | None, metadata: Iterable[Any] | None
) -> tuple[float, list[Any]]:
    """The call's timeout and metadata: the user's, and the transaction's on top.

    Code that passes on the metadata of an incoming call passes on a context as well; there may be only one, and it is ours.
    """
    failpoint("client.before_call")
    time_left_s = out.time_left_s
    entries = [entry for entry in metadata or () if entry[0] not in (CONTEXT_KEY, XID_KEY)]
    out.bounded = timeout is None or timeout >= time_left_s
    entries.append(ContextEntry(CONTEXT_KEY, encode_context(out.context)))
    entries.append((XID_KEY, str(out.context.xid)))
    return (time_left_s if timeout is None else min(timeout, time_left_s)), entries


def conclude(
    out: OutgoingCallPort,
    method: str,
    code: grpc.StatusCode | None,
    details: str | None,
    trailing: Metadata,
    error: object,
) -> TxrpcError | None:
    """Tell the transaction how a call ended; returns what to raise in place of gRPC's error, if it is one of ours."""
    failpoint("client.after_call")
    try:
        report = find_report(trailing)
    except BadMessage as bad:
        out.lost(Reason(AbortCode.PROTOCOL_VIOLATION, f"{method}: {bad}"[:_TEXT_MAX]))
        return None
    if code is grpc.StatusCode.OK:
        if report is not None:
            out.replied(report)
            return None
        # A real call has trailing metadata, if only empty; and who joins always reports.
        no_part = Reason(AbortCode.NOT_JOINED, f"{method}: {NO_PART.format(method)}")
        reason = replaced(method) if trailing is None else no_part
        out.lost(reason)
        return NotJoined(reason.text)
    text = f"{method}: {code.name if code is not None else 'no status'}: {details or ''}"[:_TEXT_MAX]
    if not end_is_known(trailing):
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and out.bounded:
            passed = Reason(AbortCode.TIMED_OUT, f"the transaction's deadline passed during {method}")
            out.lost(passed)
            return out.error(passed)
        out.lost(Reason(AbortCode.CALL_END_UNKNOWN, text))
        return None
    mapped = from_trailing(trailing)
    failure = reason_of(mapped) if mapped is not None else Reason(AbortCode.APPLICATION_ERROR, text)
    out.replied(report, failure, (mapped or error, code))
    return mapped


def replaced(method: str) -> Reason:
    """Something that is no call of gRPC's came back for one: a mistake in how the channel was set up."""
    return Reason(AbortCode.NOT_JOINED, f"{method}: {REPLACED}")


def lost_reason(method: str, error: BaseException) -> Reason:
    """Return why the end of a call is not known."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Reason(AbortCode.CALL_END_UNKNOWN, f"{method}: {text}"[:_TEXT_MAX])


_TEXT_MAX = 300


# ------------------------------------------------------------------------------------------------------- server side


class Ending(NamedTuple):
    """How the reply of a joined call must end: trailing metadata always, a status only if it is ours to say."""

    trailing: list[tuple[str, Any]]
    code: Any = None
    details: str = ""


def trailing_of(users: Iterable[Any] | None, ours: Iterable[tuple[str, Any]]) -> tuple[Any, ...]:
    """The user's trailing metadata and ours; ours wins where the key is the same."""
    ours = list(ours)
    keys = {key for key, _ in ours}
    return (*((key, value) for key, value in users or () if key not in keys), *ours)


def ending_of(handle: Handle, report: CallReport, error: BaseException | None, users_status: bool) -> Ending:
    """The end of a call whose handler returned (*error* is None) or raised.

    A txrpc error travels as itself, and what a called service answered goes on as it came.  Where the user chose a status it
    stays; for any other exception in a doomed transaction the caller learns why it is doomed.
    """
    failpoint("participant.before_reply")
    ours: TxrpcError | None = error if isinstance(error, TxrpcError) else None
    answered = None if error is None or users_status else _answered(error, [])
    if (
        answered is None
        and ours is None
        and isinstance(error, Exception)
        and not users_status
        and handle.doom is not None
    ):
        ours = aborted(handle.xid, handle.doom)
        # gRPC logs what a handler raises, but not in place of what it is replaced by.
        logger.error("a method of transaction %s failed, which can only roll back anyway", handle.xid, exc_info=error)
    try:
        encoded = encode_report(report)
    except LimitExceeded as too_many:
        # The root must not commit without the branches that it cannot be told of.
        handle.failed(too_many)
        encoded = encode_report(CallReport((), Reason(AbortCode.LIMIT_EXCEEDED, str(too_many))))
        ours = too_many
    trailing: list[tuple[str, Any]] = [(BRANCHES_KEY, encoded)]
    if ours is None:
        return Ending(trailing) if answered is None else answered._replace(trailing=trailing)
    return Ending([*trailing, to_trailing(ours)], code_of(ours), details_of(ours))


def refusal_of(error: TxrpcError) -> Ending:
    """The end of a call that was refused before its handler ran; the status details are the mark of that."""
    return Ending([to_trailing(error)], code_of(error), details_of(error))


def plain_ending_of(error: BaseException, users_status: bool) -> Ending | None:
    """The end of a call without a transaction whose handler raised; None if gRPC's own is right.

    An error of txrpc travels as itself, also to callers that know nothing of txrpc; what a called service answered goes on as it
    came, however many services are in between.
    """
    if users_status or not isinstance(error, Exception):
        return None
    return refusal_of(error) if isinstance(error, TxrpcError) else _answered(error, [])


def _answered(error: BaseException, trailing: list[tuple[str, Any]]) -> Ending | None:
    """The status of a call that the handler made, if that is what left it."""
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    if not isinstance(error, grpc.RpcError) or not callable(code) or not callable(details):
        return None
    status = code()
    if not isinstance(status, grpc.StatusCode) or status is grpc.StatusCode.OK:
        return None
    return Ending(trailing, status, str(details() or "")[:_TEXT_MAX])


class Failed(Exception):
    """The handler has ended well, and given its call another status than OK."""


def has_failed(code: Any) -> bool:
    """Return whether a call with the status *code*, None if it has none yet, has failed."""
    return code not in (None, 0, grpc.StatusCode.OK)


def check_sent(context: ServerContext | AsyncServerContext) -> None:
    """After a joined call has ended: complain if its report did not go out.

    The caller cannot tell such a reply from that of a service that takes no part, and rolls back.
    """
    failpoint("participant.after_reply")
    if all(key != BRANCHES_KEY for key, _ in context.trailing_metadata() or ()):
        logger.error(
            "an interceptor replaced the trailing metadata of a call that belongs to a transaction, so its caller does not "
            "learn of the branches and rolls back: give txrpc's server interceptors first"
        )
