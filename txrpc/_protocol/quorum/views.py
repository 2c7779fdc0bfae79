"""Who the acceptors of a group are, how many of them make a quorum, and how one view of that follows another.

How to think of it
    Views are numbered, and decided one after the other, in the log that all members share.  At any time two views that follow each
    other may be in use, by members of which one has heard of the change and the other not.  That is safe, because any write quorum
    of one meets any read quorum of the other (`View.follows`).

    Three in use would not be.  So the next change waits until every log has *moved*: until all that it holds is on a write quorum
    of the new view.  From then on no epoch can be opened in the view before: an acceptor that has heard of a view answers to no
    earlier one, and one of those is in every read quorum.

Sources: Lamport, Malkhi and Zhou, "Reconfiguring a State Machine" (2010); Ongaro, "Consensus: Bridging Theory and Practice" (2014),
section 4.1, one member at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from txrpc.errors import ConfigurationError

__all__ = ["Quorums", "View"]


@dataclass(frozen=True, slots=True)
class Quorums:
    """Who the acceptors are, and how many must have answered to a read and to a write."""

    acceptors: tuple[str, ...]
    reads: int
    writes: int
    view: int = 1
    """The number of the view that says so."""

    def __post_init__(self) -> None:
        number = len(self.acceptors)
        if len(set(self.acceptors)) < number:
            raise ConfigurationError("two acceptors have one name")
        if not (1 <= self.reads <= number and 1 <= self.writes <= number):
            raise ConfigurationError(
                f"quorums of {self.reads} and {self.writes} are not possible with {number} acceptors"
            )
        if self.reads + self.writes <= number:
            raise ConfigurationError(
                f"reads of {self.reads} and writes of {self.writes} among {number} acceptors may miss each other: "
                f"together they must be more than {number}"
            )

    def meets(self, other: Quorums) -> bool:
        """Return whether any write quorum of each has a member of any read quorum of the other."""
        everyone = len({*self.acceptors, *other.acceptors})
        return self.reads + other.writes > everyone and other.reads + self.writes > everyone


@dataclass(frozen=True, slots=True)
class View:
    """The members of a group, from one change to the next."""

    number: int
    addresses: Mapping[str, str]
    reads: int
    writes: int
    former: frozenset[str] = frozenset()
    """Names of members that have left: their logs are still there, and run by others."""
    born: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of each log that is younger than the group: which disks counted when its node was added, for it begins with those.

    It never changes after that: one whose disk is another one since must be admitted by each log that it may have known.
    """

    def __post_init__(self) -> None:
        """Raise `ConfigurationError` if the quorums are not possible."""
        _ = self.quorums

    @property
    def names(self) -> tuple[str, ...]:
        """The members, in order; the first one founds the group."""
        return tuple(sorted(self.addresses))

    def knows(self, name: str) -> bool:
        """Return whether there is a log of that name: of a member, or of one that was."""
        return name in self.addresses or name in self.former

    @property
    def quorums(self) -> Quorums:
        """The members as acceptors."""
        return Quorums(self.names, self.reads, self.writes, self.number)
