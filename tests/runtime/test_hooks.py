"""Hooks: before the commit, inside the transaction; after its end, outside of any."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import txrpc.aio
from tests.runtime.memory_resource import AsyncMemoryResource, MemoryResource
from txrpc import Outcome, TransactionEvent, UsageError
from txrpc._client.client_async import AsyncClient
from txrpc.testing import failpoint

pytestmark = pytest.mark.usefixtures("manager")


def nothing(event: TransactionEvent) -> None: ...


def fails(event: TransactionEvent) -> None:
    raise RuntimeError("a hook")


# ---------------------------------------------------------------------------------------------------- before the commit


def test_before_commit_runs_inside_the_transaction(notebook: MemoryResource) -> None:
    events: list[TransactionEvent] = []

    def hook(event: TransactionEvent) -> None:
        events.append(event)
        assert txrpc.current_transaction() is tx
        notebook.write("hook")

    with txrpc.transaction() as tx:
        tx.before_commit(hook)
        notebook.write("block")
    assert events == [TransactionEvent(tx.xid)]
    assert notebook.lines == ["block", "hook"]
    assert txrpc.current_transaction() is None


def test_before_commit_of_a_transaction_that_was_begun(notebook: MemoryResource) -> None:
    tx = txrpc.begin()
    tx.before_commit(lambda _: notebook.write("hook"))
    tx.commit()
    assert notebook.lines == ["hook"]


def test_what_before_commit_raises_rolls_back(notebook: MemoryResource) -> None:
    after: list[TransactionEvent] = []
    with pytest.raises(RuntimeError, match="a hook"), txrpc.transaction() as tx:
        tx.before_commit(fails)
        tx.before_commit(lambda _: notebook.write("never"))
        tx.after_completion(after.append)
        notebook.write("block")
    assert notebook.lines == []
    assert notebook.verbs[-1] == "rollback"
    (event,) = after
    assert event.outcome is Outcome.ABORTED
    assert "RuntimeError: a hook" in str(event.reason)


def test_before_commit_in_the_order_of_registration_and_of_hooks_of_hooks() -> None:
    order: list[str] = []

    def first(event: TransactionEvent) -> None:
        order.append("first")
        tx.before_commit(lambda _: order.append("of the first"))

    with txrpc.transaction() as tx:
        tx.before_commit(first)
        tx.before_commit(lambda _: order.append("second"))
    assert order == ["first", "second", "of the first"]


def test_before_commit_does_not_run_when_nothing_will_be_committed() -> None:
    ran: list[TransactionEvent] = []
    with pytest.raises(KeyError), txrpc.transaction() as tx:
        tx.before_commit(ran.append)
        raise KeyError
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction() as tx:
        tx.before_commit(ran.append)
        tx.set_rollback_only()
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction() as tx:
        tx.before_commit(lambda _: tx.set_rollback_only())
        tx.before_commit(ran.append)
    assert ran == []


def test_before_commit_may_not_begin_another_transaction_without_saying_so(notebook: MemoryResource) -> None:
    with pytest.raises(txrpc.TransactionExists), txrpc.transaction() as tx:
        tx.before_commit(lambda _: txrpc.begin())
        notebook.write("block")
    assert notebook.lines == []


# -------------------------------------------------------------------------------------------------------- after the end


def test_after_the_end_each_hears_of_the_outcome_that_it_is_for() -> None:
    heard: list[str] = []

    def register(tx: txrpc.Transaction) -> None:
        tx.after_commit(lambda event: heard.append(f"commit {event.outcome}"))
        tx.after_rollback(lambda event: heard.append(f"rollback {event.outcome} {event.reason}"))
        tx.after_completion(lambda event: heard.append(f"completion {event.outcome}"))

    with txrpc.transaction() as tx:
        register(tx)
    with pytest.raises(KeyError), txrpc.transaction() as tx:
        register(tx)
        raise KeyError("x")
    assert heard == [
        "commit Outcome.COMMITTED",
        "completion Outcome.COMMITTED",
        "rollback Outcome.ABORTED application error: KeyError: 'x'",
        "completion Outcome.ABORTED",
    ]


def test_an_outcome_that_is_not_known_is_neither(notebook: MemoryResource) -> None:
    heard: list[TransactionEvent] = []
    with (
        failpoint("participant.before_commit_one_phase", "error"),
        pytest.raises(txrpc.OutcomeUnknown),
        txrpc.transaction() as tx,
    ):
        tx.after_commit(fails)
        tx.after_rollback(fails)
        tx.after_completion(heard.append)
        notebook.write("one")
    assert [event.outcome for event in heard] == [Outcome.UNKNOWN]


def test_what_a_hook_after_the_end_raises_is_logged_and_changes_nothing(
    notebook: MemoryResource, caplog: pytest.LogCaptureFixture
) -> None:
    after: list[TransactionEvent] = []
    with txrpc.transaction() as tx:
        tx.after_completion(fails)
        tx.after_completion(after.append)
        notebook.write("one")
    assert len(after) == 1
    assert notebook.lines == ["one"]
    (record,) = (each for each in caplog.records if each.levelno == logging.ERROR)
    assert record.getMessage() == f"a hook failed after the end of transaction {tx.xid}"


def test_a_hook_after_the_end_may_begin_a_transaction(notebook: MemoryResource) -> None:
    def hook(event: TransactionEvent) -> None:
        with txrpc.transaction() as another:
            notebook.write("another")
        assert another.xid != event.xid

    with txrpc.transaction() as tx:
        tx.after_commit(hook)
        notebook.write("one")
    assert notebook.lines == ["one", "another"]


def test_a_hook_after_the_end_is_not_in_the_transaction_around_it(notebook: MemoryResource) -> None:
    inside: list[object] = []
    with txrpc.transaction(), txrpc.transaction(propagation="requires_new") as tx:
        tx.after_commit(lambda _: inside.append(txrpc.current_transaction()))
    assert inside == [None]


def test_hooks_are_registered_in_time() -> None:
    with txrpc.transaction() as tx:
        tx.after_commit(nothing)
    for register in (tx.before_commit, tx.after_commit, tx.after_rollback, tx.after_completion):
        with pytest.raises(UsageError, match="already"):
            register(nothing)


def test_a_retry_runs_the_hooks_of_its_own_attempt_only(notebook: MemoryResource) -> None:
    """A hook of an attempt that was rolled back must not run when a later one commits (Zope's `attempts` has this test)."""
    ran: list[int] = []
    attempts: list[int] = []

    @txrpc.transactional(retry=txrpc.Retry(backoff_s=0))
    def work() -> None:
        attempts.append(len(attempts))
        number = len(attempts)
        tx = txrpc.current_transaction()
        assert tx is not None
        tx.before_commit(lambda _: ran.append(number))
        tx.after_commit(lambda _: ran.append(-number))
        if number < 3:
            tx.set_rollback_only(txrpc.Reason(txrpc.AbortCode.DEADLOCK))

    work()
    assert ran == [3, -3]


# ------------------------------------------------------------------------------------------------------------- asyncio


async def test_hooks_may_be_coroutine_functions(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    heard: list[Any] = []

    async def before(event: TransactionEvent) -> None:
        await asyncio.sleep(0)
        await aio_notebook.note("hook")
        heard.append(event.outcome)

    async def after(event: TransactionEvent) -> None:
        await asyncio.sleep(0)
        assert txrpc.aio.current_transaction() is None
        heard.append(event.outcome)

    async with txrpc.aio.transaction() as tx:
        tx.before_commit(before)
        tx.after_commit(after)
        tx.after_completion(lambda event: heard.append(event.outcome))
    assert heard == [None, Outcome.COMMITTED, Outcome.COMMITTED]
    assert aio_notebook.lines == ["hook"]


async def test_what_a_coroutine_before_the_commit_raises_rolls_back(
    aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource
) -> None:
    async def before(event: TransactionEvent) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("a hook")

    with pytest.raises(RuntimeError, match="a hook"):
        async with txrpc.aio.transaction() as tx:
            tx.before_commit(before)
            await aio_notebook.note("one")
    assert tx.status is txrpc.Status.ROLLED_BACK
    assert aio_notebook.lines == []
