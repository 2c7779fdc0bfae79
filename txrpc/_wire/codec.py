"""Messages of the session to protobuf and back.

`TO_COORDINATOR` and `FROM_COORDINATOR` are the registry, one entry a message.  Decoding validates everything
(`txrpc._wire.checks`) and raises `BadMessage` and nothing else, whatever the bytes are.  An item that this version does not know,
of a newer peer, is skipped: the version that introduces one must make that safe, or raise the protocol version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from txrpc._protocol import deciding
from txrpc._protocol import messages as m
from txrpc._wire import checks as c
from txrpc._wire import deciding as d
from txrpc._wire.v1 import session_pb2 as pb
from txrpc.errors import BadMessage, Reason
from txrpc.ids import GROUP_MAX, NODE_MAX, RESOURCE_MAX

__all__ = [
    "FROM_COORDINATOR",
    "TO_COORDINATOR",
    "decode_coordinator_batch",
    "decode_process_batch",
    "encode_from_coordinator",
    "encode_to_coordinator",
]

logger = logging.getLogger("txrpc.wire")

_RESOURCES_MAX = 1_000


class _Kind(NamedTuple):
    """A kind of message: its class, its field in an item of the stream, and how the one becomes the other."""

    message: type
    field: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def encode_to_coordinator(node: str, messages: Iterable[m.ToCoordinator]) -> pb.ProcessBatch:
    """One batch of what a process says to the coordinator *node*; "" if it does not know yet who is there."""
    items = [pb.ProcessItem(node=node, **{k.field: k.encode(x)}) for x in messages for k in (_ENCODE_TO[type(x)],)]
    return pb.ProcessBatch(items=items)


def encode_from_coordinator(node: str, messages: Iterable[m.FromCoordinator]) -> pb.CoordinatorBatch:
    """One batch of what the coordinator *node* says."""
    items = [
        pb.CoordinatorItem(node=node, **{k.field: k.encode(x)}) for x in messages for k in (_ENCODE_FROM[type(x)],)
    ]
    return pb.CoordinatorBatch(items=items)


def decode_process_batch(batch: pb.ProcessBatch) -> list[tuple[str, m.ToCoordinator]]:
    """The messages of one batch of a process's, each with the node that it is for; raises `BadMessage`."""
    return _decode(batch.items, _DECODE_TO)


def decode_coordinator_batch(batch: pb.CoordinatorBatch) -> list[tuple[str, m.FromCoordinator]]:
    """The messages of one batch of a coordinator's, each with the node that says it; raises `BadMessage`."""
    return _decode(batch.items, _DECODE_FROM)


def _decode(items: Any, kinds: Mapping[str, _Kind]) -> list[Any]:
    decoded = []
    for item in items:
        field = item.WhichOneof("item")
        if field is None:
            logger.debug("skipped an item of an unknown kind")
            continue
        message = kinds[field].decode(getattr(item, field))
        unnamed = not item.node and isinstance(message, m.Hello)
        decoded.append(("" if unnamed else c.name_from("node", item.node, NODE_MAX), message))
    return decoded


# ------------------------------------------------------------------------------------------ process -> coordinator


def _hello_to(x: m.Hello) -> pb.Hello:
    seen = c.owner_to(x.seen) if x.seen is not None else None
    return pb.Hello(
        protocol=x.protocol,
        group=x.group,
        participant=x.participant,
        process=c.text_to(x.process),
        resources=map(c.resource_to, x.resources),
        seen=seen,
        position=x.position,
        version=x.version,
    )


def _hello_from(x: pb.Hello) -> m.Hello:
    if len(x.resources) > _RESOURCES_MAX:
        raise BadMessage(f"resources: {len(x.resources)} are more than {_RESOURCES_MAX}")
    resources = tuple(map(c.resource_from, x.resources))
    if len({r.name for r in resources}) != len(resources):
        raise BadMessage("resources: one is named twice")
    seen = c.owner_from(x.seen) if x.HasField("seen") else None
    group = c.name_from("group", x.group, GROUP_MAX)
    participant, position = c.participant_id(x.participant), c.position_from(x.position)
    return m.Hello(x.protocol, group, participant, c.text_from(x.process), resources, seen, position, x.version)


def _commit_request_to(x: m.CommitRequest) -> pb.CommitRequest:
    return pb.CommitRequest(
        xid=x.xid,
        epoch=x.epoch,
        begun_tick=x.begun_tick,
        branches=map(c.branch_to, x.branches),
        time_left_ms=x.time_left_ms,
        wait=_any(x.wait),
        register=x.register or b"",
        decider=x.decider or b"",
    )


def _commit_request_from(x: pb.CommitRequest) -> m.CommitRequest:
    return m.CommitRequest(
        c.xid_from(x.xid),
        c.epoch_from(x.epoch),
        x.begun_tick,
        c.branches_from(x.branches),
        x.time_left_ms,
        c.member(m.Wait, "wait", x.wait),
        c.register_from(x.register),
        c.branch_id(x.decider) if x.decider else None,
    )


def _rollback_request_to(x: m.RollbackRequest) -> pb.RollbackRequest:
    branches = map(c.branch_to, x.branches)
    return pb.RollbackRequest(
        xid=x.xid,
        epoch=x.epoch,
        begun_tick=x.begun_tick,
        branches=branches,
        reason=c.reason_to(x.reason),
        everywhere=x.everywhere,
    )


def _rollback_request_from(x: pb.RollbackRequest) -> m.RollbackRequest:
    branches = c.branches_from(x.branches)
    xid, epoch, reason = c.xid_from(x.xid), c.epoch_from(x.epoch), c.reason_from(x.reason)
    return m.RollbackRequest(xid, epoch, x.begun_tick, branches, reason, x.everywhere)


def _outcome_request_to(x: m.OutcomeRequest) -> pb.OutcomeRequest:
    branches, register = map(c.branch_to, x.branches), c.register_to(x.register)
    return pb.OutcomeRequest(xid=x.xid, epoch=x.epoch, begun_tick=x.begun_tick, branches=branches, register=register)


def _outcome_request_from(x: pb.OutcomeRequest) -> m.OutcomeRequest:
    xid, epoch, register = c.xid_from(x.xid), c.epoch_from(x.epoch), c.register_from(x.register)
    return m.OutcomeRequest(xid, epoch, x.begun_tick, c.branches_from(x.branches), register)


def _voted_to(x: m.Voted) -> pb.Voted:
    reason, under = c.reason_to(x.reason), c.register_to(x.register)
    return pb.Voted(xid=x.xid, branch=x.branch, vote=_any(x.vote), reason=reason, token=x.token, register=under)


def _voted_from(x: pb.Voted) -> m.Voted:
    vote = c.member(m.Vote, "vote", x.vote)
    reason, token, register = c.optional_reason(x), c.token_from(x.token), c.register_from(x.register)
    return m.Voted(c.xid_from(x.xid), c.branch_id(x.branch), vote, reason, token, register)


def _committing_to(x: m.Committing) -> pb.Committing:
    return pb.Committing(xid=x.xid, branch=x.branch, token=x.token)


def _committing_from(x: pb.Committing) -> m.Committing:
    return m.Committing(c.xid_from(x.xid), c.branch_id(x.branch), c.token_from(x.token))


def _one_phase_done_to(x: m.OnePhaseDone) -> pb.OnePhaseDone:
    return pb.OnePhaseDone(xid=x.xid, branch=x.branch, result=_any(x.result), reason=c.reason_to(x.reason))


def _one_phase_done_from(x: pb.OnePhaseDone) -> m.OnePhaseDone:
    result = c.member(m.Outcome, "result", x.result)
    return m.OnePhaseDone(c.xid_from(x.xid), c.branch_id(x.branch), result, c.optional_reason(x))


def _acked_to(x: m.Acked) -> pb.Acked:
    return pb.Acked(xid=x.xid, branch=x.branch, finish=_any(x.finish), resource=x.resource)


def _acked_from(x: pb.Acked) -> m.Acked:
    finish, resource = c.member(m.FinishResult, "finish", x.finish), c.name_from("resource", x.resource, RESOURCE_MAX)
    return m.Acked(c.xid_from(x.xid), c.branch_id(x.branch), finish, resource)


def _inquiry_to(x: m.Inquiry) -> pb.Inquiry:
    return pb.Inquiry(gid=c.gid_to(x.gid), since_ms=x.since_ms, time_left_ms=x.time_left_ms)


def _inquiry_from(x: pb.Inquiry) -> m.Inquiry:
    return m.Inquiry(c.gid_from(x.gid), x.since_ms, x.time_left_ms)


def _trouble_to(x: m.Trouble) -> pb.Trouble:
    return pb.Trouble(gid=c.gid_to(x.gid), reason=c.reason_to(x.reason))


def _trouble_from(x: pb.Trouble) -> m.Trouble:
    return m.Trouble(c.gid_from(x.gid), c.optional_reason(x))


def _resolved_to(x: m.Resolved) -> pb.Resolved:
    return pb.Resolved(xid=x.xid, branch=x.branch, result=_any(x.result))


def _resolved_from(x: pb.Resolved) -> m.Resolved:
    return m.Resolved(c.xid_from(x.xid), c.branch_id(x.branch), c.member(m.Outcome, "result", x.result))


# ------------------------------------------------------------------------------------------ coordinator -> process


def _welcome_to(x: m.Welcome) -> pb.Welcome:
    return pb.Welcome(
        owner=c.owner_to(x.owner),
        tick=x.tick,
        max_timeout_ms=x.max_timeout_ms,
        max_branches=x.max_branches,
        max_message_bytes=x.max_message_bytes,
        position=x.position,
        heard=x.heard,
    )


def _welcome_from(x: pb.Welcome) -> m.Welcome:
    position = c.position_from(x.position)
    most = x.max_timeout_ms, x.max_branches, x.max_message_bytes
    return m.Welcome(c.owner_from(x.owner), x.tick, *most, position, x.heard)


def _tick_to(x: m.Tick) -> pb.Tick:
    return pb.Tick(tick=x.tick, position=x.position, heard=x.heard)


def _tick_from(x: pb.Tick) -> m.Tick:
    return m.Tick(x.tick, c.position_from(x.position), x.heard)


def _prepare_to(x: m.Prepare) -> pb.Prepare:
    return pb.Prepare(xid=x.xid, branch=x.branch, calls=x.calls)


def _prepare_from(x: pb.Prepare) -> m.Prepare:
    return m.Prepare(c.xid_from(x.xid), c.branch_id(x.branch), x.calls)


def _one_phase_to(x: m.CommitOnePhase) -> pb.CommitOnePhase:
    return pb.CommitOnePhase(xid=x.xid, branch=x.branch, calls=x.calls)


def _one_phase_from(x: pb.CommitOnePhase) -> m.CommitOnePhase:
    return m.CommitOnePhase(c.xid_from(x.xid), c.branch_id(x.branch), x.calls)


def _commit_to(x: m.Commit) -> pb.Commit:
    return pb.Commit(gid=c.gid_to(x.gid), token=x.token, position=x.position)


def _commit_from(x: pb.Commit) -> m.Commit:
    return m.Commit(c.gid_from(x.gid), c.token_from(x.token), c.position_from(x.position))


def _rollback_to(x: m.Rollback) -> pb.Rollback:
    return pb.Rollback(gid=c.gid_to(x.gid), reason=c.reason_to(x.reason), token=x.token)


def _rollback_from(x: pb.Rollback) -> m.Rollback:
    return m.Rollback(c.gid_from(x.gid), c.reason_from(x.reason), c.token_from(x.token))


def _abandon_to(x: m.Abandon) -> pb.Abandon:
    return pb.Abandon(xid=x.xid, reason=c.reason_to(x.reason))


def _abandon_from(x: pb.Abandon) -> m.Abandon:
    return m.Abandon(c.xid_from(x.xid), c.reason_from(x.reason))


def _resolve_to(x: m.Resolve) -> pb.Resolve:
    return pb.Resolve(xid=x.xid, branch=x.branch, resource=x.resource, token=x.token)


def _resolve_from(x: pb.Resolve) -> m.Resolve:
    resource = c.name_from("resource", x.resource, RESOURCE_MAX)
    return m.Resolve(c.xid_from(x.xid), c.branch_id(x.branch), resource, c.token_from(x.token))


def _outcome_reply_to(x: m.OutcomeReply) -> pb.OutcomeReply:
    return pb.OutcomeReply(
        xid=x.xid,
        outcome=_any(x.outcome),
        reason=c.reason_to(x.reason),
        pending=map(c.text_to, x.pending),
        heuristic=c.text_to(x.heuristic),
        position=x.position,
    )


def _outcome_reply_from(x: pb.OutcomeReply) -> m.OutcomeReply:
    outcome = c.member(m.Outcome, "outcome", x.outcome)
    reason: Reason | None = c.optional_reason(x)
    pending, heuristic = tuple(map(c.text_from, x.pending)), c.text_from(x.heuristic)
    return m.OutcomeReply(c.xid_from(x.xid), outcome, reason, pending, heuristic, c.position_from(x.position))


def _one_phase_token_to(x: m.OnePhaseToken) -> pb.OnePhaseToken:
    return pb.OnePhaseToken(xid=x.xid, token=x.token)


def _one_phase_token_from(x: pb.OnePhaseToken) -> m.OnePhaseToken:
    return m.OnePhaseToken(c.xid_from(x.xid), c.token_from(x.token))


def _takeover_to(_: m.Takeover) -> pb.Takeover:
    return pb.Takeover()


def _takeover_from(_: pb.Takeover) -> m.Takeover:
    return m.Takeover()


def _go_away_to(x: m.GoAway) -> pb.GoAway:
    return pb.GoAway(code=c.text_to(x.code), text=c.text_to(x.text), retry=x.retry)


def _go_away_from(x: pb.GoAway) -> m.GoAway:
    return m.GoAway(c.text_from(x.code), c.text_from(x.text), x.retry)


def _any(value: Any) -> Any:
    """Our enumerations have protobuf's numbers, which its stubs cannot know."""
    return value


TO_COORDINATOR: Final = (
    _Kind(m.Hello, "hello", _hello_to, _hello_from),
    _Kind(m.CommitRequest, "commit_request", _commit_request_to, _commit_request_from),
    _Kind(m.RollbackRequest, "rollback_request", _rollback_request_to, _rollback_request_from),
    _Kind(m.OutcomeRequest, "outcome_request", _outcome_request_to, _outcome_request_from),
    _Kind(m.Voted, "voted", _voted_to, _voted_from),
    _Kind(m.Committing, "committing", _committing_to, _committing_from),
    _Kind(m.OnePhaseDone, "one_phase_done", _one_phase_done_to, _one_phase_done_from),
    _Kind(m.Acked, "acked", _acked_to, _acked_from),
    _Kind(m.Inquiry, "inquiry", _inquiry_to, _inquiry_from),
    _Kind(m.Resolved, "resolved", _resolved_to, _resolved_from),
    _Kind(m.Trouble, "trouble", _trouble_to, _trouble_from),
    _Kind(deciding.Decided, "decided", d.decided_to, d.decided_from),
    _Kind(deciding.RegisterAnswer, "register_answer", d.answer_to, d.answer_from),
)

FROM_COORDINATOR: Final = (
    _Kind(m.Welcome, "welcome", _welcome_to, _welcome_from),
    _Kind(m.Takeover, "takeover", _takeover_to, _takeover_from),
    _Kind(m.Tick, "tick", _tick_to, _tick_from),
    _Kind(m.Prepare, "prepare", _prepare_to, _prepare_from),
    _Kind(m.CommitOnePhase, "commit_one_phase", _one_phase_to, _one_phase_from),
    _Kind(m.Commit, "commit", _commit_to, _commit_from),
    _Kind(m.Rollback, "rollback", _rollback_to, _rollback_from),
    _Kind(m.Abandon, "abandon", _abandon_to, _abandon_from),
    _Kind(m.Resolve, "resolve", _resolve_to, _resolve_from),
    _Kind(m.OutcomeReply, "outcome_reply", _outcome_reply_to, _outcome_reply_from),
    _Kind(m.GoAway, "go_away", _go_away_to, _go_away_from),
    _Kind(m.OnePhaseToken, "one_phase_token", _one_phase_token_to, _one_phase_token_from),
    _Kind(deciding.Votes, "votes", d.votes_to, d.votes_from),
    _Kind(deciding.Decide, "decide", d.decide_to, d.decide_from),
    _Kind(deciding.RegisterQuestion, "register_question", d.question_to, d.question_from),
    _Kind(deciding.Registers, "registers", d.registers_to, d.registers_from),
    _Kind(deciding.DecisionDone, "decision_done", d.done_to, d.done_from),
)

_ENCODE_TO: Final = {kind.message: kind for kind in TO_COORDINATOR}
_ENCODE_FROM: Final = {kind.message: kind for kind in FROM_COORDINATOR}
_DECODE_TO: Final = {kind.field: kind for kind in TO_COORDINATOR}
_DECODE_FROM: Final = {kind.field: kind for kind in FROM_COORDINATOR}
