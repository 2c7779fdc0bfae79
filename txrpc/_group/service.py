"""What a member of the group answers to the others."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from txrpc._group import founding
from txrpc._group.acceptor import DiskTrouble, LocalAcceptor
from txrpc._group.disk import EMPTY
from txrpc._group.heartbeats import GroupHeartbeats
from txrpc._group.peers import Peers
from txrpc._group.shared import SHARED
from txrpc._wire.checks import name_from
from txrpc._wire.commands import view_from, view_to
from txrpc._wire.peer import answer_to, question_from
from txrpc._wire.v1 import peer_pb2, peer_pb2_grpc
from txrpc.errors import BadMessage
from txrpc.ids import NODE_MAX

__all__ = ["PeerService"]

_Context = grpc.aio.ServicerContext[Any, Any]


class PeerService(peer_pb2_grpc.PeerServicer):
    """See `protos/txrpc/v1/peer.proto`."""

    def __init__(self, acceptor: LocalAcceptor, peers: Peers, heartbeats: GroupHeartbeats) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._heartbeats = heartbeats

    async def Ask(self, request: peer_pb2.PeerQuestion, context: _Context) -> peer_pb2.PeerAnswer:
        """A question about one node's log."""
        await self._check(request.group, context)
        await self._check_member(request.group, context)
        if not self._acceptor.ready:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this disk is no member of the group yet")
        try:
            log = request.log if request.log == SHARED else name_from("log", request.log, NODE_MAX)
            question = question_from(request)
            if question.view > self._peers.view.number:
                raise BadMessage(f"view {question.view}: the question does not say who its members are")
        except BadMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        try:
            return answer_to(await asyncio.wrap_future(self._acceptor.ask(log, question)), self._peers.view)
        except DiskTrouble as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise

    async def Beat(self, request: peer_pb2.PeerBeat, context: _Context) -> peer_pb2.PeerBeats:
        """Another member lives."""
        await self._check(request.group, context)
        await self._check_member(request.group, context)
        return self._heartbeats.heard(request)

    async def Found(self, request: peer_pb2.FoundRequest, context: _Context) -> peer_pb2.FoundReply:
        """How far this disk has come, and how far the first member wants it to come."""
        await self._check(request.group, context, founding=request.stage != EMPTY)
        standing = self._acceptor.standing
        if request.stage != EMPTY and request.group.sender == self._peers.view.names[0]:
            wanted, group_id = request.stage, request.group.id
            try:
                decided = self._acceptor.stand(lambda held: founding.answer(held, wanted, group_id))
                standing = await asyncio.wrap_future(decided)
            except DiskTrouble as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        view = view_to(self._peers.view)
        return peer_pb2.FoundReply(stage=standing.stage, id=standing.group_id, view=view)

    async def _check(self, group: peer_pb2.PeerGroup, context: _Context, *, founding: bool = False) -> None:
        misfit = self._peers.misfit(group, founding=founding)
        if misfit:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, misfit)

    async def _check_member(self, group: peer_pb2.PeerGroup, context: _Context) -> None:
        """Refuse one that does not belong to the same group yet, and hear of a change that it has heard of."""
        if not group.id or group.id != self._peers.group_id:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "one of the two is no member of the group yet")
        if group.view.number > self._peers.view.number:
            try:
                self._peers.adopt(view_from(group.view))
            except BadMessage as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
