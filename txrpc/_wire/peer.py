"""Questions to an acceptor and its answers to protobuf and back.

Decoding validates everything (`txrpc._wire.checks`) and raises `BadMessage` and nothing else, whatever the bytes are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from txrpc._protocol.quorum import acceptor as a
from txrpc._protocol.quorum.views import View
from txrpc._wire import checks as c
from txrpc._wire.commands import command_from, command_to, number_from, snapshot_from, snapshot_to, view_to
from txrpc._wire.v1 import peer_pb2 as pb
from txrpc.errors import BadMessage
from txrpc.ids import Epoch

__all__ = [
    "answer_from",
    "answer_to",
    "question_from",
    "question_to",
]

_Fields: TypeAlias = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------- questions


def question_to(question: a.Question) -> _Fields:
    """The fields of a `PeerQuestion` that say what is asked."""
    fields = {"epoch": question.epoch, "view": question.view}
    match question:
        case a.Prepare():
            return {**fields, "prepare": pb.PrepareSlot(has=question.has, look=question.look)}
        case a.Accept():
            asked = pb.AcceptSlot(slot=question.slot, chosen=question.chosen, command=command_to(question.command))
            return {**fields, "accept": asked}
        case a.Learn():
            return {**fields, "learn": pb.LearnSlot(chosen=question.chosen)}
        case a.Install():
            given = pb.InstallState(base=snapshot_to(question.base), incarnation=question.incarnation)
            return {**fields, "install": given}


def question_from(message: pb.PeerQuestion) -> a.Question:
    """What is asked."""
    epoch, view = c.epoch_from(message.epoch), number_from(message.view)
    match message.WhichOneof("question"):
        case "prepare":
            return a.Prepare(epoch, message.prepare.has, message.prepare.look, view)
        case "accept":
            asked = message.accept
            return a.Accept(epoch, asked.slot, command_from(asked.command), asked.chosen, view)
        case "learn":
            return a.Learn(epoch, message.learn.chosen, view)
        case "install":
            return a.Install(epoch, snapshot_from(message.install.base), message.install.incarnation, view)
        case _:
            raise BadMessage("a question of an unknown kind: the peer is of a newer version")


# ------------------------------------------------------------------------------------------------------------ answers


def answer_to(answer: a.Answer, latest: View) -> pb.PeerAnswer:
    """An acceptor's answer; who it is and which epoch asked is known to the one that gets it.

    *latest*: the view that one that asks in an earlier one is told.
    """
    match answer:
        case a.Promise(_, incarnation, _, base, slots, look, view):
            told = pb.PromiseReply(
                base=None if base is None else snapshot_to(base),
                slots=[
                    pb.AcceptedSlot(slot=number, epoch=slot.epoch, command=command_to(slot.command))
                    for number, slot in slots.items()
                ],
                look=look,
            )
            return pb.PeerAnswer(incarnation=incarnation, view=view, promise=told)
        case a.Accepted(_, incarnation, _, slot, has, view):
            return pb.PeerAnswer(incarnation=incarnation, view=view, accepted=pb.AcceptedReply(slot=slot, has=has))
        case a.Refused(_, incarnation, _, promised):
            return pb.PeerAnswer(incarnation=incarnation, refused=pb.RefusedReply(promised=promised))
        case a.Outdated(_, incarnation, _, view):
            over = pb.OutdatedReply(latest=view_to(latest))
            return pb.PeerAnswer(incarnation=incarnation, view=view, outdated=over)


def answer_from(acceptor: str, epoch: Epoch, message: pb.PeerAnswer) -> a.Answer:
    """What *acceptor* has answered to a question of *epoch*."""
    who = (acceptor, message.incarnation, epoch)
    match message.WhichOneof("answer"):
        case "promise":
            told = message.promise
            slots = {s.slot: a.Slot(c.epoch_from(s.epoch), command_from(s.command)) for s in told.slots}
            base = snapshot_from(told.base) if told.HasField("base") else None
            return a.Promise(*who, base, slots, told.look, number_from(message.view))
        case "accepted":
            return a.Accepted(*who, message.accepted.slot, message.accepted.has, number_from(message.view))
        case "refused":
            return a.Refused(*who, c.epoch_from(message.refused.promised))
        case "outdated":
            return a.Outdated(*who, number_from(message.view))
        case _:
            raise BadMessage("an answer of an unknown kind: the peer is of a newer version")
