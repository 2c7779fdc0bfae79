"""The members of a group as an operator names them: what is allowed, what follows from a change, and what the quorums survive."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from txrpc._protocol.quorum.views import View
from txrpc.errors import ConfigurationError, InvalidName
from txrpc.ids import NODE_MAX, check_name

__all__ = ["changed", "checked_members", "founders", "tolerance"]


def _parse(text: str) -> dict[str, str]:
    """Return the addresses of *text*, ``c1=HOST:PORT,c2=HOST:PORT,...``, by name; raises `ConfigurationError`."""
    parts = [[piece.strip() for piece in part.split("=", 1)] for part in text.split(",")]
    for part in parts:
        if len(part) != 2:
            raise _malformed(part[0])
    return checked_members((name, address) for name, address in parts)


def checked_members(members: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the addresses of *members*, pairs of name and address, by name; raises `ConfigurationError`."""
    addresses: dict[str, str] = {}
    for name, address in members:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) <= 65_535:
            raise _malformed(f"{name}={address}")
        try:
            check_name("node", name, NODE_MAX)
        except InvalidName as error:
            raise ConfigurationError(str(error)) from None
        if name in addresses:
            raise ConfigurationError(f"two members have one name: {name}")
        if address in addresses.values():
            raise ConfigurationError(f"two members have one address: {address}")
        addresses[name] = address
    return addresses


def _malformed(member: str) -> ConfigurationError:
    return ConfigurationError(f"members are NODE=HOST:PORT with commas between them, not {member!r}")


def founders(text: str, reads: int = 0, writes: int = 0) -> View:
    """Return the first view of a group with the members of *text*; a quorum of 0 is a majority.  Raises `ConfigurationError`."""
    addresses = _parse(text)
    majority = len(addresses) // 2 + 1
    return View(1, addresses, reads or majority, writes or majority)


def changed(view: View, come: Mapping[str, str], go: Collection[str] = (), reads: int = 0, writes: int = 0) -> View:
    """Return the view that follows *view* when the members *come* and *go*; a name that is there and comes gets another address.

    A quorum of 0 stays a majority if it is one, and else what it is.  Raises `ConfigurationError` where that is not possible.
    """
    for name in go:
        if name not in view.addresses:
            raise ConfigurationError(f"{name!r} is no member of the group: they are {', '.join(view.names)}")
    for name, address in come.items():
        if view.addresses.get(name) == address:
            raise ConfigurationError(f"{name!r} is a member of the group already, at {address}")
        if any(address == other and name != each for each, other in view.addresses.items()):
            raise ConfigurationError(f"another member has the address {address}")
    addresses = {name: address for name, address in view.addresses.items() if name not in go} | dict(come)
    if not addresses:
        raise ConfigurationError("the last member cannot be removed")
    before, now = len(view.addresses) // 2 + 1, len(addresses) // 2 + 1
    following = View(
        view.number + 1,
        addresses,
        reads or (now if view.reads == before else view.reads),
        writes or (now if view.writes == before else view.writes),
        (view.former | frozenset(go)) - addresses.keys(),
        view.born,
    )
    if (addresses, following.reads, following.writes) == (view.addresses, view.reads, view.writes):
        raise ConfigurationError("nothing would change")
    if not view.quorums.meets(following.quorums):
        raise ConfigurationError(
            "quorums of this view and of the next may miss each other: change one member at a time, and quorums in small steps"
        )
    return following


def tolerance(view: View) -> str:
    """What the group survives, in words (Gifford 1979; NR + f and NW + f must not be more than N)."""
    number, reads, writes = len(view.addresses), view.reads, view.writes
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
