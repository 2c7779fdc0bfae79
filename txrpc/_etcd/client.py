"""Calls to the members of an etcd cluster.

How to think of it
    Any member answers for the cluster, so a call goes to one of them, and to the next one if that does not answer.  A call that
    was sent may have been carried out, answered or not: a client that hides this runs transactions twice (Jepsen on jetcd 0.8.2,
    2024).  So a write must be one that may be tried again; `txrpc._etcd.writer` sees to that.

    Only two answers are proofs that nothing was done: that etcd has refused the request as such, and that it has no space and
    the key that the request would have written has not changed.  For etcd also answers "no space" to what it *has* written, when
    that was the last for which there was space (quotaApplierV3 in its apply.go).

    All reads are linearizable: the members agree that what is read is the latest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from txrpc._etcd.url import EtcdUrl
from txrpc._wire.v1 import etcd_pb2 as pb

__all__ = ["EtcdClient", "EtcdError", "EtcdFull", "EtcdRefused", "between", "one", "under"]

_M = TypeVar("_M", bound=Message)

_CALL_S: Final = 3.0
"""For all tries of a call together."""
_TRY_S: Final = 1.0
_PAUSE_S: Final = 0.05
_PAGE: Final = 1_000
_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),  # etcd ends connections that ask more often than every five seconds
    ("grpc.keepalive_timeout_ms", 2_000),
)
_REMEDY: Final = {
    "permission denied": "give the user the right to read and write the log's keys",
    "authentication failed": "correct the user and password in the log's URL",
    "user name is empty": "put USER:PASSWORD@ into the log's URL",
    "space exceeded": "compact and defragment etcd, disarm its alarm, and let it compact by itself",
    "failed to connect": "start etcd, or correct the log's URL",
    "connection refused": "start etcd, or correct the log's URL",
    "request is too large": "begin smaller transactions, or raise etcd's --max-request-bytes",
    "too many operations": "leave etcd's --max-txn-ops at 128 at least",
}


class EtcdError(Exception):
    """etcd did not answer as it should; a write may have been carried out.  The message says what to do, where that is known."""


class EtcdRefused(EtcdError):
    """The request was certainly not carried out."""


class EtcdFull(EtcdError):
    """etcd has no space; the write may have been the last that there was space for."""


_REFUSALS: Final[dict[grpc.StatusCode, type[EtcdError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: EtcdRefused,
    grpc.StatusCode.FAILED_PRECONDITION: EtcdRefused,
    grpc.StatusCode.PERMISSION_DENIED: EtcdRefused,
    grpc.StatusCode.UNAUTHENTICATED: EtcdRefused,
    grpc.StatusCode.UNIMPLEMENTED: EtcdRefused,
    grpc.StatusCode.OUT_OF_RANGE: EtcdRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: EtcdFull,
}
"""The others say nothing: the next member is asked."""


class EtcdClient:
    """One at a time may call it.  Calls raise `EtcdError`, and block for some seconds at most."""

    def __init__(self, url: EtcdUrl) -> None:
        """Connects with the first call; raises `ConfigurationError` if a file of TLS cannot be read."""
        self._url = url
        credentials = url.credentials()
        self._channels = [
            grpc.insecure_channel(endpoint, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(endpoint, credentials, _OPTIONS)
            for endpoint in url.endpoints
        ]
        self._turn = 0
        self._token = ""

    def read(self, *ranges: pb.EtcdRange) -> list[list[pb.EtcdKeyValue]]:
        """Return what is in each of these ranges, all at the same moment."""
        reply = self.transact(pb.EtcdTransaction(success=[pb.EtcdOperation(range=each) for each in ranges]))
        return [list(each.range.kvs) for each in reply.responses]

    def read_all(self, prefix: bytes) -> Iterator[pb.EtcdKeyValue]:
        """Return everything whose key begins with *prefix*, in the order of the keys, page by page."""
        question = under(prefix, limit=_PAGE)
        while True:
            page: pb.EtcdRangeReply = self._call("KV/Range", question, pb.EtcdRangeReply)
            yield from page.kvs
            if not page.more:
                return
            question.key = page.kvs[-1].key + b"\0"

    def count(self, prefix: bytes) -> int:
        """Return how many keys begin with *prefix*."""
        question = under(prefix)
        question.count_only = True
        return self._call("KV/Range", question, pb.EtcdRangeReply).count

    def transact(self, transaction: pb.EtcdTransaction) -> pb.EtcdTransactionReply:
        """Do all of it or nothing.  It may be done twice, or after this has raised an error, unless its own terms forbid that."""
        return self._call("KV/Txn", transaction, pb.EtcdTransactionReply)

    def grant(self, ttl_s: int) -> int:
        """Return a new lease, which ends by itself after *ttl_s* seconds; etcd does not go below two."""
        return self._call("Lease/LeaseGrant", pb.EtcdLeaseGrant(ttl_s=ttl_s), pb.EtcdLeaseGranted).id

    def keep(self, lease: int) -> None:
        """Let *lease* go on for its whole time again, if it has not ended."""
        # A stream at etcd's end, of which one question and one answer are the shortest.
        self._call("Lease/LeaseKeepAlive", pb.EtcdLease(id=lease), pb.EtcdLeaseKept)

    def revoke(self, lease: int) -> None:
        """End *lease*, and everything that depends on it."""
        self._call("Lease/LeaseRevoke", pb.EtcdLease(id=lease), pb.EtcdLeaseRevoked)

    def close(self) -> None:
        """Close the connections.  Idempotent."""
        for channel in self._channels:
            channel.close()

    # ------------------------------------------------------------------------------------------------------ under it

    def _call(self, method: str, request: Message, reply: type[_M]) -> _M:
        end = time.monotonic() + _CALL_S
        tries, certain = 0, True
        while True:
            try:
                if self._url.user and not self._token:
                    self._authenticate()
                return self._try(method, request, reply)
            except grpc.RpcError as error:
                tries += 1
                if _is_stale(error) and tries <= len(self._channels) + 1:
                    self._token = ""
                elif (refusal := _REFUSALS.get(error.code())) is not None:
                    # That a repetition was refused says nothing about the first try.
                    raise (refusal if certain else EtcdError)(_said(error)) from error
                else:
                    self._turn += 1
                    certain = False
                if time.monotonic() + _PAUSE_S > end:
                    raise EtcdError(_said(error)) from error
                if tries % len(self._channels) == 0:
                    time.sleep(_PAUSE_S)

    def _authenticate(self) -> None:
        request = pb.EtcdAuthenticate(name=self._url.user, password=self._url.password)
        self._token = self._try("Auth/Authenticate", request, pb.EtcdAuthenticated).token

    def _try(self, method: str, request: Message, reply: type[_M]) -> _M:
        channel = self._channels[self._turn % len(self._channels)]
        write: Callable[[Any], bytes] = type(request).SerializeToString
        call: Any = channel.unary_unary(f"/etcdserverpb.{method}", write, reply.FromString)
        metadata = [("token", self._token)] if self._token else None
        answer: _M = call(request, timeout=_TRY_S, metadata=metadata)
        return answer


def one(key: bytes) -> pb.EtcdRange:
    """One key."""
    return pb.EtcdRange(key=key)


def under(prefix: bytes, limit: int = 0) -> pb.EtcdRange:
    """All keys that begin with *prefix*, which ends with a slash."""
    return between(prefix, prefix[:-1] + b"0", limit)  # the character after the slash


def between(first: bytes, end: bytes, limit: int = 0) -> pb.EtcdRange:
    """All keys from *first* to before *end*."""
    return pb.EtcdRange(key=first, range_end=end, limit=limit)


def _is_stale(error: grpc.RpcError) -> bool:
    """Return whether the token is not valid any more: tokens have their time, and end with every change of rights."""
    said = error.details() or ""
    return "invalid auth token" in said or "auth store is old" in said


def _said(error: grpc.RpcError) -> str:
    said = " ".join((error.details() or "").split())[:300] or error.code().name.lower().replace("_", " ")
    remedy = next((what for sign, what in _REMEDY.items() if sign in said.lower()), None)
    return f"{said}: {remedy}" if remedy else said
