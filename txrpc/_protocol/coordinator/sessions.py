"""Who is connected: sessions, the resources they announce, and what each still owes an answer for.

Arithmetic on dictionaries only; which message goes where is decided here, when and why in `txrpc._protocol.coordinator.machine`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from txrpc._protocol.messages import Hello, ResourceInfo
from txrpc.ids import BranchId, ParticipantId, RegisterId, Xid

__all__ = ["SessionEntry", "SessionRegistry"]

AwaitedReply = tuple[Xid, BranchId]


@dataclass(slots=True)
class SessionEntry:
    """One live session.  `awaiting_reply`: the branches that it has been sent something for and has not answered."""

    session: int
    hello: Hello
    since_ms: int
    awaiting_reply: set[AwaitedReply] = field(default_factory=set)

    def has(self, resource: str) -> bool:
        """Return whether the process behind it can use *resource*."""
        return any(info.name == resource and not info.trouble for info in self.hello.resources)

    def holds(self, register: RegisterId) -> bool:
        """Return whether the process behind it can ask *register*, also as it was before its database failed over."""
        known = (info.register for info in self.hello.resources if not info.trouble)
        return any(each is not None and each.table == register.table for each in known)


class SessionRegistry:
    """The live sessions by number, by participant and by resource."""

    def __init__(self) -> None:
        self.sessions: dict[int, SessionEntry] = {}
        self._by_participant: dict[ParticipantId, int] = {}
        self._by_resource: dict[str, dict[int, ResourceInfo]] = {}
        self._by_register: dict[bytes, dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self.sessions)

    def add(self, session: int, hello: Hello, now_ms: int) -> SessionEntry:
        """Enter a session; its participant must not have another one."""
        entry = SessionEntry(session, hello, now_ms)
        self.sessions[session] = entry
        self._by_participant[hello.participant] = session
        self._index(entry)
        return entry

    def renew(self, session: int, hello: Hello) -> SessionEntry:
        """The process of a session says anew what its resources are."""
        entry = self.sessions[session]
        self._unindex(entry)
        entry.hello = hello
        self._index(entry)
        return entry

    def remove(self, session: int) -> SessionEntry | None:
        """Strike a session out; None if it is not known (it was replaced, or refused)."""
        entry = self.sessions.pop(session, None)
        if entry is None:
            return None
        if self._by_participant.get(entry.hello.participant) == session:
            del self._by_participant[entry.hello.participant]
        self._unindex(entry)
        return entry

    def _index(self, entry: SessionEntry) -> None:
        """What a process cannot use yet, it is not asked about."""
        for resource in entry.hello.resources:
            if not resource.trouble:
                self._by_resource.setdefault(resource.name, {})[entry.session] = resource
                if resource.register is not None:
                    self._by_register.setdefault(resource.register.table, {})[entry.session] = None

    def _unindex(self, entry: SessionEntry) -> None:
        for resource in entry.hello.resources:
            of_name = self._by_resource.get(resource.name, {})
            of_name.pop(entry.session, None)
            if not of_name:
                self._by_resource.pop(resource.name, None)
            table = resource.register.table if resource.register is not None else b""
            holders = self._by_register.get(table, {})
            holders.pop(entry.session, None)
            if not holders:
                self._by_register.pop(table, None)

    def owner(self, participant: ParticipantId) -> SessionEntry | None:
        """The session of that process incarnation."""
        session = self._by_participant.get(participant)
        return None if session is None else self.sessions[session]

    def finisher(self, participant: ParticipantId, resource: str) -> SessionEntry | None:
        """A session that can end a prepared branch: its own process, else any that has the resource."""
        # Its own process first: a resource that keeps what it prepared to itself can be finished by no other.
        own = self.owner(participant)
        if own is not None:
            return own
        others = self._by_resource.get(resource)
        return self.sessions[next(iter(others))] if others else None

    def holder(self, register: RegisterId) -> SessionEntry | None:
        """A session that can ask *register*."""
        holders = self._by_register.get(register.table)
        return self.sessions[next(iter(holders))] if holders else None

    def has(self, resource: str) -> bool:
        """Return whether a process with *resource* is connected."""
        return resource in self._by_resource
