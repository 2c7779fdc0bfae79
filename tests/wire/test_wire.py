"""Every message survives the wire; no bytes do harm (rule 15)."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire import values
from txrpc import errors as e
from txrpc._protocol import messages as m
from txrpc._wire import checks, codec, metadata, status
from txrpc._wire.v1 import context_pb2, session_pb2
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

XID = Xid(bytes(range(16)))


@given(st.lists(values.to_coordinator, max_size=5))
def test_what_a_process_says_survives_the_wire(messages: list[Any]) -> None:
    data = codec.encode_to_coordinator("c1", messages).SerializeToString()
    named = [("c1", message) for message in messages]
    assert codec.decode_process_batch(session_pb2.ProcessBatch.FromString(data)) == named


@given(st.lists(values.from_coordinator, max_size=5))
def test_what_a_coordinator_says_survives_the_wire(messages: list[Any]) -> None:
    data = codec.encode_from_coordinator("c1", messages).SerializeToString()
    named = [("c1", message) for message in messages]
    assert codec.decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(data)) == named


def test_the_tables_know_every_message() -> None:
    for kinds, messages, item in (
        (codec.TO_COORDINATOR, m.ToCoordinator, session_pb2.ProcessItem),
        (codec.FROM_COORDINATOR, m.FromCoordinator, session_pb2.CoordinatorItem),
    ):
        assert sorted(map(str, get_args(messages))) == sorted(str(kind.message) for kind in kinds)
        fields = [field.name for field in item.DESCRIPTOR.oneofs_by_name["item"].fields]
        assert sorted(fields) == sorted(kind.field for kind in kinds)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    # DecodeError: not protobuf at all, refused before we see it.
    with contextlib.suppress(DecodeError, e.BadMessage):
        codec.decode_process_batch(session_pb2.ProcessBatch.FromString(data))
    with contextlib.suppress(DecodeError, e.BadMessage):
        codec.decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(data))
    with contextlib.suppress(e.BadMessage):
        metadata.decode_context(data)
    with contextlib.suppress(e.BadMessage):
        metadata.decode_report(data)
    status.from_trailing([(status.STATUS_KEY, data)])


@settings(max_examples=200)
@given(st.lists(values.to_coordinator, min_size=1, max_size=2), st.data())
def test_damaged_messages_are_refused_or_something_else_but_never_crash(
    messages: list[Any], data: st.DataObject
) -> None:
    raw = bytearray(codec.encode_to_coordinator("c1", messages).SerializeToString())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(DecodeError, e.BadMessage):
        codec.decode_process_batch(session_pb2.ProcessBatch.FromString(bytes(raw)))


ROUGH = "caf\udce9 " * 200
"""Too long, and with what Python makes of undecodable bytes."""


@pytest.mark.parametrize(
    "message",
    [
        m.Hello(1, "g", ParticipantId(bytes(8)), ROUGH, (m.ResourceInfo("bank", ROUGH, ROUGH),)),
        m.Voted(XID, BranchId(bytes(8)), m.Vote.ABORT, e.Reason(e.AbortCode.STATEMENT_FAILED, ROUGH)),
    ],
)
def test_any_text_a_process_sends_is_cut_and_made_fit(message: m.ToCoordinator) -> None:
    ((_, back),) = codec.decode_process_batch(codec.encode_to_coordinator("c1", [message]))
    assert ("caf? " * 200)[:500] in repr(back)


@pytest.mark.parametrize(
    "message",
    [m.OutcomeReply(XID, m.Outcome.COMMITTED, None, (ROUGH,), ROUGH), m.GoAway(ROUGH, ROUGH, retry=True)],
)
def test_any_text_a_coordinator_sends_is_cut_and_made_fit(message: m.FromCoordinator) -> None:
    ((_, back),) = codec.decode_coordinator_batch(codec.encode_from_coordinator("c1", [message]))
    assert ("caf? " * 200)[:500] in repr(back)


def _ref(branch: int = 1, **changes: Any) -> context_pb2.BranchRef:
    fields: dict[str, Any] = {"branch": bytes([branch] * 8), "resource": "bank", "participant": bytes(8), "calls": 1}
    return context_pb2.BranchRef(**{**fields, **changes})


def _voted(xid: bytes = bytes(16), branch: bytes = bytes(8), vote: Any = 1, token: str = "") -> dict[str, Any]:
    return {"voted": session_pb2.Voted(xid=xid, branch=branch, vote=vote, token=token)}


def _item(**fields: Any) -> session_pb2.ProcessBatch:
    return session_pb2.ProcessBatch(items=[session_pb2.ProcessItem(**fields)])


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (_voted(xid=b"short"), "xid"),
        (_voted(branch=b""), "branch"),
        (_voted(vote=0), "vote"),
        (_voted(vote=9), "vote"),
        (_voted(token="1'; DROP"), "token"),
        (_voted(token="7" * 65), "token"),
        ({"acked": session_pb2.Acked(xid=bytes(16), branch=bytes(8))}, "finish"),
        ({"hello": session_pb2.Hello(group="it's", participant=bytes(8))}, "group"),
        ({"hello": session_pb2.Hello(group="a" * 25, participant=bytes(8))}, "24"),
        ({"hello": session_pb2.Hello(group="a", participant=bytes(7))}, "participant"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), branches=[_ref(), _ref()])}, "twice"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), branches=[_ref(resource="a'b")])}, "resource"),
        ({"commit_request": session_pb2.CommitRequest(xid=bytes(16), epoch=2**64 - 1)}, "epoch"),
        ({"inquiry": session_pb2.Inquiry(gid=session_pb2.Gid(group="g", node="", xid=bytes(16)))}, "node"),
        ({"inquiry": session_pb2.Inquiry(gid=session_pb2.Gid(group="g", node="c", register=bytes(24)))}, "register"),
        ({"inquiry": session_pb2.Inquiry(gid=session_pb2.Gid(group="g", register=bytes(16)))}, "register"),
        ({"decided": session_pb2.Decided(xid=bytes(16))}, "register"),
        ({"decided": session_pb2.Decided(register=bytes(24), xid=bytes(16), branches=[_ref(), _ref()])}, "twice"),
        ({"register_answer": session_pb2.RegisterAnswer(register=bytes(24), xid=bytes(16))}, "found"),
    ],
)
def test_each_bad_field_is_named(item: dict[str, Any], says: str) -> None:
    with pytest.raises(e.BadMessage, match=says):
        codec.decode_process_batch(_item(**item))


def test_an_item_of_a_newer_peer_is_skipped() -> None:
    newer = bytes.fromhex("0a04fa0f0141")  # items { 255: "A" }
    batch = session_pb2.ProcessBatch.FromString(newer)
    assert len(batch.items) == 1
    assert codec.decode_process_batch(batch) == []


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
    metadata.encode_report(m.CallReport(tuple(refs[:80])))


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
    error: Any = kind(XID, reason) if issubclass(kind, ABOUT) else kind("what to do")
    key, data = status.to_trailing(error)
    back: Any = status.from_trailing([("x", "y"), (key, data)])
    assert type(back).__name__ == kind.__name__
    assert str(back) == str(error)
    assert status.code_of(error) is not grpc.StatusCode.OK
    if issubclass(kind, ABOUT):
        assert (back.xid, back.reason) == (XID, reason)


def test_an_error_of_any_length_in_any_language_fits_and_keeps_its_code() -> None:
    for text in ("x" * 9_000, "銀" * 9_000, ROUGH):
        error = e.TransactionAborted(XID, e.Reason(e.AbortCode.DEADLOCK, text))
        entry = status.to_trailing(error)
        assert len(entry[1]) < 1_250
        assert len(status.details_of(error).encode()) <= 500
        back: Any = status.from_trailing([entry])
        assert (back.xid, back.reason.code) == (XID, e.AbortCode.DEADLOCK)
        assert len(back.reason.text) > 160


def test_what_a_transaction_adds_to_the_metadata_of_a_call() -> None:
    """In bytes: a call, the last to a service, one that a register decides; and a branch in the reply, with its vote."""
    owner, register = m.Owner("c1", Epoch.make(3, 7)), RegisterId(bytes(24))

    def context(**more: Any) -> int:
        return len(metadata.encode_context(m.TransactionContext("default", XID, owner, 29_000, False, **more)))

    def report(*vote: Any) -> int:
        ref = m.BranchRef(BranchId(bytes(8)), "accounts", ParticipantId(bytes(8)), 1, *vote)
        return len(metadata.encode_report(m.CallReport((ref,))))

    assert (context(), context(final=True), context(register=register)) == (46, 48, 72)
    assert (report(), report(m.Vote.PREPARED, "12345-00000001", 1)) == (34, 54)


def test_the_longest_report_and_the_longest_error_pass_through_grpc_together() -> None:
    """gRPC drops trailing metadata above 8 KiB at random, and with it what the root must know."""
    refs = [m.BranchRef(BranchId(i.to_bytes(8, "big")), "r" * 32, ParticipantId(bytes(8)), 1) for i in range(500)]
    fits = (metadata.REPORT_MAX_BYTES - 10) // (len(metadata.encode_report(m.CallReport(tuple(refs[:1])))) + 1)
    report = metadata.encode_report(m.CallReport(tuple(refs[:fits])))
    assert len(report) > metadata.REPORT_MAX_BYTES - 200
    error = e.TransactionAborted(XID, e.Reason(e.AbortCode.DEADLOCK, "é" * 9_000))

    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(((metadata.BRANCHES_KEY, report), status.to_trailing(error)))
        context.abort(status.code_of(error), status.details_of(error))

    handlers: Any = {"y": grpc.unary_unary_rpc_method_handler(fail)}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            for _ in range(30):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary("/x/y", None, None)(b"", timeout=10)
                call: Any = caught.value
                found = metadata.find_report(call.trailing_metadata())
                assert found is not None
                assert len(found.branches) == fits
                assert type(status.from_trailing(call.trailing_metadata())) is e.TransactionAborted
                assert call.details() == status.details_of(error)
    finally:
        server.stop(None).wait()


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


def test_every_item_names_its_node_but_the_first_hello() -> None:
    hello = m.Hello(1, "g", ParticipantId(bytes(8)), "p")
    assert codec.decode_process_batch(codec.encode_to_coordinator("", [hello])) == [("", hello)]
    with pytest.raises(e.BadMessage, match="node"):
        codec.decode_process_batch(codec.encode_to_coordinator("", [m.OutcomeRequest(XID, Epoch.make(1, 1), 0)]))
    with pytest.raises(e.BadMessage, match="node"):
        codec.decode_coordinator_batch(codec.encode_from_coordinator("", [m.Tick(1)]))


def test_text_of_strangers_is_cut_and_cannot_command_a_terminal() -> None:
    gid = Gid("g", "c1", Epoch.make(1, 1), Xid(bytes(16)), BranchId(bytes(8)), ParticipantId(bytes(8)), "bank")
    hostile = m.Trouble(gid, e.Reason(e.AbortCode.UNSPECIFIED, "\x1b[2J\r\n\x07" + "x" * 1_000_000))
    (item,) = codec.encode_to_coordinator("c1", [hostile]).items
    item.trouble.reason.text = hostile.reason.text if hostile.reason else ""
    ((_, heard),) = codec.decode_process_batch(session_pb2.ProcessBatch(items=[item]))
    assert isinstance(heard, m.Trouble)
    assert heard.reason is not None
    assert heard.reason.text == " [2J" + " " * 3 + "x" * (checks.TEXT_MAX - 7)
