"""What arbitrary bytes are fed to; each either takes them or says in the way that it documents what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from tests.hostile.core import core
from txrpc._decision_log.schema import pack, unpack
from txrpc._protocol.quorum.views import View
from txrpc._wire.codec import (
    decode_coordinator_batch,
    decode_process_batch,
    encode_from_coordinator,
    encode_to_coordinator,
)
from txrpc._wire.metadata import decode_context, decode_report, encode_context, encode_report
from txrpc._wire.peer import answer_from, answer_to, question_from, question_to
from txrpc._wire.status import end_is_known, from_trailing
from txrpc._wire.v1 import peer_pb2, session_pb2
from txrpc.errors import BadMessage, ConfigurationError, LimitExceeded
from txrpc.ids import Epoch, Gid

__all__ = ["TARGETS", "Target"]

Target = Callable[[bytes], None]


def process_batch(data: bytes) -> None:
    """What a process sends."""
    try:
        messages = decode_process_batch(session_pb2.ProcessBatch.FromString(data))
    except (BadMessage, DecodeError):
        return
    for item in messages:
        again = encode_to_coordinator(item[0], [item[1]]).SerializeToString()
        assert decode_process_batch(session_pb2.ProcessBatch.FromString(again)) == [item]


def coordinator_batch(data: bytes) -> None:
    """What a coordinator sends."""
    try:
        messages = decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(data))
    except (BadMessage, DecodeError):
        return
    for node, message in messages:
        again = encode_from_coordinator(node, [message]).SerializeToString()
        assert decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(again)) == [(node, message)]


def context(data: bytes) -> None:
    """The request metadata."""
    try:
        made = decode_context(data)
    except BadMessage:
        return
    assert decode_context(encode_context(made)) == made


def report(data: bytes) -> None:
    """The trailing metadata with the branches."""
    try:
        made = decode_report(data)
        again = encode_report(made)
    except (BadMessage, LimitExceeded):
        return
    assert decode_report(again) == made


def status(data: bytes) -> None:
    """The trailing metadata with the status: never raises."""
    trailing = (("grpc-status-details-bin", data),)
    from_trailing(trailing)
    end_is_known(trailing)


def gid(data: bytes) -> None:
    """The name of a prepared transaction, as it stands in a database that is not only ours."""
    text = data.decode("utf-8", "replace")
    made = Gid.parse(text)
    assert made is None or str(made) == text


def log_record(data: bytes) -> None:
    """The branches of a record in the decision log."""
    try:
        branches = unpack(data)
    except ConfigurationError:
        return
    assert unpack(pack(branches)) == branches


def peer_question(data: bytes) -> None:
    """What a member of the group asks."""
    try:
        question = question_from(peer_pb2.PeerQuestion.FromString(data))
    except (BadMessage, DecodeError):
        return
    fields: Any = question_to(question)
    assert question_from(peer_pb2.PeerQuestion(**fields)) == question


def peer_answer(data: bytes) -> None:
    """What a member of the group answers."""
    try:
        answer = answer_from("c2", Epoch(5), peer_pb2.PeerAnswer.FromString(data))
    except (BadMessage, DecodeError):
        return
    assert answer_from("c2", Epoch(5), answer_to(answer, View(1, {"c1": "h:1"}, 1, 1))) == answer


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        process_batch,
        coordinator_batch,
        context,
        report,
        status,
        gid,
        log_record,
        peer_question,
        peer_answer,
        core,
    )
}
