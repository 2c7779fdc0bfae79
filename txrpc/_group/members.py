"""Who belongs to a group, where they listen, and what its quorums survive."""

from __future__ import annotations

from dataclasses import dataclass

from txrpc._protocol.quorum.proposer import Quorums
from txrpc.errors import ConfigurationError, InvalidName
from txrpc.ids import NODE_MAX, check_name

__all__ = ["Members"]


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a group, in the order of their names; the same value in each of them."""

    addresses: dict[str, str]
    quorums: Quorums

    @classmethod
    def parse(cls, text: str, reads: int = 0, writes: int = 0) -> Members:
        """*text*: ``c1=HOST:PORT,c2=HOST:PORT,...``; a quorum of 0 is a majority.  Raises `ConfigurationError`."""
        addresses: dict[str, str] = {}
        for part in text.split(","):
            name, equals, address = (piece.strip() for piece in part.partition("="))
            host, colon, port = address.rpartition(":")
            if not equals or not colon or not host or not port.isdigit() or not 0 < int(port) <= 65_535:
                raise ConfigurationError(f"members are NODE=HOST:PORT with commas between them, not {part.strip()!r}")
            try:
                check_name("node", name, NODE_MAX)
            except InvalidName as error:
                raise ConfigurationError(str(error)) from None
            if name in addresses:
                raise ConfigurationError(f"two members have one name: {name}")
            if address in addresses.values():
                raise ConfigurationError(f"two members have one address: {address}")
            addresses[name] = address
        majority = len(addresses) // 2 + 1
        names = tuple(sorted(addresses))
        quorums = Quorums(names, reads or majority, writes or majority)
        return cls({name: addresses[name] for name in names}, quorums)

    @property
    def names(self) -> tuple[str, ...]:
        """In order; the first one founds the group."""
        return self.quorums.acceptors

    def tolerance(self) -> str:
        """What the group survives, in words (Gifford 1979; NR + f and NW + f must not be more than N)."""
        number, reads, writes = len(self.names), self.quorums.reads, self.quorums.writes
        down, away, lost = number - writes, number - reads, writes - 1
        said = (
            f"decisions go on with {_members(down)} down; a node that died can be taken over with {_members(away)} down; "
            f"what was decided survives the loss of {_disks(lost)}"
        )
        # To let a new disk in takes a write quorum of the others.
        return said if writes < number else f"{said}; and no lost disk can be replaced"


def _members(number: int) -> str:
    return "no member" if number == 0 else "1 member" if number == 1 else f"any {number} members"


def _disks(number: int) -> str:
    return "no disk" if number == 0 else "1 disk" if number == 1 else f"any {number} disks"
