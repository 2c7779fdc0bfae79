"""What an operator may ask the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc

from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._coordinator.host import Host
from txrpc._coordinator.in_doubt import in_doubt
from txrpc._coordinator.service import ServerContext, SessionService
from txrpc._decision_log.port import LogError
from txrpc._group.changes import Change
from txrpc._group.member import GroupMember
from txrpc._group.members import checked_members, tolerance
from txrpc._protocol.coordinator.events import Close, Rebind
from txrpc._protocol.coordinator.rows import BranchRow, State, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.coordinator.state import sentence
from txrpc._protocol.messages import Vote
from txrpc._protocol.records import Incident
from txrpc._wire.checks import branch_id, name_from, owner_to, text_from, text_to, xid_from
from txrpc._wire.v1 import admin_pb2, admin_pb2_grpc, session_pb2
from txrpc.errors import BadMessage, ConfigurationError
from txrpc.ids import RESOURCE_MAX

__all__ = ["AdminService", "library_version"]

_LIMIT = 100
_LIMIT_MAX = 10_000


def library_version() -> str:
    """The installed version of txrpc."""
    try:
        return version("txrpc")
    except PackageNotFoundError:
        return "unknown"


class AdminService(admin_pb2_grpc.AdminServicer):
    """See `protos/txrpc/v1/admin.proto`."""

    def __init__(self, host: Host, sessions: SessionService, group: str, member: GroupMember | None = None) -> None:
        self._host = host
        self._member = member
        self._sessions = sessions
        self._group = group

    async def Status(self, request: admin_pb2.StatusRequest, context: ServerContext) -> admin_pb2.StatusReply:
        """A picture of this moment."""
        await self._check_open(context)
        limit = min(request.limit or _LIMIT, _LIMIT_MAX)
        reply = self._status(self._host.home, limit)
        reply.batches.update(self._sessions.batches)
        reply.taken_over.extend(self._status(guest, limit) for guest in self._host.guests.values())
        for row, lives, leads, trouble in self._host.view():
            node = admin_pb2.NodeStatus(node=row.node, lives=lives, holder=row.holder, leads=leads, epoch=row.epoch)
            node.trouble = trouble
            reply.nodes.append(node)
        if self._member is not None:
            reply.view.CopyFrom(_group_status(self._member))
        return reply

    async def _check_open(self, context: ServerContext) -> None:
        if not self._host.opened:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator waits for its log: its own words say why")

    def _status(self, driver: CoordinatorDriver, limit: int) -> admin_pb2.StatusReply:
        core, now_ms = driver.core, driver.now_ms()
        doubts = sorted(in_doubt(core, now_ms), key=lambda doubt: -doubt.age_ms)
        oldest = sorted(core.state.transactions.values(), key=lambda row: row.begun_ms)[:limit]
        peers = self._sessions.peers
        return admin_pb2.StatusReply(
            owner=owner_to(driver.owner),
            group=self._group,
            version=library_version(),
            log=driver.log_location,
            log_healthy=not core.state.log_trouble,
            uptime_ms=driver.uptime_ms,
            committed=core.state.committed,
            aborted=core.state.aborted,
            heuristic=core.state.heuristic,
            open=len(core.state.transactions),
            in_doubt=len({doubt.xid for doubt in doubts}),
            lost=core.state.lost,
            position=core.state.position,
            identities=core.state.identities,
            doubts=[
                admin_pb2.InDoubtBranch(
                    xid=d.xid, branch=d.branch, resource=d.resource, age_ms=d.age_ms, reason=text_to(d.reason)
                )
                for d in doubts[:limit]
            ],
            incidents=[_incident(incident) for incident in list(core.state.incidents.values())[:limit]],
            sessions=[_session(each, peers, now_ms) for each in core.state.directory.sessions.values()],
            transactions=[_transaction(row, now_ms) for row in oldest],
            messages=driver.messages,
            log_batches=driver.book.batches,
            log_decisions=driver.book.records,
        )

    async def Close(self, request: admin_pb2.CloseRequest, context: ServerContext) -> admin_pb2.CloseReply:
        """Close incidents that an operator has seen to."""
        try:
            xid = xid_from(request.xid)
            branch = branch_id(request.branch) if request.branch else None
        except BadMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        await self._check_open(context)
        closed = 0
        for driver in self._host.drivers:
            before = len(driver.core.state.incidents)
            driver.step(Close(xid, branch))
            closed += before - len(driver.core.state.incidents)
        return admin_pb2.CloseReply(closed=closed)

    async def Rebind(self, request: admin_pb2.RebindRequest, context: ServerContext) -> admin_pb2.RebindReply:
        """Let a resource name mean another database."""
        try:
            name = name_from("resource", request.name, RESOURCE_MAX)
        except BadMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        await self._check_open(context)
        before = self._host.home.core.state.identities.get(name, "")
        for driver in self._host.drivers:
            driver.step(Rebind(name, text_from(request.identity)))
        return admin_pb2.RebindReply(before=before)

    async def Group(self, request: admin_pb2.GroupRequest, context: ServerContext) -> admin_pb2.GroupStatus:
        """Who the members of the group are."""
        return _group_status(await self._check_member(context))

    async def ChangeGroup(self, request: admin_pb2.ChangeGroupRequest, context: ServerContext) -> admin_pb2.GroupStatus:
        """Members come or go."""
        member = await self._check_member(context)
        try:
            come = checked_members(request.come.items())
            change = Change(come, tuple(request.go), request.reads, request.writes)
            # It ends whether or not the one that asks waits: half of it is not a state to leave the group in.
            await asyncio.shield(asyncio.to_thread(member.changes.make, change))
        except ConfigurationError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except LogError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return _group_status(member)

    async def _check_member(self, context: ServerContext) -> GroupMember:
        if self._member is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "this coordinator has no --members: it is of no group"
            )
            raise AssertionError
        return self._member


def _group_status(member: GroupMember) -> admin_pb2.GroupStatus:
    view = member.view
    return admin_pb2.GroupStatus(
        number=view.number,
        addresses=view.addresses,
        reads=view.reads,
        writes=view.writes,
        former=sorted(view.former),
        tolerance=tolerance(view),
        trouble={name: text_to(why) for name, why in member.trouble().items()},
    )


def _session(entry: SessionEntry, peers: Mapping[int, str], now_ms: int) -> admin_pb2.SessionStatus:
    resources = [
        session_pb2.ResourceInfo(name=r.name, kind=r.kind, identity=r.identity, trouble=text_to(r.trouble))
        for r in entry.hello.resources
    ]
    return admin_pb2.SessionStatus(
        participant=entry.hello.participant,
        process=entry.hello.process,
        peer=peers.get(entry.session, ""),
        age_ms=now_ms - entry.since_ms,
        resources=resources,
    )


def _transaction(row: TransactionRow, now_ms: int) -> admin_pb2.TransactionStatus:
    return admin_pb2.TransactionStatus(
        xid=row.xid,
        state=row.state.value,
        age_ms=now_ms - row.begun_ms,
        branches=[_branch(row, branch) for branch in row.branches.values()],
    )


def _incident(incident: Incident) -> admin_pb2.IncidentStatus:
    finish: Any = incident.finish
    return admin_pb2.IncidentStatus(
        xid=incident.xid,
        branch=incident.branch,
        resource=incident.resource,
        finish=finish,
        at_ms=incident.at_ms,
        text=sentence(incident),
    )


def _branch(row: TransactionRow, branch: BranchRow) -> admin_pb2.BranchStatus:
    if branch.acked:
        state = "committed"
    elif row.state is State.COMMITTING and branch.vote is Vote.PREPARED:
        state = "committing"
    else:
        state = branch.vote.name.lower().replace("_", " ") if branch.vote else "asked"
    waits = state in ("committing", "asked")
    reason = branch.trouble or ("told, no answer yet" if waits else "")
    ref = branch.ref
    return admin_pb2.BranchStatus(
        branch=ref.branch, participant=ref.participant, resource=ref.resource, state=state, reason=reason
    )
