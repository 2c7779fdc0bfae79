"""What rides on business calls: the context in request metadata, the branches in trailing metadata.

gRPC allows 8 KiB of metadata a call, so a report has a limit of its own, below that: about 160 branches with short names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from txrpc._protocol.messages import CallReport, TransactionContext
from txrpc._wire import checks as c
from txrpc._wire import deciding as d
from txrpc._wire.v1 import context_pb2 as pb
from txrpc.errors import BadMessage, LimitExceeded
from txrpc.ids import GROUP_MAX

__all__ = [
    "BRANCHES_KEY",
    "CONTEXT_KEY",
    "REPORT_MAX_BYTES",
    "XID_KEY",
    "decode_context",
    "decode_report",
    "encode_context",
    "encode_report",
    "find_context",
    "find_report",
]

CONTEXT_KEY: Final = "txrpc-context-bin"
XID_KEY: Final = "txrpc-xid"
"""The XID as text, for what is on the way: a load balancer that hashes on it sends one transaction's calls to one replica."""
BRANCHES_KEY: Final = "txrpc-branches-bin"

REPORT_MAX_BYTES: Final = 5_000
"""Leaves room in gRPC's 8 KiB for an error of ours beside it, and for a peer or proxy that counts base64, a third longer."""


def encode_context(context: TransactionContext) -> bytes:
    """The value of `CONTEXT_KEY`."""
    message = pb.TransactionContext(
        group=context.group,
        xid=context.xid,
        owner=c.owner_to(context.owner),
        time_left_ms=context.time_left_ms,
        read_only=context.read_only,
        call_reads_only=context.call_reads_only,
        final=context.final,
        register=c.register_to(context.register),
        decides=context.decide is not None,
        decided=d.listed_to(context.decide or ()),
    )
    data = message.SerializeToString()
    if len(data) > REPORT_MAX_BYTES:
        raise LimitExceeded(
            f"the deciding call would carry {len(context.decide or ())} branches in {len(data)} bytes of metadata, of which gRPC "
            f"allows few: at most {REPORT_MAX_BYTES}; let a database of the root's own process decide"
        )
    return data


def decode_context(data: bytes) -> TransactionContext:
    """The reverse; raises `BadMessage` for anything that `encode_context` does not write."""
    message: pb.TransactionContext = c.parse(pb.TransactionContext, data)
    return TransactionContext(
        c.name_from("group", message.group, GROUP_MAX),
        c.xid_from(message.xid),
        c.owner_from(message.owner),
        message.time_left_ms,
        message.read_only,
        message.call_reads_only,
        message.final,
        c.register_from(message.register),
        d.listed_from(message.decided) if message.decides else None,
    )


def encode_report(report: CallReport) -> bytes:
    """The value of `BRANCHES_KEY`; raises `LimitExceeded` if it would not fit."""
    branches, doomed = map(c.branch_to, report.branches), c.reason_to(report.doomed)
    message = pb.CallReport(branches=branches, doomed=doomed, committed=report.committed)
    data = message.SerializeToString()
    if len(data) > REPORT_MAX_BYTES:
        raise LimitExceeded(
            f"the reply would carry {len(report.branches)} branches in {len(data)} bytes of metadata, of which gRPC allows "
            f"few: at most {REPORT_MAX_BYTES}; let one call reach fewer resources"
        )
    return data


def decode_report(data: bytes) -> CallReport:
    """The reverse; raises `BadMessage`."""
    message: pb.CallReport = c.parse(pb.CallReport, data)
    doomed = c.reason_from(message.doomed) if message.HasField("doomed") else None
    return CallReport(c.branches_from(message.branches), doomed, message.committed)


def find_context(metadata: Iterable[Any] | None) -> TransactionContext | None:
    """The context in a call's request metadata; raises `BadMessage` if it is there twice or makes no sense."""
    data = _only(CONTEXT_KEY, metadata)
    return None if data is None else decode_context(data)


def find_report(metadata: Iterable[Any] | None) -> CallReport | None:
    """The report in a call's trailing metadata; raises `BadMessage` if it is there twice or makes no sense."""
    data = _only(BRANCHES_KEY, metadata)
    return None if data is None else decode_report(data)


def _only(key: str, metadata: Iterable[Any] | None) -> bytes | None:
    found = [value for name, value in metadata or () if name == key]
    if not found:
        return None
    if len(found) > 1:
        raise BadMessage(f"{key} is there {len(found)} times")
    if not isinstance(found[0], bytes):
        raise BadMessage(f"{key} is not binary")
    return found[0]
