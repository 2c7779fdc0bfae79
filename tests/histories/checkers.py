"""What a history of transactions says about atomicity and isolation.  Pure: a history goes in, what is wrong with it comes out.

Each transaction appends numbers that are used once only to lists in several databases, and reads lists.  The order of a list is
the order of the writes, so who must come before whom can be read off the history itself (Kingsbury and Alvaro, "Elle", 2020;
the phenomena are those of Adya, Liskov and O'Neil, 2000):

    G0    writes of two transactions interleave      G1a   a read of what was rolled back
    G1b   a read of half a transaction's appends     G1c   a circle of "wrote before" and "read from"
    lost  an append of a committed transaction that is in no list

A circle counts within one database only.  Across databases nothing is promised but atomicity: they have no common snapshot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

__all__ = ["Append", "Ended", "History", "Read", "Transaction", "mistakes"]

Key = tuple[str, str]
"""A database and a list in it."""


class Ended(Enum):
    """What the client was told."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Append:
    """*value* was put at the end of a list."""

    key: Key
    value: int


@dataclass(frozen=True, slots=True)
class Read:
    """A list was seen to be this."""

    key: Key
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one did, in this order, and how its client was told that it ended."""

    name: str
    did: tuple[Append | Read, ...]
    ended: Ended


@dataclass(slots=True)
class History:
    """All transactions, and what the lists hold in the end."""

    transactions: list[Transaction] = field(default_factory=list)
    final: dict[Key, tuple[int, ...]] = field(default_factory=dict)


def mistakes(history: History) -> list[str]:
    """Everything that is wrong, in words; empty if nothing is."""
    writers = {
        did.value: transaction
        for transaction in history.transactions
        for did in transaction.did
        if isinstance(did, Append)
    }
    return [
        *_atomicity(history),
        *_reads(history, writers),
        *_orders(history),
        *_circles(history, writers),
    ]


def _appends(transaction: Transaction) -> list[Append]:
    return [did for did in transaction.did if isinstance(did, Append)]


def _atomicity(history: History) -> Iterable[str]:
    """All appends of a transaction are there in the end, or none; and it is what the client was told."""
    for transaction in history.transactions:
        there = [did.value in history.final.get(did.key, ()) for did in _appends(transaction)]
        if any(there) and not all(there):
            yield f"half: of {transaction.name} only a part is there"
        elif there and transaction.ended is Ended.COMMITTED and not any(there):
            yield f"lost: {transaction.name} was told that it committed, and is not there"
        elif any(there) and transaction.ended is Ended.ABORTED:
            yield f"G1a: {transaction.name} was told that it was rolled back, and is there"


def _reads(history: History, writers: dict[int, Transaction]) -> Iterable[str]:
    for reader in history.transactions:
        own: dict[Key, list[int]] = defaultdict(list)
        for did in reader.did:
            if isinstance(did, Append):
                own[did.key].append(did.value)
            else:
                yield from _read(reader, did, own[did.key], history, writers)


def _read(
    reader: Transaction, read: Read, own: list[int], history: History, writers: dict[int, Transaction]
) -> Iterable[str]:
    where = f"{reader.name} read {read.values} in {read.key}"
    if own and read.values[-len(own) :] != tuple(own):
        yield f"G0: {where} after it had appended {own}"
    for value in read.values:
        writer = writers.get(value)
        if writer is None:
            yield f"G1a: {where}: nobody wrote {value}"
        elif writer is not reader and value not in history.final.get(read.key, ()):
            yield f"G1a: {where}: {value} of {writer.name} was rolled back"
    for writer in {writers[value].name: writers[value] for value in read.values if value in writers}.values():
        wrote = [did.value for did in _appends(writer) if did.key == read.key]
        if writer is not reader and not set(wrote) <= set(read.values):
            yield f"G1b: {where}: only a part of {writer.name}'s {wrote}"


def _orders(history: History) -> Iterable[str]:
    """A list only grows: what anybody read is a beginning of what it became, but for the reader's own appends."""
    for reader in history.transactions:
        own = {did.value for did in _appends(reader)}
        for did in reader.did:
            if isinstance(did, Read):
                others = tuple(value for value in did.values if value not in own)
                if others != history.final.get(did.key, ())[: len(others)]:
                    yield f"order: {reader.name} read {did.values} in {did.key}, which became {history.final.get(did.key, ())}"
    for key, values in history.final.items():
        if len(set(values)) != len(values):
            yield f"twice: something is twice in {key}: {values}"


def _circles(history: History, writers: dict[int, Transaction]) -> Iterable[str]:
    for database in sorted({key[0] for key in history.final}):
        edges: dict[str, set[str]] = defaultdict(set)
        for key, values in history.final.items():
            if key[0] == database:
                names = [writers[value].name for value in values if value in writers]
                for one, other in pairwise(names):
                    edges[one].add(other)
        for reader in history.transactions:
            for did in reader.did:
                if isinstance(did, Read) and did.key[0] == database:
                    for value in did.values[-1:]:
                        if value in writers:
                            edges[writers[value].name].add(reader.name)
        for circle in _circle(edges):
            yield f"G1c: in {database}: {' before '.join([*circle, circle[0]])}"


def _circle(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle, if there is any: what is left when those that nobody comes before are taken away, again and again."""
    links = {(one, other) for one, others in edges.items() for other in others if one != other}
    while links:
        after = {other for _, other in links}
        rest = {link for link in links if link[0] in after}
        if rest == links:
            break
        links = rest
    if not links:
        return []
    before = {other: one for one, other in links}
    at = next(iter(sorted(before)))
    way: list[str] = []
    while at not in way:
        way.append(at)
        at = before[at]
    return [way[way.index(at) :][::-1]]
