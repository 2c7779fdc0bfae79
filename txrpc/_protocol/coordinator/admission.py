"""Who may open a session, and which branch lists are sound: the checks at the door, as functions from values to a refusal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.coordinator.sessions import SessionRegistry
from txrpc._protocol.messages import PROTOCOL_VERSION, BranchRef, GoAway, Hello, Owner
from txrpc.errors import AbortCode, Reason
from txrpc.ids import Epoch

__all__ = ["check_branches", "is_behind", "refuse_hello", "refuse_number", "refuse_resources"]


def refuse_hello(hello: Hello, group: str, owner: Owner, lineage: Collection[Epoch]) -> GoAway | None:
    """Return why this process and this coordinator do not belong together, or None."""
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
        if hello.seen.epoch.number > owner.epoch.number:
            text += f" (unless epoch {owner.epoch} was taken over just now, and ends in a moment)"
        return GoAway("strange_log", text, retry=True)
    return None


def is_behind(hello: Hello, owner: Owner, ends: Mapping[Epoch, int]) -> str:
    """Return why the log must have lost decisions, if what this process has seen proves that; else "" (rule 18).

    *ends*: the greatest position that each earlier epoch reached, as far as this log knows.
    """
    seen = hello.seen
    if seen is None or seen.node != owner.node or hello.position <= ends.get(seen.epoch, hello.position):
        return ""
    return (
        f"process {hello.process} has seen position {hello.position} under epoch {seen.epoch}, and this log came only to "
        f"{ends[seen.epoch]}: it was restored from a backup, or is a standby that lagged; "
        "start the coordinator on the log that has the latest decisions"
    )


def refuse_resources(hello: Hello, identities: Mapping[str, str]) -> GoAway | None:
    """Return why the resources of this process are not those that are known by their names, or None (rule 17)."""
    names = {identity: name for name, identity in identities.items()}
    for resource in hello.resources:
        name, identity = resource.name, resource.identity
        if not identity:
            continue  # this process cannot tell
        bound, other = identities.get(name, identity), names.get(identity, name)
        if bound != identity:
            text = (
                f"resource {name!r} is database {identity} in process {hello.process}, and was {bound} until now: one name must "
                f"mean one database; correct its URL, or, if the database was moved, say so: txrpc rebind {name} {identity}"
            )
            return GoAway("resource_conflict", text, retry=True)
        if other != name:
            text = (
                f"resource {name!r} of process {hello.process} is database {identity}, which is known as {other!r}: one database "
                "must have one name, or a transaction that uses both waits for itself"
            )
            return GoAway("resource_conflict", text, retry=True)
        names[identity] = name
    return None


def refuse_number(hello: Hello, limits: Limits, directory: SessionRegistry) -> GoAway | None:
    """Return why there is no room for one more session, or None."""
    if len(directory) >= limits.max_sessions and directory.owner(hello.participant) is None:
        return GoAway("limit", f"the coordinator's max_sessions is {limits.max_sessions}", retry=True)
    return None


def check_branches(branches: Sequence[BranchRef], limits: Limits) -> Reason | None:
    """Return why a commit request's branch list is refused, or None."""
    if len(branches) > limits.max_branches:
        text = f"the transaction has {len(branches)} branches; the coordinator's max_branches is {limits.max_branches}"
        return Reason(AbortCode.LIMIT_EXCEEDED, text)
    if len({ref.branch for ref in branches}) < len(branches):
        return Reason(AbortCode.PROTOCOL_VIOLATION, "the commit request lists a branch twice")
    if len({ref.register for ref in branches}) > 1:
        return Reason(AbortCode.PROTOCOL_VIOLATION, "the branches are not all under one register")
    return None
