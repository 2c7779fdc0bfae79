"""What the interceptors need from a transaction, and nothing more: so that this package does not know the others.

`txrpc._client` implements these; the tests of this package implement them with a recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import grpc

from txrpc._protocol.messages import CallReport, TransactionContext
from txrpc.errors import Reason, TxrpcError
from txrpc.ids import Xid

__all__ = ["AsyncServerContext", "Behaviour", "Handle", "Joiner", "Metadata", "OutgoingCallPort", "ServerContext"]

Metadata = Iterable[tuple[str, str | bytes]] | None
"""Request or trailing metadata, as gRPC takes and gives it."""
Behaviour = Callable[..., Any]
"""What serves a method: it takes a request, or an iterator of them, and the context; gRPC's own types say no more."""


class ServerContext(Protocol):
    """What the interceptors use of a `grpc.ServicerContext`, whose published types leave half of it out."""

    def code(self) -> grpc.StatusCode | None:
        """The status that the handler has set."""

    def trailing_metadata(self) -> Metadata:
        """Return what the handler has set, or None."""

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Replace it."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have *callback* called when the call is over; False if it is over."""

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call; raises."""


class AsyncServerContext(Protocol):
    """What the interceptors use of a `grpc.aio.ServicerContext`."""

    def code(self) -> Any:
        """The status that the handler has set, as a number; 0 if none."""

    def trailing_metadata(self) -> Metadata:
        """Return what the handler has set, or None."""

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Replace it."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call; raises."""

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Send it, once."""

    def done(self) -> bool:
        """True if the call is over."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Have *callback* called when the call is over."""

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call; raises."""


class OutgoingCallPort(Protocol):
    """One call of a transaction to another service, from before it is sent until its end is known.

    Exactly one of `replied` and `lost` takes effect, the first one; both may be called from any thread.
    """

    context: TransactionContext
    time_left_s: float
    bounded: bool
    """True if the transaction's deadline, not a timeout of the call's own, bounds the call; the interceptor sets it."""

    def replied(self, report: CallReport | None, failure: Reason | None = None, kinds: tuple[object, ...] = ()) -> None:
        """The call's end is known: its status came from the server.

        *report* is the decoded trailing metadata, or None if the callee did not take part.  *failure* is set when the
        status is not OK; *kinds* are what a rule such as ``no_rollback_for`` may name (the exception, the status code).
        """

    def lost(self, reason: Reason) -> None:
        """The call's end is not known (deadline, cancel, lost connection): the transaction can only roll back."""

    def error(self, reason: Reason) -> TxrpcError:
        """Return what to raise where the transaction rolls back because of *reason*."""

    def settle_with(self, poll: Callable[[], Any], cancel: Callable[[], Any]) -> None:
        """Register how to learn the end of a call that the caller may have finished without our noticing (a future, a stream).

        *cancel* brings it about, when the transaction has ended.  *poll* is called before commit and before a reply; it calls
        `replied` or `lost` if the call is done, else nothing.  In an asyncio program it returns an awaitable.
        """


class Handle(Protocol):
    """The current transaction, as `txrpc._context.current` returns it."""

    joined: bool
    """True in a service method that joined its caller's transaction."""

    @property
    def xid(self) -> Xid:
        """The transaction's identifier."""

    def outgoing(self) -> OutgoingCallPort:
        """Register a call that is about to be sent.

        Raises `TransactionAborted` (it can only roll back), `TransactionTimedOut`, `IllegalState` (it has ended) or
        `CoordinatorUnavailable` (it began with no coordinator in reach).
        """

    def failed(self, error: BaseException) -> None:
        """The handler of this joined call raised *error* (also its own abort of the RPC)."""

    def leave(self) -> Any:
        """End this joined call and return its `CallReport`; in an asyncio program an awaitable of it.

        Settles calls that this handler made; those still in flight doom the transaction.  Idempotent.
        """

    @property
    def doom(self) -> Reason | None:
        """Return why the transaction can only roll back, or None."""


class Joiner(Protocol):
    """The process's side that lets an incoming call join its transaction: a manager."""

    def join(self, context: TransactionContext) -> Handle:
        """A handle for one incoming call.

        Raises, before the handler runs: `CoordinatorUnavailable` (no session with the context's coordinator and epoch),
        `TransactionTimedOut`, `TransactionAborted` (it ended here already: late call), `ConfigurationError` (another group),
        `LimitExceeded`.
        """
