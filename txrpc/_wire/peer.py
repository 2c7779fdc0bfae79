"""Questions to an acceptor and its answers to protobuf and back.

Decoding validates everything (`txrpc._wire.checks`) and raises `BadMessage` and nothing else, whatever the bytes are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from txrpc._protocol.quorum import acceptor as a
from txrpc._wire import checks as c
from txrpc._wire.commands import command_from, command_to, snapshot_from, snapshot_to
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
    match question:
        case a.Prepare(epoch, has, look):
            return {"epoch": epoch, "prepare": pb.PrepareSlot(has=has, look=look)}
        case a.Accept(epoch, slot, command, chosen):
            return {"epoch": epoch, "accept": pb.AcceptSlot(slot=slot, chosen=chosen, command=command_to(command))}
        case a.Learn(epoch, chosen):
            return {"epoch": epoch, "learn": pb.LearnSlot(chosen=chosen)}
        case a.Install(epoch, base, incarnation):
            return {"epoch": epoch, "install": pb.InstallState(base=snapshot_to(base), incarnation=incarnation)}


def question_from(message: pb.PeerQuestion) -> a.Question:
    """What is asked."""
    epoch = c.epoch_from(message.epoch)
    match message.WhichOneof("question"):
        case "prepare":
            return a.Prepare(epoch, message.prepare.has, message.prepare.look)
        case "accept":
            asked = message.accept
            return a.Accept(epoch, asked.slot, command_from(asked.command), asked.chosen)
        case "learn":
            return a.Learn(epoch, message.learn.chosen)
        case "install":
            return a.Install(epoch, snapshot_from(message.install.base), message.install.incarnation)
        case _:
            raise BadMessage("a question of an unknown kind: the peer is of a newer version")


# ------------------------------------------------------------------------------------------------------------ answers


def answer_to(answer: a.Answer) -> pb.PeerAnswer:
    """An acceptor's answer; who it is and which epoch asked is known to the one that gets it."""
    match answer:
        case a.Promise(_, incarnation, _, base, slots, look):
            told = pb.PromiseReply(
                base=None if base is None else snapshot_to(base),
                slots=[
                    pb.AcceptedSlot(slot=number, epoch=slot.epoch, command=command_to(slot.command))
                    for number, slot in slots.items()
                ],
                look=look,
            )
            return pb.PeerAnswer(incarnation=incarnation, promise=told)
        case a.Accepted(_, incarnation, _, slot, has):
            return pb.PeerAnswer(incarnation=incarnation, accepted=pb.AcceptedReply(slot=slot, has=has))
        case a.Refused(_, incarnation, _, promised):
            return pb.PeerAnswer(incarnation=incarnation, refused=pb.RefusedReply(promised=promised))


def answer_from(acceptor: str, epoch: Epoch, message: pb.PeerAnswer) -> a.Answer:
    """What *acceptor* has answered to a question of *epoch*."""
    who = (acceptor, message.incarnation, epoch)
    match message.WhichOneof("answer"):
        case "promise":
            told = message.promise
            slots = {s.slot: a.Slot(c.epoch_from(s.epoch), command_from(s.command)) for s in told.slots}
            base = snapshot_from(told.base) if told.HasField("base") else None
            return a.Promise(*who, base, slots, told.look)
        case "accepted":
            return a.Accepted(*who, message.accepted.slot, message.accepted.has)
        case "refused":
            return a.Refused(*who, c.epoch_from(message.refused.promised))
        case _:
            raise BadMessage("an answer of an unknown kind: the peer is of a newer version")
