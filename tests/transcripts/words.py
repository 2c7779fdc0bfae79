"""The names of a transcript: ``tx1`` is a transaction, ``a`` and ``b`` are processes, ``a1`` is a branch of process a in db-a."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from txrpc._protocol.messages import BranchRef, Owner, ResourceInfo, Vote
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid

__all__ = ["REASON", "branch", "epoch", "gid", "message", "participant", "ref", "shown", "xid"]

REASON = Reason(AbortCode.APPLICATION_ERROR, "no")


def xid(name: str) -> Xid:
    """``tx7``: begun at 1000 s."""
    return Xid.make(1_000_000, int(name.removeprefix("tx")).to_bytes(10, "big"))


def participant(name: str) -> ParticipantId:
    """``a``; another incarnation of it is ``a'``."""
    return ParticipantId(name.encode().ljust(8, b"."))


def branch(name: str) -> BranchId:
    """``a1``."""
    return BranchId(name.encode().ljust(8, b"."))


def epoch(number: int) -> Epoch:
    """The coordinator's n-th."""
    return Epoch.make(number, 7)


def ref(text: str) -> BranchRef:
    """``a1``, ``a1*2`` (used by two calls), ``a1=PREPARED`` (voted early)."""
    text, _, vote = text.partition("=")
    name, _, calls = text.partition("*")
    early = Vote[vote] if vote else None
    return BranchRef(branch(name), f"db-{name[0]}", participant(name[0]), int(calls or 1), early, "77" if early else "")


def gid(name: str, tx: str, number: int) -> Gid:
    """The branch as it is named in the database."""
    return Gid("default", "c1", epoch(number), xid(tx), branch(name), participant(name[0]), f"db-{name[0]}")


def shown(value: Any) -> str:
    """Anything in the words of a transcript."""
    match value:
        case Xid():
            return f"tx{int.from_bytes(value[-4:], 'big') & 0xFFFFFF}"
        case BranchId() | ParticipantId():
            return value.rstrip(b".").decode()
        case Epoch():
            return str(value.number)
        case Owner():
            return f"{value.node}/{value.epoch.number}"
        case Gid():
            return f"{shown(value.xid)} {shown(value.branch)}"
        case BranchRef():
            vote = f"={value.vote.name}" if value.vote is not None else ""
            return f"{shown(value.branch)}*{value.calls}{vote}"
        case PreparedBranch():
            return shown(value.branch)
        case ResourceInfo():
            return value.name
        case Reason():
            return f"({value.code.name}: {value.text})" if value.text else f"({value.code.name})"
        case tuple():
            return "[" + " ".join(map(shown, value)) + "]"
    return str(getattr(value, "name", value))


def message(value: Any) -> str:
    """A message: its type, whom it is about, and what else it says."""
    words = [type(value).__name__]
    for field in fields(value):
        one = getattr(value, field.name)
        if field.name in ("xid", "branch", "gid"):
            words.append(shown(one))
        elif one not in (None, "", (), 0) or field.name in ("vote", "outcome", "result", "finish"):
            words.append(f"{field.name}={shown(one)}")
    return " ".join(words)
