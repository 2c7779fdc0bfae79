"""The names of a transcript: ``tx1`` is a transaction, ``a`` and ``b`` are processes, ``a1`` is a branch of process a in db-a."""

from __future__ import annotations

from typing import Any

from txrpc._protocol.messages import BranchRef, Vote
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid
from verification import words

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


def _name(value: Any) -> str:
    match value:
        case Xid():
            return f"tx{int.from_bytes(value[-4:], 'big') & 0xFFFFFF}"
        case Epoch():
            return str(value.number)
    return str(value.rstrip(b".").decode())


def shown(value: Any) -> str:
    """Anything in the words of a transcript."""
    return words.words(value, _name)


def message(value: Any) -> str:
    """A message in the words of a transcript."""
    return words.message(value, _name)
