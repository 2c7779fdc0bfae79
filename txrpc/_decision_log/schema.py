"""The tables of a SQL decision log, and their versions.

    txrpc_schema     one row: the version of these tables
    txrpc_node       one row a coordinator node: its present epoch, which is the fence, who holds it, and its position
    txrpc_heartbeat  one row a node that takes part in takeovers: what shows that its process lives
    txrpc_epoch      every epoch that a node has had (its lineage), and the position at which it was opened
    txrpc_decision   one row a commit decision; `done_ms` is null until every branch has acknowledged
    txrpc_incident   one row a branch that did not end as decided; `closed_ms` is null until an operator closes it
    txrpc_resource   one row a resource name: which database it means

`branches` holds the prepared branches as bytes: a version byte (1), then for each branch 8 bytes branch id, 8 bytes participant,
and resource and token as one length byte and that many ASCII bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table, insert, select
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection

from txrpc._protocol.records import PreparedBranch
from txrpc.errors import ConfigurationError
from txrpc.ids import BranchId, ParticipantId

__all__ = [
    "VERSION",
    "decisions",
    "epochs",
    "heartbeats",
    "incidents",
    "nodes",
    "pack",
    "prepare_schema",
    "resources",
    "unpack",
]

VERSION: Final = 3

metadata = MetaData()


def _name(characters: int) -> String:
    """The type of a name: MySQL would compare names without their case."""
    return String(characters).with_variant(
        mysql.VARCHAR(characters, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _bytes(length: int) -> LargeBinary:
    """The type of so many bytes: MySQL's BLOB can be no key."""
    return LargeBinary(length).with_variant(mysql.BINARY(length), "mysql", "mariadb")


versions = Table(
    "txrpc_schema",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
)
nodes = Table(
    "txrpc_node",
    metadata,
    Column("node", _name(24), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("forgotten_ms", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False, server_default="0"),
    # The node whose process runs it; empty: its own.
    Column("holder", _name(24), nullable=False, server_default=""),
)
heartbeats = Table(
    "txrpc_heartbeat",
    metadata,
    Column("node", _name(24), primary_key=True),
    Column("group_name", _name(24), nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
)
epochs = Table(
    "txrpc_epoch",
    metadata,
    Column("node", _name(24), primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("opened_ms", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False, server_default="0"),
)
decisions = Table(
    "txrpc_decision",
    metadata,
    Column("node", _name(24), primary_key=True),
    Column("xid", _bytes(16), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("decided_ms", BigInteger, nullable=False),
    Column("branches", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
    Column("done_ms", BigInteger),
)
Index("txrpc_decision_done", decisions.c.node, decisions.c.done_ms)

incidents = Table(
    "txrpc_incident",
    metadata,
    Column("node", _name(24), primary_key=True),
    Column("xid", _bytes(16), primary_key=True),
    Column("branch", _bytes(8), primary_key=True),
    Column("resource", _name(40), nullable=False),
    Column("finish", Integer, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("closed_ms", BigInteger),
)
resources = Table(
    "txrpc_resource",
    metadata,
    Column("name", _name(40), primary_key=True),
    Column("identity", String(500), nullable=False),
)


def _add_positions(connection: Connection) -> None:
    for table in (nodes, epochs):
        connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN position BIGINT NOT NULL DEFAULT 0")


def _add_holder(connection: Connection) -> None:
    connection.exec_driver_sql(f"ALTER TABLE {nodes.name} ADD COLUMN holder VARCHAR(24) NOT NULL DEFAULT ''")


_UPGRADES: Final[dict[int, Callable[[Connection], None]]] = {1: _add_positions, 2: _add_holder}
"""For each older version how to make the next one of it."""


def prepare_schema(connection: Connection, location: str) -> None:
    """Create the tables or bring them up to date, inside the caller's transaction.

    Raises `ConfigurationError` if they are of a later version than this program knows.
    """
    metadata.create_all(connection)
    found = connection.scalar(select(versions.c.version).where(versions.c.id == 1))
    if found is None:
        connection.execute(insert(versions).values(id=1, version=VERSION))
        return
    if found > VERSION:
        raise ConfigurationError(
            f"the decision log {location} has schema version {found}, and this txrpc knows versions up to {VERSION}: "
            "upgrade this coordinator"
        )
    for version in range(found, VERSION):
        _UPGRADES[version](connection)
    if found < VERSION:
        connection.execute(versions.update().values(version=VERSION))


def pack(branches: Sequence[PreparedBranch]) -> bytes:
    """The branches of a decision as bytes."""
    parts = [b"\x01"]
    for branch in branches:
        resource, token = branch.resource.encode("ascii"), branch.token.encode("ascii")
        parts += [branch.branch, branch.participant, bytes([len(resource)]), resource, bytes([len(token)]), token]
    return b"".join(parts)


def unpack(data: bytes) -> tuple[PreparedBranch, ...]:
    """The reverse of `pack`; raises `ConfigurationError` for bytes that no version of txrpc has written."""
    if data[:1] != b"\x01":
        raise ConfigurationError(f"the decision log holds a record of an unknown format ({data[:1]!r})")
    branches, at = [], 1
    try:
        while at < len(data):
            branch, participant = BranchId(data[at : at + 8]), ParticipantId(data[at + 8 : at + 16])
            resource, at = _text(data, at + 16)
            token, at = _text(data, at)
            branches.append(PreparedBranch(branch, participant, resource, token))
    except (IndexError, ValueError) as error:
        raise ConfigurationError(f"the decision log holds a damaged record ({data.hex()}): {error}") from None
    return tuple(branches)


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    if end > len(data):
        raise ValueError("it ends early")
    return data[at + 1 : end].decode("ascii"), end
