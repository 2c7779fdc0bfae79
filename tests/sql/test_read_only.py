"""``read_only=True`` holds also where a block joins a transaction that may write (B8)."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

import txrpc
import txrpc.sql
from tests.sql.kit import Row, rows


def test_b8_a_read_only_block_inside_a_writing_transaction_cannot_write(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(txrpc.TransactionAborted, match="read-only transaction"), txrpc.transaction():
        with bank.session() as session:
            session.add(Row(name="outer", value=1))
        with (
            pytest.raises(sa.exc.DBAPIError, match="read-only transaction"),
            txrpc.transaction(read_only=True),
            bank.session() as session,
        ):
            session.add(Row(name="inner", value=2))
    assert rows(bank) == []


def test_b8_it_reads_what_was_written_and_writing_goes_on_behind_it(bank: txrpc.sql.ResourceManager) -> None:
    @txrpc.transactional(read_only=True)
    def count() -> int:
        with bank.session() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Row)) or 0

    with txrpc.transaction():
        assert count() == 0
        with bank.session() as session:
            session.add(Row(name="a", value=1))
        assert count() == 1
        with bank.session() as session:
            session.add(Row(name="b", value=1))
            session.flush()
            assert count() == 2  # another block in the middle of this one
            session.add(Row(name="c", value=1))
        assert count() == 3
    assert rows(bank) == ["a", "b", "c"]


def test_b8_blocks_within_a_read_only_block_may_not_write_either(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction() as tx, txrpc.transaction(read_only=True):
        assert tx.read_only
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"), txrpc.transaction():
            with bank.connection() as connection:
                connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
    assert rows(bank) == []


def test_b8_a_block_that_begins_a_transaction_of_its_own_may_write(bank: txrpc.sql.ResourceManager) -> None:
    with txrpc.transaction() as tx:
        assert not tx.read_only
        with txrpc.transaction(read_only=True), txrpc.transaction(propagation="requires_new"):
            with bank.connection() as connection:
                connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        assert not tx.read_only
    assert rows(bank) == ["a"]


def test_b8_an_exception_in_a_read_only_block_leaves_the_branch_usable(bank: txrpc.sql.ResourceManager) -> None:
    with txrpc.transaction():
        with pytest.raises(KeyError), txrpc.transaction(read_only=True, no_rollback_for=KeyError):
            with bank.session() as session:
                session.scalar(sa.text("SELECT 1"))
                raise KeyError
        with bank.session() as session:
            session.add(Row(name="a", value=1))
    assert rows(bank) == ["a"]


def test_b8_a_branch_that_only_read_in_such_blocks_is_still_read_only(bank: txrpc.sql.ResourceManager) -> None:
    """The savepoint writes nothing: no transaction id is assigned, and nothing needs to be prepared."""
    with txrpc.transaction(), txrpc.transaction(read_only=True), bank.connection() as connection:
        assert connection.scalar(sa.text("SELECT pg_current_xact_id_if_assigned()")) is None
