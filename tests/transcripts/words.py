"""The names of a transcript: ``tx1`` is a transaction, ``a`` and ``b`` are processes, ``a1`` is a branch of process a in db-a."""

from __future__ import annotations

from typing import Any

from txrpc._protocol.messages import BranchRef, Vote
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid
from verification import words

__all__ = [
    "REASON",
    "REGISTER",
    "branch",
    "epoch",
    "gid",
    "listed",
    "message",
    "participant",
    "ref",
    "register",
    "shown",
    "xid",
]

REASON = Reason(AbortCode.APPLICATION_ERROR, "no")


REGISTER = RegisterId(b"ledger".ljust(24, b"."))


def xid(name: str) -> Xid:
    """``tx7``: begun at 1000 s."""
    return Xid.make(1_000_000, int(name.removeprefix("tx")).to_bytes(10, "big"))


def participant(name: str) -> ParticipantId:
    """``a``; another incarnation of it is ``a'``."""
    return ParticipantId(name.encode().ljust(8, b"."))


def branch(name: str) -> BranchId:
    """``a1``; ``a1^`` is the same one, in a transaction that a register decides."""
    return BranchId(name.removesuffix("^").encode().ljust(8, b"."))


def register(name: str) -> RegisterId | None:
    """The register that decides, if branch *name* says so."""
    return REGISTER if name.endswith("^") else None


def epoch(number: int) -> Epoch:
    """The coordinator's n-th."""
    return Epoch.make(number, 7)


def ref(text: str) -> BranchRef:
    """``a1``, ``a1*2`` (used by two calls), ``a1=PREPARED`` (voted early)."""
    text, _, vote = text.partition("=")
    name, _, calls = text.partition("*")
    early = Vote[vote] if vote else None
    token, counted = ("77", 1) if early else ("", 0)
    process, number = participant(name[0]), int(calls or 1)
    return BranchRef(branch(name), f"db-{name[0]}", process, number, early, token, counted, register(name))


def listed(name: str) -> PreparedBranch:
    """What a register keeps of ``a1``."""
    return PreparedBranch(branch(name), participant(name[0]), f"db-{name[0]}", "77")


def gid(name: str, tx: str, number: int) -> Gid:
    """The branch as it is named in the database."""
    under = register(name)
    node, of = ("c1", epoch(number)) if under is None else ("", Epoch(0))
    return Gid("default", node, of, xid(tx), branch(name), participant(name[0]), f"db-{name[0]}", under)


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
