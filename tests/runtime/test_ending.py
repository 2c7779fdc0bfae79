"""Ending a transaction while its session has gone for good: an answer in time, and no busy loop."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.runtime.conftest import NoSession
from tests.runtime.memory_resource import MemoryResource, NotebookError, Page
from tests.waiting import eventually
from txrpc._client import effects, requests
from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager
from txrpc._client.transactional import transaction
from txrpc._protocol.messages import (
    Commit,
    CommitRequest,
    FinishResult,
    Hello,
    Inquiry,
    Outcome,
    Owner,
    Prepare,
    Takeover,
    Welcome,
)
from txrpc._protocol.participant.branch import BranchState
from txrpc.errors import (
    AbortCode,
    CoordinatorUnavailable,
    LimitExceeded,
    OutcomeUnknown,
    TransactionAborted,
)
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid

WELCOME = Welcome(Owner("c1", Epoch.make(1, 1)), 5, 60_000, 100, 100_000)


class Session(NoSession):
    """A session that was there when the transaction began; what it does after that is the test's."""

    def __init__(self) -> None:
        self.send_error: Exception | None = None
        self.sent: list[Any] = []

    def send(self, node: str, *messages: Any) -> None:
        if self.send_error is not None and isinstance(messages[0], CommitRequest):
            raise self.send_error
        self.sent += messages


def two_branches(session: Session, timeout: float = 1) -> tuple[Client, Any]:
    first, second = MemoryResource("first"), MemoryResource("second")
    manager = Client("default", [first, second])
    manager.state.commit_timeout_ms = 300
    manager.start(session)
    manager.core.on_welcome(session, WELCOME)
    scope = transaction(timeout, manager=TransactionManager(manager))
    scope.__enter__()
    first.write("one")
    second.write("two")
    return manager, scope


def test_a_session_that_is_closed_for_good_is_not_asked_in_a_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    manager, scope = two_branches(session)
    session.over = True
    manager.core.on_lost(session, "gone")
    waits: list[str] = []

    def reconnect(node: str, timeout_s: float) -> Owner:
        waits.append(node)
        return Client.reconnect(manager, node, timeout_s)

    monkeypatch.setattr(manager, "reconnect", reconnect)
    with pytest.raises(TransactionAborted) as caught:
        scope.__exit__(None, None, None)
    assert caught.value.reason.code is AbortCode.COORDINATOR_UNAVAILABLE
    assert 0 < len(waits) <= 25
    manager.close()


def test_a_refusal_for_good_aborts_at_once_because_nothing_was_sent() -> None:
    session = Session()
    manager, scope = two_branches(session, timeout=30)
    session.over = session.refused = True
    session.trouble = "another group"
    manager.core.on_lost(session, "refused")
    with pytest.raises(TransactionAborted, match="another group"):
        scope.__exit__(None, None, None)
    manager.close()


def test_a_commit_request_that_the_session_does_not_take_aborts() -> None:
    session = Session()
    session.send_error = LimitExceeded("the message has 99 bytes more than the coordinator takes")
    manager, scope = two_branches(session, timeout=30)
    with pytest.raises(TransactionAborted, match="99 bytes") as caught:
        scope.__exit__(None, None, None)
    assert caught.value.reason.code is AbortCode.LIMIT_EXCEEDED
    manager.close()


def test_a_request_that_was_sent_and_never_answered_is_unknown() -> None:
    session = Session()
    manager, scope = two_branches(session)
    with pytest.raises(OutcomeUnknown, match="has not answered") as caught:
        scope.__exit__(None, None, None)
    assert str(caught.value).endswith("; ask for it with TransactionManager.outcome(xid)")
    assert [type(message) for message in session.sent].count(CommitRequest) == 1
    manager.core.on_lost(session, "gone")
    with pytest.raises(CoordinatorUnavailable):
        TransactionManager(manager).outcome(scope.handle.xid, timeout=0.2)
    manager.close()


def test_closing_while_work_is_due_leaves_no_thread_with_an_error() -> None:
    """The clock's thread could submit to a pool that was shut down already."""
    for _ in range(20):
        manager = Client("default", [MemoryResource("first")])
        session = Session()
        manager.start(session)
        manager.core.on_welcome(session, WELCOME)
        manager.close()
        manager._clock_thread.join(5)
        assert not manager._clock_thread.is_alive()
        manager._submit(manager._workers["first"], lambda: None)


def test_rule_15_a_coordinator_gives_no_orders_about_a_branch_of_another_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "txrpc.client")
    session = Session()
    manager, scope = two_branches(session)
    (ref, _) = scope.handle._part.refs
    session.sent.clear()
    other = Prepare(scope.handle.xid, ref.branch, ref.calls)
    manager.core.on_message(session, "c2", other)
    assert "coordinator c2 is not listened to here: Prepare" in caplog.text
    taken = dataclasses.replace(WELCOME, owner=Owner("c2", Epoch.make(1, 1)))
    manager.core.on_message(session, "c2", Takeover())
    manager.core.on_message(session, "c2", taken)
    manager.core.on_message(session, "c2", other)
    assert "coordinator c2 gives orders about a branch of another one's" in caplog.text
    assert not [message for message in session.sent if not isinstance(message, Inquiry | Hello)]
    manager.core.on_lost(session, "gone")
    with pytest.raises(TransactionAborted):
        scope.__exit__(None, None, None)
    manager.close()


class Away(MemoryResource):
    """Its connection breaks under every COMMIT; how that ended is not known before a test says so."""

    told: Outcome | None = None

    def commit_one_phase(self, work: Page, committing: Callable[[str], None]) -> Outcome | None:  # type: ignore[override]
        committing("1")
        return None

    def how_it_ended(self, work: Page) -> Outcome | None:
        self.verbs.append("how_it_ended")
        return self.told


def test_rule_20_commits_whose_database_is_away_keep_nothing_else_waiting() -> None:
    """Each of them had a worker asleep, so that four of them kept all that was to be finished for half a minute."""
    away = Away()
    manager = Client("default", [away])
    manager.state.commit_timeout_ms = 50
    manager.start(NoSession())
    xids = []
    for _ in range(8):
        with pytest.raises(OutcomeUnknown), transaction(0.05, manager=TransactionManager(manager)) as tx:
            away.write("one")
            xids.append(tx.xid)
    other = transaction(30, manager=TransactionManager(manager))
    with pytest.raises(ZeroDivisionError), other:
        away.write("two")
        raise ZeroDivisionError
    assert away.rolled_back.wait(30)
    assert away.verbs.count("how_it_ended") >= 8
    away.told = Outcome.COMMITTED
    assert [TransactionManager(manager).outcome(xid, timeout=30) for xid in xids] == [Outcome.COMMITTED] * 8
    manager.close()


def test_rule_13_an_end_that_comes_while_it_is_looked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result was looked at first, and then whether the commit still ran, which it did no more."""
    away = Away()
    manager = Client("default", [away])
    manager.state.commit_timeout_ms = 50
    manager.start(NoSession())
    with pytest.raises(OutcomeUnknown), transaction(0.2, manager=TransactionManager(manager)) as tx:
        away.write("one")
    commit = manager.state.local_commits[tx.xid]

    def ends_just_then(*_: object) -> bool:
        commit.result = Outcome.COMMITTED
        return False

    monkeypatch.setattr(requests, "runs", ends_just_then)
    assert TransactionManager(manager).outcome(tx.xid) is Outcome.COMMITTED
    monkeypatch.undo()
    away.told = Outcome.COMMITTED
    manager.close()


class Lingering(MemoryResource):
    """The server keeps its end of every connection, with the branch's locks, until a test says that it has gone."""

    gone = False
    fails = False

    def terminate(self, work: Page) -> bool:
        self.verbs.append("terminate")
        if self.fails:
            raise NotebookError("terminate")
        return self.gone


@pytest.mark.parametrize("fails", [False, True])
def test_rule_20_what_broken_connections_leave_behind_keeps_nothing_else_waiting(fails: bool) -> None:
    """Each of them had a worker asleep for up to two seconds, so that four kept all that was to be finished waiting."""
    lingering = Lingering()
    lingering.fails = fails
    manager = Client("default", [lingering])
    manager.state.commit_timeout_ms = 50
    manager.start(NoSession())
    xids = []
    for _ in range(8):
        with pytest.raises(ZeroDivisionError), transaction(manager=TransactionManager(manager)) as tx:
            lingering.write("one")
            xids.append(tx.xid)
            raise ZeroDivisionError
    eventually(lambda: lingering.verbs.count("rollback") == 8)
    rows = manager.state.participant.rows
    assert {row.xid for row in rows.values() if row.state is BranchState.ROLLING_BACK} == set(xids)
    before = lingering.verbs.count("terminate")
    eventually(lambda: lingering.verbs.count("terminate") > before)
    lingering.gone, lingering.fails = True, False
    eventually(lambda: not manager.state.branches)
    manager.close()


def test_what_is_never_gone_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "_ASK_AFTER_S", (0.0, 0.01, 0.01))
    lingering = Lingering()
    manager = Client("default", [lingering])
    manager.state.commit_timeout_ms = 30_000
    manager.start(NoSession())
    with pytest.raises(ZeroDivisionError), transaction(manager=TransactionManager(manager)):
        lingering.write("one")
        raise ZeroDivisionError
    assert lingering.verbs.count("terminate") == 4
    assert not manager.state.branches
    manager.close()


def test_a_resource_that_neither_tells_nor_can_be_asked_later_leaves_the_outcome_unknown() -> None:
    class Mute(MemoryResource):
        def commit_one_phase(self, work: Page, committing: Callable[[str], None]) -> Any:
            return None

    mute = Mute()
    manager = Client("default", [mute])
    manager.start(NoSession())
    with pytest.raises(OutcomeUnknown, match="cannot tell"), transaction(manager=TransactionManager(manager)):
        mute.write("one")
    manager.close()


class Hanging(MemoryResource):
    """Each COMMIT PREPARED waits until a test says otherwise."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.go = threading.Event()

    def commit_prepared(self, gid: Gid, token: str) -> FinishResult:
        assert self.go.wait(60)
        return super().commit_prepared(gid, token)


def test_what_hangs_in_one_database_keeps_nothing_of_another_one_waiting() -> None:
    """G5: twenty commits that hung in one kept every branch of the other prepared."""
    hanging, other = Hanging("hanging"), MemoryResource("other")
    session, owner = Session(), WELCOME.owner
    manager = Client("default", [hanging, other])
    manager.start(session)
    manager.core.on_welcome(session, WELCOME)

    def order(resource: MemoryResource, number: int) -> Gid:
        ids = Xid.make(1, number.to_bytes(10, "big")), BranchId(number.to_bytes(8, "big"))
        gid = Gid("default", owner.node, owner.epoch, *ids, ParticipantId(bytes(8)), resource.name)
        page = Page(read_only=False)
        page.write("a line")
        resource.prepared[gid] = page
        manager.core.on_message(session, owner.node, Commit(gid, "1"))
        return gid

    gids = [order(hanging, number) for number in range(20)]
    order(other, 20)
    eventually(lambda: other.lines == ["a line"])
    assert hanging.prepared.keys() == set(gids)
    hanging.go.set()
    eventually(lambda: not hanging.prepared)
    manager.close()
