"""Messages about a transaction that a resource decides, to protobuf and back, and what a register keeps beside its decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from txrpc._protocol import deciding as m
from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import PreparedBranch
from txrpc._wire import checks as c
from txrpc._wire.v1 import context_pb2
from txrpc._wire.v1 import session_pb2 as pb
from txrpc.errors import BadMessage
from txrpc.ids import RESOURCE_MAX, RegisterId, Xid

__all__ = [
    "answer_from",
    "answer_to",
    "decide_from",
    "decide_to",
    "decided_from",
    "decided_to",
    "decode_decision",
    "done_from",
    "done_to",
    "encode_decision",
    "listed_from",
    "listed_to",
    "question_from",
    "question_to",
    "registers_from",
    "registers_to",
    "votes_from",
    "votes_to",
]

_BRANCHES_MAX = 10_000
_REGISTERS_MAX = 10_000


def encode_decision(register: RegisterId, branches: Sequence[PreparedBranch]) -> bytes:
    """What a register keeps of the prepared branches of a transaction that it commits; nothing if there are none."""
    if not branches:
        return b""
    return pb.DecidedBranches(branches=listed_to(branches), register=register).SerializeToString()


def decode_decision(xid: Xid, data: bytes) -> m.Decided | None:
    """The reverse; None if there is nothing.  Raises `BadMessage`."""
    if not data:
        return None
    message = c.parse(pb.DecidedBranches, data)
    return m.Decided(_register(message.register), xid, listed_from(message.branches))


def listed_to(branches: Sequence[PreparedBranch]) -> list[context_pb2.BranchRef]:
    """Prepared branches."""
    return [
        context_pb2.BranchRef(branch=p.branch, participant=p.participant, resource=p.resource, token=p.token)
        for p in branches
    ]


def listed_from(values: Sequence[context_pb2.BranchRef]) -> tuple[PreparedBranch, ...]:
    """The reverse of `listed_to`; raises `BadMessage`."""
    if len(values) > _BRANCHES_MAX:
        raise BadMessage(f"branches: {len(values)} are more than {_BRANCHES_MAX}")
    branches = tuple(map(c.prepared_from, values))
    if len({each.branch for each in branches}) != len(branches):
        raise BadMessage("branches: one is listed twice")
    return branches


def _register(value: bytes) -> RegisterId:
    register = c.register_from(value)
    if register is None:
        raise BadMessage("register: it is missing")
    return register


def votes_to(x: m.Votes) -> pb.Votes:
    return pb.Votes(xid=x.xid, branches=listed_to(x.branches))


def votes_from(x: pb.Votes) -> m.Votes:
    return m.Votes(c.xid_from(x.xid), listed_from(x.branches))


def decided_to(x: m.Decided) -> pb.Decided:
    return pb.Decided(register=x.register, xid=x.xid, branches=listed_to(x.branches))


def decided_from(x: pb.Decided) -> m.Decided:
    return m.Decided(_register(x.register), c.xid_from(x.xid), listed_from(x.branches))


def done_to(x: m.DecisionDone) -> pb.DecisionDone:
    return pb.DecisionDone(register=x.register, xids=x.xids)


def done_from(x: pb.DecisionDone) -> m.DecisionDone:
    return m.DecisionDone(_register(x.register), tuple(map(c.xid_from, x.xids)))


def registers_to(x: m.Registers) -> pb.Registers:
    return pb.Registers(names=dict(x.names))


def registers_from(x: pb.Registers) -> m.Registers:
    if len(x.names) > _REGISTERS_MAX:
        raise BadMessage(f"registers: {len(x.names)} are more than {_REGISTERS_MAX}")
    named = [(c.name_from("resource", name, RESOURCE_MAX), _register(value)) for name, value in x.names.items()]
    return m.Registers(tuple(sorted(named)))


def decide_to(x: m.Decide) -> pb.Decide:
    return pb.Decide(xid=x.xid, branch=x.branch, calls=x.calls, register=x.register, branches=listed_to(x.branches))


def decide_from(x: pb.Decide) -> m.Decide:
    branches = listed_from(x.branches)
    return m.Decide(c.xid_from(x.xid), c.branch_id(x.branch), x.calls, _register(x.register), branches)


def question_to(x: m.RegisterQuestion) -> pb.RegisterQuestion:
    commit = pb.DecidedBranches(branches=listed_to(x.commit)) if x.commit is not None else None
    return pb.RegisterQuestion(register=x.register, xid=x.xid, claim=x.claim, commit=commit)


def question_from(x: pb.RegisterQuestion) -> m.RegisterQuestion:
    commit = listed_from(x.commit.branches) if x.HasField("commit") else None
    return m.RegisterQuestion(_register(x.register), c.xid_from(x.xid), x.claim, commit)


def answer_to(x: m.RegisterAnswer) -> pb.RegisterAnswer:
    found: Any = x.found
    return pb.RegisterAnswer(register=x.register, xid=x.xid, found=found, branches=listed_to(x.branches))


def answer_from(x: pb.RegisterAnswer) -> m.RegisterAnswer:
    found = c.member(Found, "found", x.found)
    return m.RegisterAnswer(_register(x.register), c.xid_from(x.xid), found, listed_from(x.branches))
