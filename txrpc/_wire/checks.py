"""Validated values out of protobuf fields; whatever is wrong becomes a `BadMessage` that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from txrpc._protocol.messages import BranchRef, Owner, ResourceInfo, Vote
from txrpc._protocol.records import PreparedBranch
from txrpc._wire.v1 import context_pb2, peer_pb2, session_pb2
from txrpc.errors import AbortCode, BadMessage, InvalidName, Reason
from txrpc.ids import (
    GROUP_MAX,
    NODE_MAX,
    RESOURCE_MAX,
    BranchId,
    Epoch,
    Gid,
    ParticipantId,
    RegisterId,
    Xid,
    check_name,
)

__all__ = [
    "TEXT_MAX",
    "branch_from",
    "branch_id",
    "branch_to",
    "branches_from",
    "epoch_from",
    "gid_from",
    "gid_to",
    "member",
    "name_from",
    "optional_reason",
    "owner_from",
    "owner_to",
    "parse",
    "participant_id",
    "position_from",
    "prepared_from",
    "reason_from",
    "reason_to",
    "register_from",
    "register_to",
    "resource_from",
    "resource_to",
    "text_from",
    "text_to",
    "token_from",
    "xid_from",
]

TEXT_MAX = 500
"""Longest free text, in characters: anything longer is cut, on both sides."""

_TOKEN_MAX = 64
_REFS_MAX = 10_000

_E = TypeVar("_E", bound=IntEnum)
_M = TypeVar("_M", bound=Message)


def parse(kind: type[_M], data: bytes) -> _M:
    """A message of that kind."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadMessage(f"not a {kind.__name__}") from None


def xid_from(value: bytes) -> Xid:
    """16 bytes."""
    try:
        return Xid(value)
    except ValueError as error:
        raise BadMessage(f"xid: {error}") from None


def branch_id(value: bytes) -> BranchId:
    """8 bytes."""
    try:
        return BranchId(value)
    except ValueError as error:
        raise BadMessage(f"branch: {error}") from None


def participant_id(value: bytes) -> ParticipantId:
    """8 bytes."""
    try:
        return ParticipantId(value)
    except ValueError as error:
        raise BadMessage(f"participant: {error}") from None


def register_from(value: bytes) -> RegisterId | None:
    """24 bytes, or none."""
    try:
        return RegisterId(value) if value else None
    except ValueError as error:
        raise BadMessage(f"register: {error}") from None


def register_to(value: RegisterId | None) -> bytes:
    """The reverse of `register_from`."""
    return value or b""


def epoch_from(value: int) -> Epoch:
    """Any 64-bit number below 2**63; 0 stands for "not known" in a question."""
    if value >= 1 << 63:
        raise BadMessage("epoch: out of range")
    return Epoch(value)


def position_from(value: int) -> int:
    """Return where a log has come to; one that no log can have is a mistake."""
    if value >= 1 << 63:
        raise BadMessage("position: out of range")
    return value


def name_from(kind: str, value: str, longest: int) -> str:
    """A name that may end up in SQL text."""
    try:
        return check_name(kind, value, longest)
    except InvalidName as error:
        raise BadMessage(str(error)) from None


def text_from(value: str) -> str:
    """Free text for people: short, and nothing in it that a terminal would obey."""
    cut = value[:TEXT_MAX]
    return cut if cut.isprintable() else "".join(sign if sign.isprintable() else " " for sign in cut)


def text_to(value: str) -> str:
    """The reverse of `text_from`: cut, and fit for protobuf, which refuses the lone surrogates that undecodable bytes leave."""
    cut = value[:TEXT_MAX]
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode()


def token_from(value: str) -> str:
    """A database's own transaction id: short, and only letters, digits and dashes, because it may end up in SQL text."""
    if value and (len(value) > _TOKEN_MAX or not value.isascii() or not value.replace("-", "").isalnum()):
        raise BadMessage("token: not the identifier of a database transaction")
    return value


def prepared_from(value: context_pb2.BranchRef | peer_pb2.LogBranch) -> PreparedBranch:
    """A prepared branch, of a message or of a decision that is kept."""
    return PreparedBranch(
        branch_id(value.branch),
        participant_id(value.participant),
        name_from("resource", value.resource, RESOURCE_MAX),
        token_from(value.token),
    )


def member(kind: type[_E], field: str, value: int) -> _E:
    """A member of an enumeration."""
    try:
        return kind(value)
    except ValueError:
        raise BadMessage(f"{field}: {value} is not one of {', '.join(kind.__members__)}") from None


def owner_from(value: context_pb2.Owner) -> Owner:
    """A coordinator in one of its epochs."""
    return Owner(name_from("node", value.node, NODE_MAX), epoch_from(value.epoch))


def owner_to(value: Owner) -> context_pb2.Owner:
    """The reverse of `owner_from`."""
    return context_pb2.Owner(node=value.node, epoch=value.epoch)


def reason_from(value: context_pb2.Reason) -> Reason:
    """A code that this version does not know (a newer peer's) becomes UNSPECIFIED; its text stays."""
    try:
        code = AbortCode(value.code)
    except ValueError:
        code = AbortCode.UNSPECIFIED
    return Reason(code, text_from(value.text))


def optional_reason(message: Any) -> Reason | None:
    """The field ``reason`` of *message*, if it is set."""
    return reason_from(message.reason) if message.HasField("reason") else None


def reason_to(value: Reason | None) -> context_pb2.Reason | None:
    """The reverse of `optional_reason`."""
    return None if value is None else context_pb2.Reason(code=value.code, text=text_to(value.text))


def branch_from(value: context_pb2.BranchRef) -> BranchRef:
    """One branch as a root sees it."""
    return BranchRef(
        branch_id(value.branch),
        name_from("resource", value.resource, RESOURCE_MAX),
        participant_id(value.participant),
        value.calls,
        member(Vote, "vote", value.vote) if value.vote else None,
        token_from(value.token),
        value.counted,
        register_from(value.register),
    )


def branches_from(values: Sequence[context_pb2.BranchRef]) -> tuple[BranchRef, ...]:
    """A list of branches, each of them once."""
    if len(values) > _REFS_MAX:
        raise BadMessage(f"branches: {len(values)} are more than {_REFS_MAX}")
    branches = tuple([branch_from(value) for value in values])
    if len({branch.branch for branch in branches}) != len(branches):
        raise BadMessage("branches: one is listed twice")
    return branches


def branch_to(value: BranchRef) -> context_pb2.BranchRef:
    """The reverse of `branch_from`."""
    vote: Any = value.vote or 0
    return context_pb2.BranchRef(
        branch=value.branch,
        resource=value.resource,
        participant=value.participant,
        calls=value.calls,
        vote=vote,
        token=value.token,
        counted=value.counted,
        register=register_to(value.register),
    )


def resource_from(value: session_pb2.ResourceInfo) -> ResourceInfo:
    """A resource as a process announces it."""
    name, register = name_from("resource", value.name, RESOURCE_MAX), register_from(value.register)
    return ResourceInfo(name, text_from(value.kind), text_from(value.identity), text_from(value.trouble), register)


def resource_to(value: ResourceInfo) -> session_pb2.ResourceInfo:
    """The reverse of `resource_from`."""
    return session_pb2.ResourceInfo(
        name=value.name,
        kind=text_to(value.kind),
        identity=text_to(value.identity),
        trouble=text_to(value.trouble),
        register=register_to(value.register),
    )


def gid_from(value: session_pb2.Gid) -> Gid:
    """A branch's whole identity."""
    register = register_from(value.register)
    if register is not None and (value.node or value.epoch):
        raise BadMessage("gid: it names a register and a coordinator")
    return Gid(
        name_from("group", value.group, GROUP_MAX),
        name_from("node", value.node, NODE_MAX) if register is None else "",
        epoch_from(value.epoch),
        xid_from(value.xid),
        branch_id(value.branch),
        participant_id(value.participant),
        name_from("resource", value.resource, RESOURCE_MAX),
        register,
    )


def gid_to(value: Gid) -> session_pb2.Gid:
    """The reverse of `gid_from`."""
    return session_pb2.Gid(
        group=value.group,
        node=value.node,
        epoch=value.epoch,
        xid=value.xid,
        branch=value.branch,
        participant=value.participant,
        resource=value.resource,
        register=register_to(value.register),
    )
