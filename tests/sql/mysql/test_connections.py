"""The connections on which branches of MariaDB's, and of MySQL's, have been prepared."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

import txrpc.sql
from tests.mariadb import MariaServer
from tests.sql.kit import gid, insert, rows
from tests.sql.mysql.kit import Make, connections, prepared, sessions_of_branches
from tests.waiting import eventually
from txrpc._protocol.messages import FinishResult
from txrpc.errors import ResourceUnavailable
from txrpc.sql import kept, kept_async
from txrpc.sql.mysql_finishing import branch_name

_numbers = itertools.count(1)

VERB = {True: "COMMIT", False: "ROLLBACK"}


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("commit", [True, False])
def test_a_branch_is_finished_on_the_connection_that_prepared_it(
    make: Make, mariadb: MariaServer, url: str, commit: bool
) -> None:
    """While MariaDB closes that connection, it says to another one that it has ended the branch, and does nothing."""
    bank = make()
    mariadb.execute("SET GLOBAL log_output = 'TABLE'")
    mariadb.execute("SET GLOBAL general_log = 1")
    try:
        branch, token = prepared(bank)
        assert (bank.commit_prepared if commit else bank.rollback_prepared)(branch, token) is FinishResult.DONE
    finally:
        mariadb.execute("SET GLOBAL general_log = 0")
    said = mariadb.execute(
        "SELECT thread_id, CONVERT(argument USING utf8mb4) FROM mysql.general_log WHERE command_type = 'Query' "
        f"AND argument LIKE 'XA%{token.removeprefix('xa-')}%'"
    )
    verbs = [argument.partition(" X'")[0] for _, argument in said]
    assert verbs == ["XA START", "XA END", "XA PREPARE", f"XA {VERB[commit]}"]
    assert len({session for session, _ in said}) == 1
    assert rows(bank) == (["a"] if commit else [])
    prepared(bank, "b")
    assert sessions_of_branches(url) == {said[0][0]}, "a new connection may cost more than the branch"


@pytest.mark.parametrize("commit", [True, False])
def test_rule_16_what_the_server_says_of_a_branch_counts_if_its_row_agrees(make: Make, commit: bool) -> None:
    bank, other = make(), make()
    branch, token = prepared(bank)
    finish = other.commit_prepared if commit else other.rollback_prepared

    def agree_and_do_nothing(*arguments: Any) -> tuple[str, Any]:
        """As MariaDB does while it closes the connection of the branch."""
        statement, parameters = arguments[2:4]
        return ("DO 0" if statement.startswith(f"XA {VERB[commit]}") else statement), parameters

    sa.event.listen(sa.Engine, "before_cursor_execute", agree_and_do_nothing, retval=True)
    try:
        with pytest.raises(ResourceUnavailable, match="has not ended, though the server has said so"):
            finish(branch, token)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", agree_and_do_nothing)
    assert finish(branch, token) is FinishResult.DONE
    assert rows(bank) == (["a"] if commit else [])
    assert finish(branch, token) is FinishResult.ALREADY


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("commit", [True, False])
def test_a_branch_whose_connection_has_broken_is_finished_on_another_one(
    make: Make, mariadb: MariaServer, url: str, commit: bool
) -> None:
    bank = make(poolclass=NullPool)
    branch, token = prepared(bank)
    (session,) = sessions_of_branches(url)
    mariadb.execute(f"KILL {session}")
    assert (bank.commit_prepared if commit else bank.rollback_prepared)(branch, token) is FinishResult.DONE
    assert rows(bank) == (["a"] if commit else [])


def test_a_vote_gives_the_connection_back_where_the_branch_is_not_bound_to_it(
    make: Make, mariadb: MariaServer, url: str
) -> None:
    bank = make(pool_size=1, max_overflow=0)
    branches = [prepared(bank, name) for name in "abc"]
    assert len(sessions_of_branches(url)) == {"mysql": 1, "mariadb": 3}[mariadb.product]
    assert [bank.commit_prepared(*each) for each in branches] == [FinishResult.DONE] * 3
    assert rows(bank) == list("abc")


@pytest.mark.usefixtures("bound")
def test_connections_of_prepared_branches_are_kept_up_to_a_bound(
    make: Make, mariadb: MariaServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the oldest is closed; all branches can be finished."""
    for half in (kept, kept_async):
        monkeypatch.setattr(half, "_MOST", 2)
    bank = make(poolclass=NullPool)
    branches = [prepared(bank, name) for name in "abcde"]
    eventually(lambda: connections(mariadb, url) == 2, 20)
    assert mariadb.prepared() == 5
    assert [bank.commit_prepared(*each) for each in branches] == [FinishResult.DONE] * 5
    assert rows(bank) == list("abcde")


@pytest.mark.usefixtures("bound")
def test_connections_that_are_free_again_are_used_up_to_a_bound_until_the_close(
    make: Make, mariadb: MariaServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for half in (kept, kept_async):
        monkeypatch.setattr(half, "_SPARE", 2)
    bank = make(poolclass=NullPool)
    branches = [prepared(bank, name) for name in "abcd"]
    assert len(sessions_of_branches(url)) == 4
    assert [bank.commit_prepared(*each) for each in branches] == [FinishResult.DONE] * 4
    eventually(lambda: connections(mariadb, url) == 2, 20)
    more = [prepared(bank, name) for name in "efg"]
    assert len(sessions_of_branches(url)) == 5
    assert [bank.commit_prepared(*each) for each in more] == [FinishResult.DONE] * 3
    assert rows(bank) == list("abcdefg")
    bank.close()
    eventually(lambda: connections(mariadb, url) == 0, 20)


@pytest.mark.usefixtures("bound")
def test_a_connection_that_broke_while_it_was_free_is_not_used_again(
    make: Make, mariadb: MariaServer, url: str
) -> None:
    bank = make(poolclass=NullPool)
    assert bank.commit_prepared(*prepared(bank, "a")) is FinishResult.DONE
    (session,) = sessions_of_branches(url)
    mariadb.execute(f"KILL {session}")
    assert bank.commit_prepared(*prepared(bank, "b")) is FinishResult.DONE
    assert rows(bank) == ["a", "b"]


@pytest.mark.usefixtures("bound")
def test_a_connection_that_is_free_again_has_the_isolation_level_of_a_new_one(url: str) -> None:
    engine = sa.create_engine(url)
    bank = txrpc.sql.ResourceManager("bank", engine.execution_options(isolation_level="SERIALIZABLE"))
    bank.start()
    assert bank.commit_prepared(*prepared(bank)) is FinishResult.DONE
    sessions = sessions_of_branches(url)
    with engine.connect() as connection:
        assert connection.get_isolation_level() == "REPEATABLE READ"
        assert {connection.scalar(sa.text("SELECT CONNECTION_ID()"))} == sessions
    bank.close()
    engine.dispose()


@pytest.mark.usefixtures("bound")
def test_a_vote_that_outlasts_the_close_keeps_no_connection(make: Make, mariadb: MariaServer, url: str) -> None:
    """It would have kept the branch from all others until the program ends."""
    late = make(poolclass=NullPool)
    work, branch = late.begin(False), gid()
    insert(work, "a")
    late.close()
    vote = late.prepare(work, branch)
    eventually(lambda: connections(mariadb, url) == 0, 20)
    assert make().commit_prepared(branch, vote.token) is FinishResult.DONE


@pytest.mark.usefixtures("bound")
def test_the_owner_that_was_stopped_before_it_closed_its_connection(make: Make, mariadb: MariaServer, url: str) -> None:
    """While it is open no other connection can finish the branch; then that connection is ended."""
    bank, branch, number = make(), gid(), f"{1 << 47:012x}{next(_numbers):016x}"
    name = sa.make_url(url).database
    owner = pymysql.connect(host="127.0.0.1", port=mariadb.port, user="root", database=name)
    with owner.cursor() as cursor:
        cursor.execute(f"XA START {branch_name(number)}")
        cursor.execute("INSERT INTO entry VALUES ('a', 1)")
        cursor.execute(f"INSERT INTO txrpc_branch VALUES (X'{number}', '{branch}', CONNECTION_ID())")
        cursor.execute(f"XA END {branch_name(number)}")
        cursor.execute(f"XA PREPARE {branch_name(number)}")
        assert bank.commit_prepared(branch, f"xa-{number}") is FinishResult.DONE
        assert rows(bank) == ["a"]
        with pytest.raises(pymysql.err.OperationalError):
            cursor.execute("SELECT 1")
    with contextlib.suppress(pymysql.err.Error):
        owner.close()


def test_rule_4_a_promise_stays_if_its_connection_cannot_be_kept(
    make: Make, mariadb: MariaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gives the connection back undoes what is open on it, and this is not."""
    bank, other = make(), make()
    work, branch = bank.begin(False), gid()
    insert(work, "a")

    def fail(_connection: object) -> None:
        raise RuntimeError("neither kept nor closed")

    with monkeypatch.context() as patch:
        patch.setattr(sa.Connection, "detach", fail)
        patch.setattr(sa.Connection, "invalidate", fail)
        vote = bank.prepare(work, branch)
    bank.rollback(work)
    assert mariadb.prepared() == 1
    assert other.commit_prepared(branch, vote.token) is FinishResult.DONE
    assert rows(other) == ["a"]
