"""Names and numbers that identify things, as small immutable values with one text form each.

`Xid`, `BranchId` and `ParticipantId` are `bytes` underneath: they hash and compare at C speed, which matters because every
table of the protocol is keyed by them.  Nothing here draws randomness or reads a clock: both arrive as arguments
(`Xid.make`), so that a simulated world can be replayed from a seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from txrpc.errors import InvalidName

__all__ = [
    "GROUP_MAX",
    "NODE_MAX",
    "RESOURCE_MAX",
    "BranchId",
    "Epoch",
    "Gid",
    "ParticipantId",
    "RegisterId",
    "Xid",
    "check_name",
]

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")

GROUP_MAX: Final = 24
NODE_MAX: Final = 24
RESOURCE_MAX: Final = 40
"""Longest names, in characters: together with the rest of a `Gid` they stay below PostgreSQL's 199 bytes."""


def check_name(kind: str, name: str, longest: int) -> str:
    """Return *name* if it may end up in a global transaction identifier, and so in SQL text.

    Raises `InvalidName` for anything but ASCII letters, digits and inner ``.``, ``_`` or ``-``, or if it is longer than
    *longest* characters.  There is nothing to escape in such a name, which is the point.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(
            f"{kind} name {name!r} is not allowed: use ASCII letters, digits, '.', '_' and '-', "
            "beginning and ending with a letter or digit"
        )
    if len(name) > longest:
        raise InvalidName(f"{kind} name {name!r} has {len(name)} characters; at most {longest} are allowed")
    return name


class _FixedBytes(bytes):
    """Bytes of one fixed length whose text form is lower-case hexadecimal."""

    __slots__ = ()
    SIZE = 0

    def __new__(cls, value: bytes) -> Self:
        if len(value) != cls.SIZE:
            raise ValueError(f"{cls.__name__} has {cls.SIZE} bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; raises `ValueError` for anything else (a `uuid`'s dashes are accepted)."""
        return cls(bytes.fromhex(text.replace("-", "")))

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()!r})"


class Xid(_FixedBytes):
    """The 128-bit identifier of a transaction: a UUID version 7 (RFC 9562), made by the client."""

    __slots__ = ()
    SIZE = 16

    @classmethod
    def make(cls, unix_ms: int, random: bytes) -> Self:
        """Lay out a UUIDv7 from the time in milliseconds since 1970 and ten random bytes."""
        if len(random) != 10:
            raise ValueError("an Xid takes ten random bytes")
        head = (unix_ms & 0xFFFF_FFFF_FFFF).to_bytes(6, "big")
        tail = bytearray(random)
        tail[0] = 0x70 | (tail[0] & 0x0F)
        tail[2] = 0x80 | (tail[2] & 0x3F)
        return cls(head + bytes(tail))

    @property
    def unix_ms(self) -> int:
        """The maker's clock when this was made, in milliseconds since 1970.  For people: no rule depends on it."""
        return int.from_bytes(self[:6], "big")


class BranchId(_FixedBytes):
    """The random 64-bit identifier of one branch: of work in one resource by one process incarnation."""

    __slots__ = ()
    SIZE = 8


class ParticipantId(_FixedBytes):
    """The random 64-bit identifier of one process incarnation, drawn anew at every start."""

    __slots__ = ()
    SIZE = 8


class RegisterId(_FixedBytes):
    """Which register holds a decision: the random 128 bits that were made with it, and the incarnation of its database.

    The incarnation, a hash of 64 bits, changes whenever the database may have lost commits.
    """

    __slots__ = ()
    SIZE = 24

    @property
    def table(self) -> bytes:
        """The part that was made with the register."""
        return self[:16]

    @property
    def incarnation(self) -> bytes:
        """The part that changes."""
        return self[16:]


class Epoch(int):
    """A coordinator's incarnation: its number in the upper 32 bits, a random nonce in the lower 32.

    The number orders incarnations and is what fencing compares.  The nonce makes two incarnations distinguishable that have
    the same number because one of them runs on a restored or copied log: such a log continues another history than the
    one that a participant has seen, and the participant must not believe it.
    """

    __slots__ = ()

    @classmethod
    def make(cls, number: int, nonce: int) -> Self:
        """Combine a *number* (from 1) and a 32-bit *nonce*."""
        if not 0 < number < 1 << 31 or not 0 <= nonce < 1 << 32:
            raise ValueError(f"not an epoch: number {number}, nonce {nonce}")
        return cls(number << 32 | nonce)

    @property
    def number(self) -> int:
        """The first incarnation of a node is number 1."""
        return self >> 32

    def __str__(self) -> str:
        return f"{self >> 32}.{self & 0xFFFF_FFFF:08x}"

    def __repr__(self) -> str:
        return f"Epoch({self!s})"


@dataclass(frozen=True, slots=True)
class Gid:
    """The global identifier under which a database holds a prepared branch: all that recovery needs, in one string.

    Text form: ``txrpc1:group:node:epoch:xid:branch:participant:resource``, at most 182 ASCII characters, none of which needs
    quoting in SQL.  A branch whose transaction is decided in a register, which any coordinator can ask, has no node (``""``) and
    no epoch (0): ``txrpc2:group:register:xid:branch:participant:resource``, at most 188 characters.
    """

    group: str
    node: str
    epoch: Epoch
    xid: Xid
    branch: BranchId
    participant: ParticipantId
    resource: str
    register: RegisterId | None = None

    @classmethod
    def prefixes(cls, group: str) -> tuple[str, ...]:
        """What the text form of each branch of *group* begins with, one of them."""
        return f"txrpc1:{group}:", f"txrpc2:{group}:"

    def __str__(self) -> str:
        if self.register is None:
            head = f"txrpc1:{self.group}:{self.node}:{self.epoch:016x}"
        else:
            head = f"txrpc2:{self.group}:{self.register}"
        return f"{head}:{self.xid}:{self.branch}:{self.participant}:{self.resource}"

    @classmethod
    def parse(cls, text: str) -> Gid | None:
        """Read the text form, or return None when *text* is not one of txrpc's: another program's prepared transaction."""
        form, *parts = text.split(":")
        if (form, len(parts)) not in (("txrpc1", 7), ("txrpc2", 6)):
            return None
        group, *decided, xid, branch, participant, resource = parts
        try:
            if form == "txrpc1":
                node, epoch, register = check_name("node", decided[0], NODE_MAX), Epoch(int(decided[1], 16)), None
            else:
                node, epoch, register = "", Epoch(0), RegisterId.parse(decided[0])
            gid = cls(
                check_name("group", group, GROUP_MAX),
                node,
                epoch,
                Xid.parse(xid),
                BranchId.parse(branch),
                ParticipantId.parse(participant),
                check_name("resource", resource, RESOURCE_MAX),
                register,
            )
        except (ValueError, InvalidName):
            return None
        return gid if str(gid) == text else None
