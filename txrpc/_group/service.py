"""What a member of the group answers to the others."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from txrpc._group import founding
from txrpc._group.acceptor import DiskTrouble, LocalAcceptor
from txrpc._group.disk import EMPTY, MEMBER
from txrpc._group.heartbeats import GroupHeartbeats
from txrpc._group.names import SHARED
from txrpc._group.peers import Peers
from txrpc._wire.checks import name_from
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
        if self._acceptor.standing.stage != MEMBER or not self._acceptor.ready:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this disk is no member of the group yet")
        try:
            log = request.log if request.log == SHARED else name_from("log", request.log, NODE_MAX)
            question = question_from(request)
        except BadMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        try:
            return answer_to(await asyncio.wrap_future(self._acceptor.ask(log, question)))
        except DiskTrouble as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise

    async def Beat(self, request: peer_pb2.PeerBeat, context: _Context) -> peer_pb2.PeerBeats:
        """Another member lives."""
        await self._check(request.group, context)
        return self._heartbeats.heard(request)

    async def Found(self, request: peer_pb2.FoundRequest, context: _Context) -> peer_pb2.FoundReply:
        """How far this disk has come, and how far the first member wants it to come."""
        await self._check(request.group, context)
        standing = self._acceptor.standing
        if request.stage != EMPTY and request.group.sender == self._peers.members.names[0]:
            wanted, group_id = request.stage, request.group.id
            try:
                decided = self._acceptor.stand(lambda held: founding.answer(held, wanted, group_id))
                standing = await asyncio.wrap_future(decided)
            except DiskTrouble as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return peer_pb2.FoundReply(stage=standing.stage, id=standing.group_id)

    async def _check(self, group: peer_pb2.PeerGroup, context: _Context) -> None:
        misfit = self._peers.misfit(group)
        if misfit:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, misfit)
