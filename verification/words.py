"""Messages in words, for transcripts and for the diagrams of simulated runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from txrpc._protocol.messages import BranchRef, Owner, ResourceInfo
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

__all__ = ["message", "words"]

Identifier = Xid | BranchId | ParticipantId | RegisterId | Epoch

_ABOUT = ("xid", "branch", "gid")
"""Whom a message is about: said first, and without the field's name."""
_ALWAYS = ("vote", "outcome", "result", "finish")
"""Fields that say something also when they are empty."""


def words(value: Any, name: Callable[[Identifier], str] = str) -> str:
    """Return what one field says; *name* gives identifiers their names."""
    match value:
        case Xid() | BranchId() | ParticipantId() | RegisterId() | Epoch():
            return name(value)
        case Owner():
            return f"{value.node}/{name(value.epoch)}"
        case Gid():
            return f"{name(value.xid)} {name(value.branch)}"
        case BranchRef():
            vote = f"={value.vote.name}" if value.vote is not None else ""
            return f"{name(value.branch)}*{value.calls}{vote}"
        case PreparedBranch():
            return name(value.branch)
        case ResourceInfo():
            return value.name
        case Reason():
            return f"({value.code.name}: {value.text})" if value.text else f"({value.code.name})"
        case tuple():
            return "[" + " ".join(words(each, name) for each in value) + "]"
    return str(getattr(value, "name", value))


def message(value: Any, name: Callable[[Identifier], str] = str) -> str:
    """Return a message: its type, whom it is about, and what else it says."""
    said = [type(value).__name__]
    for field in fields(value):
        one = getattr(value, field.name)
        if field.name in _ABOUT:
            said.append(words(one, name))
        elif one not in (None, "", (), 0) or field.name in _ALWAYS:
            said.append(f"{field.name}={words(one, name)}")
    return " ".join(said)
