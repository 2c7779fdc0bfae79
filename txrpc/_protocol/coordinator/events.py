"""What goes into the coordinator's core and what comes out, as values.

The order of `Output`'s fields is the order in which the shell must honour them: what is appended is not waited for, because
nothing in the same output depends on it; whatever depends on a durable decision is sent by a later step, the one that takes
`Logged`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from txrpc._protocol.messages import AboutEnd, FromCoordinator, GoAway, Hello, Inquiry, ToCoordinator
from txrpc._protocol.records import Decision, Incident
from txrpc.errors import ConfigurationError, Reason
from txrpc.ids import BranchId, Xid

__all__ = [
    "Bound",
    "Close",
    "Drain",
    "Event",
    "Forgot",
    "Limits",
    "LogHealth",
    "Logged",
    "Looked",
    "Lookup",
    "NotLogged",
    "Note",
    "Output",
    "Rebind",
    "Received",
    "SessionClosed",
    "SessionOpened",
    "Woke",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one coordinator accepts.  At a limit a request is refused with a reason that names it; nothing else suffers."""

    max_transactions: int = 10_000
    """Transactions between their commit request and their last acknowledgement."""
    max_branches: int = 256
    """Branches of one transaction."""
    max_sessions: int = 10_000
    max_message_bytes: int = 4 * 1024 * 1024
    max_timeout_ms: int = 600_000
    """The longest a transaction may take from begin to commit request; ended transactions are remembered that much longer."""
    max_remembered: int = 1_000_000
    """Ended transactions kept in memory to refuse late and repeated requests; with more, the oldest are let go and requests
    from their time are refused."""
    ack_wait_ms: int = 5_000
    """How long a client's commit waits for acknowledgements after the decision before it returns without them."""
    tick_ms: int = 5_000
    """How often sessions are told the coordinator's clock."""
    recovery_wait_ms: int = 2_000
    """How long after its start a coordinator presumes nothing about earlier epochs: until processes have connected again, one of
    which may know that this log has lost decisions (rule 18)."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "recovery_wait_ms" else 1
            if getattr(self, name) < least:
                raise ConfigurationError(f"limit {name} is {getattr(self, name)}; it must be at least {least}")


# ---------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A process connected and said Hello.  *session* is a number that the shell never uses twice."""

    session: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Received:
    """A message of an open session, other than its first Hello, and the node that it is for."""

    session: int
    node: str
    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The stream has ended, at either end."""

    session: int


@dataclass(frozen=True, slots=True)
class Logged:
    """These decisions, appended earlier, are durable, and the log has come to *position*."""

    xids: tuple[Xid, ...]
    position: int = 0


@dataclass(frozen=True, slots=True)
class NotLogged:
    """These decisions, appended earlier, are certainly not in the log and will not be."""

    xids: tuple[Xid, ...]
    reason: Reason


@dataclass(frozen=True, slots=True)
class Looked:
    """Answer to a `Lookup`: the record that the log holds, or None."""

    lookup: Lookup
    decision: Decision | None


@dataclass(frozen=True, slots=True)
class LogHealth:
    """The log stopped or began taking decisions.  While it does not, transactions abort instead of queueing behind it."""

    healthy: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Forgot:
    """The log deleted records decided before this time (milliseconds since 1970)."""

    before_ms: int


@dataclass(frozen=True, slots=True)
class Close:
    """An operator has looked at an incident, of one branch or of all of the transaction's (None), and closes it."""

    xid: Xid
    branch: BranchId | None = None


@dataclass(frozen=True, slots=True)
class Rebind:
    """An operator says that a resource name means another database: *identity*, or the next one that comes ("")."""

    name: str
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """What the log says that resource names mean, which other coordinators may have said to it ("": the next one that comes)."""

    identities: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Drain:
    """Shutting down: take no new commit request, finish what is being decided."""


@dataclass(frozen=True, slots=True)
class Woke:
    """The time that `Coordinator.next_wakeup_ms` named has come."""


# --------------------------------------------------------------------------------------------------------- outputs


@dataclass(frozen=True, slots=True)
class Lookup:
    """Ask the log for a record, then step `Looked`: *message* of *session* cannot be answered from memory."""

    session: int
    message: AboutEnd | Inquiry
    xid: Xid


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is worth a log line and a counter."""

    level: str
    event: str
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Output:
    """The effects of one step, in the order in which they must be honoured."""

    append: list[Decision] = field(default_factory=list)
    send: list[tuple[int, FromCoordinator]] = field(default_factory=list)
    behind: str = ""
    """Why this coordinator must stop: its log has lost decisions."""
    bind: dict[str, str] = field(default_factory=dict)
    """Names of resources and the databases that they mean from now on; to be recorded before any later decision.  Where another
    coordinator that shares the log was faster, its word holds, and comes back as `Bound`."""
    rebind: dict[str, str] = field(default_factory=dict)
    """The same on the word of an operator, which holds in any case."""
    incidents: list[Incident] = field(default_factory=list)
    """To be recorded before the same transactions are marked done."""
    closed: list[tuple[Xid, BranchId]] = field(default_factory=list)
    """Incidents that are over."""
    done: list[Xid] = field(default_factory=list)
    look: list[Lookup] = field(default_factory=list)
    close: list[tuple[int, GoAway]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


Event = (
    SessionOpened
    | Received
    | SessionClosed
    | Logged
    | NotLogged
    | Looked
    | LogHealth
    | Forgot
    | Close
    | Rebind
    | Bound
    | Drain
    | Woke
)
