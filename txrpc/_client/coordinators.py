"""The coordinators that a process knows, and its sessions with them.

How to think of it
    A process dials every coordinator of its group: one session for each address.  A session speaks first for the node whose
    address it is (its *home*), and later perhaps for others too, which that coordinator has taken over.  So what is known is
    kept by node: in which epoch it was last heard of, and over which session it can be reached, if over any.

    A node is in one place at a time, and its epoch says which place is the later one.  What an earlier epoch still says, over
    a session that has not noticed yet, is not listened to.

    A new transaction begins with the first session, in the order of the addresses, whose home is there.  A node that was
    taken over begins none: it goes back to its own process as soon as that is there again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from txrpc._protocol.messages import Owner, ToCoordinator, Welcome
from txrpc.errors import ConfigurationError, CoordinatorUnavailable

__all__ = ["Known", "KnownCoordinator", "Outbox", "all_over", "choose", "find", "live", "unavailable"]


class Outbox(Protocol):
    """A session: where messages to coordinators go."""

    address: str

    @property
    def trouble(self) -> str:
        """Return why it is not open; "" if it is."""

    @property
    def refused(self) -> bool:
        """Return whether its coordinator will never have this process."""

    @property
    def over(self) -> bool:
        """Return whether it will not be open again: it was closed, or refused."""

    def send(self, node: str, *messages: ToCoordinator) -> None:
        """Queue for coordinator *node*; raises `CoordinatorUnavailable` without a session, `LimitExceeded` when it is full."""


@dataclass(slots=True)
class KnownCoordinator:
    """What a process knows of one coordinator node."""

    welcome: Welcome
    """The latest: of the greatest epoch that was heard of."""
    position: int
    """The greatest position of its log that was heard of (rule 18)."""
    tick: int
    heard: int
    """Of which Hello it has accepted the resources (rule 17)."""
    session: Outbox | None
    """Over which it can be reached; None while there is none.  Another coordinator has taken it over if it is not at home there."""

    @property
    def owner(self) -> Owner:
        """The node and its epoch."""
        return self.welcome.owner


class Known(Protocol):
    """The part of `ClientState` that this module reads."""

    sessions: tuple[Outbox, ...]
    coordinators: dict[str, KnownCoordinator]
    homes: dict[Outbox, str]
    chosen: KnownCoordinator | None


def choose(client: Known) -> KnownCoordinator | None:
    """Return the coordinator that new transactions begin with, or None."""
    for session in client.sessions:
        known = client.coordinators.get(client.homes.get(session, ""))
        if known is not None and known.session is session:
            return known
    return None


def live(client: Known, node: str) -> KnownCoordinator | None:
    """Return coordinator *node* ("": the one that new transactions begin with) if it can be reached."""
    known = client.coordinators.get(node) if node else client.chosen
    return known if known is not None and known.session is not None else None


def all_over(client: Known) -> bool:
    """Return whether there are no sessions, or none that will be open again."""
    return all(session.over for session in client.sessions)


def find(client: Known, node: str) -> Owner | None:
    """Return the owner of the live session with *node* ("": any), or None while there may yet be one.

    Raises `CoordinatorUnavailable` when there will be none, `ConfigurationError` if all coordinators have refused this process.
    """
    if (known := live(client, node)) is not None:
        return known.owner
    if not client.sessions:
        raise CoordinatorUnavailable("this manager has no coordinator")
    if all_over(client):
        if any(session.refused for session in client.sessions):
            raise ConfigurationError("; ".join(session.trouble for session in client.sessions))
        raise unavailable(client, node)
    return None


def unavailable(client: Known, node: str) -> CoordinatorUnavailable:
    """Return what to raise where coordinator *node* ("": any) cannot be reached now."""
    whom = f"coordinator {node!r}" if node and len(client.sessions) > 1 else "the coordinator"
    troubles = [session.trouble for session in client.sessions if session.trouble]
    return CoordinatorUnavailable(f"no session with {whom}: {'; '.join(troubles) or 'it has not been taken over yet'}")
