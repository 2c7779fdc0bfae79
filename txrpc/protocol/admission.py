"""Who may open a session, and which branch lists are sound: the checks at the door, as functions from values to a refusal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from txrpc.errors import AbortCode, Reason
from txrpc.ids import Epoch
from txrpc.protocol.directory import Directory
from txrpc.protocol.events import Limits
from txrpc.protocol.messages import PROTOCOL_VERSION, BranchRef, GoAway, Hello, Owner

__all__ = ["check_branches", "refuse_hello"]


def refuse_hello(
    hello: Hello, group: str, owner: Owner, lineage: Collection[Epoch], limits: Limits, directory: Directory
) -> GoAway | None:
    """Why this process may not have a session, or None."""
    if hello.protocol != PROTOCOL_VERSION:
        text = f"this coordinator speaks protocol version {PROTOCOL_VERSION}, the process {hello.protocol}: upgrade one"
        return GoAway("protocol_version", text, retry=False)
    if hello.group != group:
        text = (
            f"this coordinator belongs to group {group!r}, the process to {hello.group!r}: set the same group on both"
        )
        return GoAway("group", text, retry=False)
    if hello.seen is not None and hello.seen.node == owner.node and hello.seen.epoch not in lineage:
        text = (
            f"this process has seen epoch {hello.seen.epoch} of coordinator {owner.node}, which this coordinator's log "
            "has never had: the log was restored from a backup, is a copy, or is another one; "
            "start the coordinator on its own log"
        )
        return GoAway("strange_log", text, retry=True)
    conflict = directory.conflict(hello.resources)
    if conflict is not None:
        mine, theirs = conflict
        text = (
            f"resource {mine.name!r} is {mine.identity} here, and {theirs.identity} in another connected process: "
            "one name must mean one database"
        )
        return GoAway("resource_conflict", text, retry=False)
    if len(directory) >= limits.max_sessions and directory.owner(hello.participant) is None:
        return GoAway("limit", f"the coordinator's max_sessions is {limits.max_sessions}", retry=True)
    return None


def check_branches(branches: Sequence[BranchRef], limits: Limits) -> Reason | None:
    """Why a commit request's branch list is refused, or None."""
    if len(branches) > limits.max_branches:
        text = f"the transaction has {len(branches)} branches; the coordinator's max_branches is {limits.max_branches}"
        return Reason(AbortCode.LIMIT_EXCEEDED, text)
    if len({ref.branch for ref in branches}) < len(branches):
        return Reason(AbortCode.PROTOCOL_VIOLATION, "the commit request lists a branch twice")
    return None
