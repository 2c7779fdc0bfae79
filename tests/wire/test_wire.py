"""Every message survives the wire; no bytes do harm (rule 15)."""

from __future__ import annotations

from typing import Any, get_args

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire import values
from txrpc import errors as e
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid
from txrpc.protocol import messages as m
from txrpc.wire import codec, metadata, status
from txrpc.wire.v1 import context_pb2, session_pb2

XID = Xid(bytes(range(16)))


@given(st.lists(values.to_coordinator, max_size=5))
def test_what_a_process_says_survives_the_wire(messages: list[Any]) -> None:
    data = codec.encode_to_coordinator(messages).SerializeToString()
    assert codec.decode_process_batch(session_pb2.ProcessBatch.FromString(data)) == messages


@given(st.lists(values.from_coordinator, max_size=5))
def test_what_a_coordinator_says_survives_the_wire(messages: list[Any]) -> None:
    data = codec.encode_from_coordinator(messages).SerializeToString()
    assert codec.decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(data)) == messages


def test_the_tables_know_every_message() -> None:
    assert set(codec._TO) == set(get_args(m.ToCoordinator))
    assert set(codec._FROM) == set(get_args(m.FromCoordinator))
    for table, decode, kind in (
        (codec._TO, codec._DECODE_TO, session_pb2.ProcessItem),
        (codec._FROM, codec._DECODE_FROM, session_pb2.CoordinatorItem),
    ):
        fields = {field.name for field in kind.DESCRIPTOR.oneofs_by_name["item"].fields}
        assert {name for name, _ in table.values()} == set(decode) == fields


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    for kind, decode in (
        (session_pb2.ProcessBatch, codec.decode_process_batch),
        (session_pb2.CoordinatorBatch, codec.decode_coordinator_batch),
    ):
        try:
            batch = kind.FromString(data)
        except DecodeError:
            continue  # grpc refuses it before we see it
        try:
            decode(batch)  # type: ignore[operator]
        except e.BadMessage:
            pass
    for read in (metadata.decode_context, metadata.decode_report):
        try:
            read(data)
        except e.BadMessage:
            pass
    status.from_trailing([(status.STATUS_KEY, data)])


@settings(max_examples=200)
@given(st.lists(values.to_coordinator, min_size=1, max_size=2), st.data())
def test_damaged_messages_are_refused_or_something_else_but_never_crash(
    messages: list[Any], data: st.DataObject
) -> None:
    raw = bytearray(codec.encode_to_coordinator(messages).SerializeToString())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        codec.decode_process_batch(session_pb2.ProcessBatch.FromString(bytes(raw)))
    except (DecodeError, e.BadMessage):
        pass


def _ref(branch: int = 1, **changes: Any) -> context_pb2.BranchRef:
    fields: dict[str, Any] = {"branch": bytes([branch] * 8), "resource": "bank", "participant": bytes(8), "calls": 1}
    return context_pb2.BranchRef(**{**fields, **changes})


def _item(**fields: Any) -> session_pb2.ProcessBatch:
    return session_pb2.ProcessBatch(items=[session_pb2.ProcessItem(**fields)])


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"voted": session_pb2.Voted(xid=b"short", branch=bytes(8), vote=1)}, "xid"),
        ({"voted": session_pb2.Voted(xid=bytes(16), branch=b"", vote=1)}, "branch"),
        ({"voted": session_pb2.Voted(xid=bytes(16), branch=bytes(8), vote=0)}, "vote"),
        ({"voted": session_pb2.Voted(xid=bytes(16), branch=bytes(8), vote=9)}, "vote"),  # type: ignore[arg-type]
        ({"voted": session_pb2.Voted(xid=bytes(16), branch=bytes(8), vote=1, token="1'; DROP")}, "token"),
        ({"acked": session_pb2.Acked(xid=bytes(16), branch=bytes(8))}, "finish"),
        ({"hello": session_pb2.Hello(group="it's", participant=bytes(8))}, "group"),
        ({"hello": session_pb2.Hello(group="a" * 25, participant=bytes(8))}, "24"),
        ({"hello": session_pb2.Hello(group="a", participant=bytes(7))}, "participant"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), branches=[_ref(), _ref()])}, "twice"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), branches=[_ref(resource="a'b")])}, "resource"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), epoch=2**64 - 1)}, "epoch"),
        ({"inquiry": session_pb2.Inquiry(gid=session_pb2.Gid(group="g", node="", xid=bytes(16)))}, "node"),
    ],
)
def test_each_bad_field_is_named(item: dict[str, Any], says: str) -> None:
    with pytest.raises(e.BadMessage, match=says):
        codec.decode_process_batch(_item(**item))


def test_an_item_of_a_newer_peer_is_skipped() -> None:
    newer = bytes.fromhex("0a04fa0f0141")  # items { 255: "A" }
    assert codec.decode_process_batch(session_pb2.ProcessBatch.FromString(newer)) == []


# --------------------------------------------------------------------------------------------------------- metadata


@given(values.contexts)
def test_a_context_survives_the_wire(context: m.TransactionContext) -> None:
    pairs = [("other", "x"), (metadata.CONTEXT_KEY, metadata.encode_context(context))]
    assert metadata.find_context(pairs) == context


@given(values.reports)
def test_a_report_survives_the_wire(report: m.CallReport) -> None:
    assert metadata.find_report([(metadata.BRANCHES_KEY, metadata.encode_report(report))]) == report


def test_no_metadata_is_no_transaction() -> None:
    assert metadata.find_context(None) is None
    assert metadata.find_context([("a", "b")]) is None


def test_a_context_that_is_there_twice_is_refused() -> None:
    pair = (metadata.CONTEXT_KEY, metadata.encode_context(m.TransactionContext("g", XID, m.Owner("c", Epoch(1)), 5)))
    with pytest.raises(e.BadMessage, match="2 times"):
        metadata.find_context([pair, pair])


def test_a_report_too_large_for_grpc_names_the_number_of_branches() -> None:
    refs = [m.BranchRef(BranchId(i.to_bytes(8, "big")), "r" * 30, ParticipantId(bytes(8)), 1) for i in range(500)]
    with pytest.raises(e.LimitExceeded, match="500 branches"):
        metadata.encode_report(m.CallReport(tuple(refs)))
    metadata.encode_report(m.CallReport(tuple(refs[:90])))


# ----------------------------------------------------------------------------------------------------------- status


def _leaves(kind: type[e.TxrpcError]) -> list[type[e.TxrpcError]]:
    return [
        kind,
        *(leaf for child in kind.__subclasses__() if child.__module__.startswith("txrpc") for leaf in _leaves(child)),
    ]


ABOUT = (e.TransactionAborted, e.OutcomeUnknown, e.HeuristicOutcome)
PUBLIC = [kind for kind in _leaves(e.TxrpcError) if kind.__name__ in e.__all__]


@pytest.mark.parametrize("kind", PUBLIC)
def test_every_error_comes_back_as_its_own_type_with_xid_and_reason(kind: type[e.TxrpcError]) -> None:
    reason = e.Reason(e.AbortCode.DEADLOCK, "both waited")
    error = kind(XID, reason) if issubclass(kind, ABOUT) else kind("what to do")
    key, data = status.to_trailing(error)
    back: Any = status.from_trailing([("x", "y"), (key, data)])
    assert type(back) is kind
    assert str(back) == str(error)
    assert status.code_of(error) is not grpc.StatusCode.OK
    if issubclass(kind, ABOUT):
        assert (back.xid, back.reason) == (XID, reason)


def test_an_unlisted_error_travels_as_its_nearest_base() -> None:
    class Special(e.CoordinatorUnavailable):
        pass

    assert status.code_of(Special("x")) is grpc.StatusCode.UNAVAILABLE
    assert type(status.from_trailing([status.to_trailing(Special("x"))])) is e.CoordinatorUnavailable


def test_details_of_somebody_else_are_not_ours() -> None:
    from google.protobuf.any_pb2 import Any as Packed
    from google.rpc.error_details_pb2 import ErrorInfo
    from google.rpc.status_pb2 import Status

    packed = Packed()
    packed.Pack(ErrorInfo(reason="TransactionAborted", domain="example.com"))
    pairs = [(status.STATUS_KEY, Status(code=10, details=[packed]).SerializeToString())]
    assert status.from_trailing(pairs) is None
    assert not status.end_is_known(pairs)


def test_the_end_of_a_call_is_known_only_by_our_mark() -> None:
    assert not status.end_is_known(None)
    assert not status.end_is_known([("trailer", "x")])
    assert status.end_is_known([(metadata.BRANCHES_KEY, b"")])
    assert status.end_is_known([status.to_trailing(e.CoordinatorUnavailable("no session"))])
