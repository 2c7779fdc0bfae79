"""Rule 16 on a real PostgreSQL: what a database must prove before a branch counts as ended, and who may end it (F5, F5b, F7)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

import txrpc
import txrpc.sql
from tests.postgres import Server
from tests.runtime.conftest import NoSession
from tests.sql.kit import Make, gid, insert
from tests.waiting import eventually
from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager
from txrpc._protocol.messages import FinishResult, Outcome, Owner, Prepare, Welcome
from txrpc.ids import Epoch
from txrpc.resource import Prepared, ReadOnly
from txrpc.testing.postgres import PostgresServer


@contextmanager
def _resource(server: PostgresServer) -> Iterator[txrpc.sql.ResourceManager]:
    resource = txrpc.sql.ResourceManager("bank", sa.create_engine(server.url()))
    try:
        yield resource
    finally:
        resource.close()
        resource.engine.dispose()


def _go_back_to(server: PostgresServer, backup: Path, *, promote: bool) -> None:
    """The server comes back as it was in *backup*: restored, or as a standby that had lagged and was promoted."""
    server.kill()
    subprocess.run(["rm", "-rf", str(server._data)], check=True)
    subprocess.run(["cp", "-a", str(backup), str(server._data)], check=True)
    if promote:
        subprocess.run(["cp", "-a", f"{server._data}/PG_VERSION", f"{server._data}/standby.signal"], check=True)
    server.restart()
    if promote:
        assert server.execute("SELECT pg_promote()") == [(True,)]


@pytest.mark.parametrize("reused", [False, True], ids=["at once", "after its transaction ids were used again"])
def test_rule_16_a_standby_that_lagged_and_was_promoted_has_lost_its_promise(reused: bool, tmp_path: Path) -> None:
    """F5, F5b: COMMIT PREPARED finds nothing, and the same number belongs to another transaction by now."""
    with PostgresServer.start_new() as server, _resource(server) as resource:
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)")
        server.execute("CHECKPOINT")
        server.kill()
        subprocess.run(["cp", "-a", str(server._data), str(tmp_path / "backup")], check=True)
        server.restart()
        branch, tokens = gid(), list[str]()
        work = resource.begin(False)
        insert(work)
        prepared = resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        alone = resource.begin(False)
        insert(alone, "alone")
        assert resource.commit_one_phase(alone, tokens.append) is Outcome.COMMITTED
        _go_back_to(server, tmp_path / "backup", promote=True)
        for number in range(20 if reused else 0):
            server.execute(f"INSERT INTO entry VALUES ('other {number}', 1)")
        assert resource.commit_prepared(branch, prepared.token) is FinishResult.LOST
        assert resource.one_phase_result(tokens[0]) is Outcome.UNKNOWN
        assert server.execute("SELECT name FROM entry WHERE name IN ('a', 'alone')") == []


def test_rule_16_a_restored_database_that_has_not_come_to_its_promise_has_lost_it(tmp_path: Path) -> None:
    """F5: the same timeline, and a transaction id that this database has yet to give away."""
    with PostgresServer.start_new() as server, _resource(server) as resource:
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)")
        server.execute("CHECKPOINT")
        server.kill()
        subprocess.run(["cp", "-a", str(server._data), str(tmp_path / "backup")], check=True)
        server.restart()
        work, branch = resource.begin(False), gid()
        insert(work)
        prepared = resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        _go_back_to(server, tmp_path / "backup", promote=False)
        assert resource.commit_prepared(branch, prepared.token) is FinishResult.LOST


@pytest.mark.parametrize(
    ("token", "finish"),
    [
        ("", FinishResult.NOT_HERE),
        ("notatoken", FinishResult.NOT_HERE),
        ("7", FinishResult.NOT_HERE),
        ("-00000001", FinishResult.NOT_HERE),
        ("7-00000001-7", FinishResult.NOT_HERE),
        ("123456789-00000001", FinishResult.LOST),
        ("99999999999999999999-00000001", FinishResult.NOT_HERE),
        ("7-0000FFFF", FinishResult.LOST),
    ],
)
def test_a_token_that_proves_nothing_acknowledges_nothing(make: Make, token: str, finish: FinishResult) -> None:
    """Also one that is no number at all, or greater than any."""
    resource = make()
    assert resource.commit_prepared(gid(), token) is finish
    assert resource.one_phase_result(token) is Outcome.UNKNOWN


def test_rule_17_two_names_of_one_database_are_refused_in_one_process(make: Make) -> None:
    """G6: a transaction that updates a row through both waits for itself until its deadline."""
    one = make()
    other = txrpc.sql.ResourceManager("shelf", one.engine)
    with pytest.raises(txrpc.ConfigurationError, match=r"resources 'bank' and 'shelf' are one database \(\d+/\d+\)"):
        Client("default", [one, other]).start(NoSession())
    other.close()


def test_without_the_right_to_read_it_there_is_no_identity_rather_than_a_false_one(
    make: Make, server: Server, tenants: sa.URL, caplog: pytest.LogCaptureFixture
) -> None:
    """F15: it was the time at which the server had started, so that after a restart new replicas were refused."""
    server.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC", tenants.database or "")
    try:
        assert make(at=tenants).start().identity == ""
        assert "GRANT EXECUTE ON FUNCTION pg_control_system()" in caplog.text
    finally:
        server.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC", tenants.database or "")
    assert make(at=tenants).start().identity == make().start().identity != ""


# ---------------------------------------------------------------------------------------------------------- marker rows


def _marked(make: Make, driver: str, at: sa.URL | str) -> Any:
    resource = make(driver, at=at)
    inner = getattr(resource, "_wrapped", resource)
    inner._wants_markers = True
    resource.start()
    return resource


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "roll back"])
def test_a_marker_row_is_there_if_and_only_if_its_branch_has_committed(
    make: Make, server: Server, driver: str, url: str, commit: bool
) -> None:
    resource, branch, tokens = _marked(make, driver, url), gid(), list[str]()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    finish = resource.commit_prepared if commit else resource.rollback_prepared
    assert finish(branch, prepared.token) is FinishResult.DONE
    assert finish(branch, prepared.token) is FinishResult.ALREADY
    alone = resource.begin(False)
    insert(alone, "alone")
    assert resource.commit_one_phase(alone, tokens.append) is Outcome.COMMITTED
    reader = resource.begin(True)
    assert isinstance(resource.prepare(reader, gid()), ReadOnly)
    rows = server.execute("SELECT encode(branch, 'hex') FROM txrpc_branch", sa.make_url(url).database or "")
    wrote = {tokens[0], prepared.token} if commit else {tokens[0]}
    assert {number for (number,) in rows} == {token.rpartition("-")[2] for token in wrote}


def test_a_marker_row_proves_a_commit_in_another_history_and_its_absence_a_loss(
    make: Make, server: Server, url: str
) -> None:
    """Also where the timeline is the same, and its number is another transaction's: a data folder that was copied back."""
    resource, tokens, branch = _marked(make, "psycopg", url), list[str](), gid()
    work = resource.begin(False)
    insert(work)
    resource.commit_one_phase(work, tokens.append)
    number, timeline, marker = tokens[0].split("-")
    elsewhere, unknown = f"{number}-0000FFFF-{marker}", f"{number}-{timeline}-{'0' * 16}"
    assert resource.commit_prepared(branch, elsewhere) is FinishResult.ALREADY
    assert resource.one_phase_result(elsewhere) is Outcome.COMMITTED
    assert resource.commit_prepared(branch, unknown) is FinishResult.LOST
    assert resource.one_phase_result(unknown) is Outcome.UNKNOWN
    assert resource.commit_prepared(branch, f"{number}-0000FFFF-{'0' * 16}") is FinishResult.LOST
    database = sa.make_url(url).database or ""
    server.execute("UPDATE txrpc_branch SET at = now() - interval '6 days'", database)
    resource.in_doubt("default")
    assert server.execute("SELECT count(*) FROM txrpc_branch", database) == [(1,)]
    server.execute("UPDATE txrpc_branch SET at = now() - interval '8 days'", database)
    resource.in_doubt("default")
    assert server.execute("SELECT count(*) FROM txrpc_branch", database) == [(0,)]


@pytest.mark.parametrize("there", [False, True], ids=["missing", "not writable"])
def test_a_table_of_markers_that_cannot_be_had_is_one_sentence(
    make: Make, server: Server, tenants: sa.URL, there: bool
) -> None:
    if there:
        server.execute("CREATE TABLE txrpc_branch (branch bytea PRIMARY KEY, at timestamptz)", tenants.database or "")
    with pytest.raises(
        txrpc.ConfigurationError, match=r"needs the table txrpc_branch, and .*: let its owner CREATE TABLE"
    ):
        _marked(make, "psycopg", tenants)


@pytest.fixture
def tenants(server: Server, url: str) -> Iterator[sa.URL]:
    """A login that is nobody by itself, and takes a tenant's role for its work."""
    at = sa.make_url(url)
    for statement in (
        "CREATE ROLE app LOGIN PASSWORD 'app'",
        'CREATE ROLE "the tenant"',
        'GRANT "the tenant" TO app',
        'GRANT ALL ON TABLE entry TO "the tenant"',
    ):
        server.execute(statement, at.database or "")
    yield at.set(username="app", password="app")
    server.execute('DROP OWNED BY app, "the tenant"', at.database or "")
    server.execute('DROP ROLE app, "the tenant"')


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "roll back"])
def test_rule_20_a_branch_that_took_another_role_is_finished_under_it(
    make: Make, driver: str, tenants: sa.URL, commit: bool
) -> None:
    """F7: PREPARE makes the role of that moment the owner, and nobody else may end it."""
    resource, branch = make(driver, at=tenants), gid()
    work = resource.begin(False)
    work.connection.execute(sa.text('SET LOCAL ROLE "the tenant"'))
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    finish = resource.commit_prepared if commit else resource.rollback_prepared
    assert finish(branch, prepared.token) is FinishResult.DONE
    assert finish(branch, prepared.token) is FinishResult.ALREADY
    assert resource.in_doubt("default") == []
    # The next one on the same connection is nobody's but the login's.
    again, work = gid(), resource.begin(False)
    work.connection.execute(sa.text('SET LOCAL ROLE "the tenant"'))
    insert(work, "b")
    resource.prepare(work, again)
    assert resource.rollback_prepared(again, "") is FinishResult.DONE


def test_rule_20_a_branch_of_a_role_that_may_not_be_taken_stays_and_says_why(
    make: Make, server: Server, tenants: sa.URL, url: str
) -> None:
    owner, stranger, branch = make(), make(at=tenants), gid()
    work = owner.begin(False)
    insert(work)
    owner.prepare(work, branch)
    with pytest.raises(DBAPIError) as caught:
        stranger.commit_prepared(branch, "")
    reason = stranger.classify(caught.value)
    assert reason is not None
    assert "42501" in reason.text
    assert owner.commit_prepared(branch, "") is FinishResult.DONE


class _Deaf(NoSession):
    """Takes everything and answers nothing, as a coordinator does that cannot know the decision."""

    trouble = ""

    def send(self, node: str, *messages: object) -> None: ...


@pytest.mark.parametrize("verb", ["COMMIT", "ROLLBACK"])
def test_rule_14_what_an_operator_has_ended_is_asked_for_no_more(
    make: Make, url: str, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    """It was shown in doubt until the process was started again."""
    monkeypatch.setattr("txrpc._client.core._SWEEP_MS", 20)
    resource, session, owner = make(), _Deaf(), Owner("c1", Epoch.make(1, 1))
    with Client("default", [resource]) as client:
        client.start(session)
        client.core.on_welcome(session, Welcome(owner, 5, 60_000, 100, 100_000))
        tx = TransactionManager(client).begin(60)
        with resource.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        (ref,) = tx._part.refs
        client.core.on_message(session, owner.node, Prepare(tx.xid, ref.branch, ref.calls))
        prepared = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        database = sa.make_url(url).database or ""
        eventually(lambda: server.execute(prepared, database))
        ((name,),) = server.execute(prepared, database)
        server.execute(f"{verb} PREPARED '{name}'", database)
        now_ms = client.state.now_ms
        client.state.now_ms = lambda: now_ms() + 180_000
        eventually(lambda: not client.state.participant.rows)
        assert f"{name} is not prepared any more: it was ended by hand" in caplog.text
        tx.rollback()
