"""What begins, joins and ends a transaction in one synchronous process.  No coordinator: one resource commits locally."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.runtime.conftest import NoSession
from tests.runtime.memory_resource import MemoryResource, NotebookError
from tests.waiting import eventually
from txrpc._client.client import Client
from txrpc._client.local_transaction import LocalTransaction, Status
from txrpc._client.manager import TransactionManager
from txrpc._client.retry import Retry
from txrpc._client.scope import Propagation
from txrpc._client.transaction import RootTransaction
from txrpc._client.transactional import transaction, transactional
from txrpc._context import carry, current, set_current
from txrpc._protocol.messages import BranchRef
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    IllegalState,
    NoTransaction,
    OutcomeUnknown,
    Reason,
    TransactionAborted,
    TransactionExists,
    TransactionTimedOut,
    UsageError,
)
from txrpc.ids import BranchId, ParticipantId, Xid
from txrpc.testing import failpoint

pytestmark = pytest.mark.usefixtures("manager")


def test_a_block_commits_at_its_end(notebook: MemoryResource) -> None:
    with transaction() as tx:
        assert current() is tx
        notebook.write("one")
        assert notebook.lines == []
    assert notebook.lines == ["one"]
    assert tx.status is Status.COMMITTED
    assert current() is None


def test_one_resource_of_the_root_commits_in_one_phase_without_prepare(notebook: MemoryResource) -> None:
    with transaction():
        notebook.write("one")
        notebook.write("two")
    assert notebook.verbs == ["begin", "commit_one_phase"]


def test_an_exception_rolls_back_and_goes_on(notebook: MemoryResource) -> None:
    with pytest.raises(KeyError), transaction() as tx:
        notebook.write("one")
        raise KeyError("x")
    assert notebook.lines == []
    assert tx.status is Status.ROLLED_BACK
    assert tx.doom == Reason(AbortCode.APPLICATION_ERROR, "KeyError: 'x'")
    assert current() is None


def test_a_transaction_without_work_commits(notebook: MemoryResource) -> None:
    with transaction() as tx:
        pass
    assert tx.status is Status.COMMITTED
    assert notebook.verbs == []


def test_explicit_begin_and_commit(manager: Client, notebook: MemoryResource) -> None:
    tx = TransactionManager(manager).begin(timeout=5)
    assert current() is tx
    assert 4 < tx.time_left_s <= 5
    notebook.write("one")
    tx.commit()
    assert current() is None
    assert notebook.lines == ["one"]
    for again in (tx.commit, tx.rollback):
        with pytest.raises(IllegalState):
            again()
    with pytest.raises(IllegalState), tx.use(notebook):
        pytest.fail("a finished transaction gave work")


def test_explicit_rollback(manager: Client, notebook: MemoryResource) -> None:
    tx = TransactionManager(manager).begin()
    notebook.write("one")
    tx.rollback("changed my mind")
    assert notebook.lines == []
    assert tx.doom == Reason(AbortCode.REQUESTED, "changed my mind")
    assert tx.status is Status.ROLLED_BACK


def test_begin_inside_a_transaction_is_refused(manager: Client) -> None:
    with transaction(), pytest.raises(TransactionExists):
        TransactionManager(manager).begin()


def test_a_block_whose_transaction_was_ended_by_hand_is_done(notebook: MemoryResource) -> None:
    with transaction() as tx:
        notebook.write("one")
        assert isinstance(tx, RootTransaction)
        tx.rollback()
    assert notebook.lines == []


def test_set_rollback_only_lets_the_code_run_on_but_never_commit(notebook: MemoryResource) -> None:
    with pytest.raises(TransactionAborted, match="no good") as caught, transaction() as tx:
        notebook.write("one")
        tx.set_rollback_only("no good")
        assert tx.status is Status.ROLLBACK_ONLY
        with pytest.raises(TransactionAborted):
            notebook.write("two")
    assert caught.value.xid == tx.xid
    assert not caught.value.retryable
    assert notebook.lines == []


def test_a_failed_statement_dooms_even_if_its_error_is_swallowed(notebook: MemoryResource) -> None:
    with pytest.raises(TransactionAborted) as caught, transaction():
        notebook.write("one")
        with pytest.raises(NotebookError):
            notebook.write("bad")
    assert caught.value.reason.code is AbortCode.STATEMENT_FAILED
    assert notebook.lines == []


def test_a_mistake_of_the_program_around_an_operation_leaves_no_work_open(notebook: MemoryResource) -> None:
    """Whatever goes wrong, the resource gets its work back: it would keep its locks for as long as the process lives."""
    with failpoint("participant.before_commit_one_phase", "error"), pytest.raises(OutcomeUnknown), transaction():
        notebook.write("one")
    assert notebook.verbs == ["begin", "rollback"]
    assert notebook.lines == []


# ---------------------------------------------------------------------------------------------------- propagation

ALL = list(Propagation)


@pytest.mark.parametrize("propagation", ALL)
def test_propagation_outside_a_transaction(propagation: Propagation) -> None:
    expected = {
        Propagation.REQUIRED: "root",
        Propagation.REQUIRES_NEW: "root",
        Propagation.MANDATORY: NoTransaction,
        Propagation.SUPPORTS: None,
        Propagation.NOT_SUPPORTED: None,
        Propagation.NEVER: None,
    }[propagation]

    @transactional(propagation=propagation)
    def inside() -> object:
        return current()

    if expected is NoTransaction:
        with pytest.raises(NoTransaction):
            inside()
    else:
        assert (inside() is not None) == (expected == "root")


@pytest.mark.parametrize("propagation", ALL)
def test_propagation_inside_a_transaction(propagation: Propagation) -> None:
    expected = {
        Propagation.REQUIRED: "same",
        Propagation.REQUIRES_NEW: "other",
        Propagation.MANDATORY: "same",
        Propagation.SUPPORTS: "same",
        Propagation.NOT_SUPPORTED: None,
        Propagation.NEVER: TransactionExists,
    }[propagation]

    @transactional(propagation=propagation)
    def inside() -> object:
        handle = current()
        return handle and handle.xid

    with transaction() as tx:
        if expected is TransactionExists:
            with pytest.raises(TransactionExists):
                inside()
        else:
            assert inside() == tx.xid if expected == "same" else inside() != tx.xid
            assert (inside() is None) == (expected is None)
        assert current() is tx


def test_a_requires_new_inside_is_independent(notebook: MemoryResource) -> None:
    second = MemoryResource("second")
    with Client("default", [notebook, second]) as manager:
        manager.start(NoSession())
        with pytest.raises(KeyError), transaction(manager=TransactionManager(manager)):
            notebook.write("outer")
            with transaction(propagation="requires new", manager=TransactionManager(manager)):
                second.write("inner")
            raise KeyError
    assert (notebook.lines, second.lines) == ([], ["inner"])


def test_a_joined_block_that_fails_dooms_the_whole(notebook: MemoryResource) -> None:
    with pytest.raises(TransactionAborted) as caught, transaction():
        notebook.write("one")
        with pytest.raises(KeyError), transaction():
            raise KeyError("inner")
    assert caught.value.reason.code is AbortCode.APPLICATION_ERROR


# ----------------------------------------------------------------------------------------------------------- rules


def test_no_rollback_for_commits_and_the_exception_goes_on(notebook: MemoryResource) -> None:
    with pytest.raises(KeyError), transaction(no_rollback_for=LookupError):
        notebook.write("one")
        raise KeyError
    assert notebook.lines == ["one"]


def test_rollback_for_wins(notebook: MemoryResource) -> None:
    with pytest.raises(KeyError), transaction(no_rollback_for=LookupError, rollback_for=[KeyError]):
        notebook.write("one")
        raise KeyError
    assert notebook.lines == []


def test_what_is_no_exception_always_rolls_back(notebook: MemoryResource) -> None:
    with pytest.raises(KeyboardInterrupt), transaction(no_rollback_for=BaseException):
        notebook.write("one")
        raise KeyboardInterrupt
    assert notebook.lines == []


def test_bad_arguments_are_said_at_once() -> None:
    with pytest.raises(UsageError, match="rollback_for"):
        transaction(rollback_for="KeyError")
    with pytest.raises(UsageError, match="timeout"):
        transaction(timeout=0)
    with pytest.raises(UsageError, match="REQUIRED"):
        transaction(propagation="sometimes")
    with pytest.raises(UsageError, match=r"txrpc\.aio"):

        @transactional
        async def wrong() -> None: ...

    with pytest.raises(UsageError, match="generator"):

        @transactional(retry=3)
        def also_wrong() -> Iterator[int]:
            yield 1


# ----------------------------------------------------------------------------------------------------------- retry


def test_retry_runs_the_whole_root_again_while_it_may_help(notebook: MemoryResource) -> None:
    attempts: list[object] = []

    @transactional(retry=Retry(attempts=3, backoff_s=0))
    def work() -> str:
        handle = current()
        attempts.append(handle.xid)
        notebook.write(f"attempt {len(attempts)}")
        if len(attempts) < 3:
            handle.set_rollback_only(Reason(AbortCode.DEADLOCK))
        return "done"

    assert work() == "done"
    assert len(set(attempts)) == 3
    assert notebook.lines == ["attempt 3"]


def test_retry_gives_up_after_its_attempts() -> None:
    attempts: list[int] = []

    @transactional(retry=Retry(attempts=2, backoff_s=0))
    def work() -> None:
        attempts.append(1)
        current().set_rollback_only(Reason(AbortCode.SERIALIZATION_FAILURE))

    with pytest.raises(TransactionAborted):
        work()
    assert len(attempts) == 2


def test_retry_leaves_other_errors_and_joined_scopes_alone() -> None:
    attempts: list[int] = []

    @transactional(retry=Retry(attempts=5, backoff_s=0))
    def work(code: AbortCode) -> None:
        attempts.append(1)
        current().set_rollback_only(Reason(code))
        raise KeyError

    with pytest.raises(KeyError):
        work(AbortCode.STATEMENT_FAILED)
    assert len(attempts) == 1
    with pytest.raises(KeyError), transaction():
        work(AbortCode.DEADLOCK)
    assert len(attempts) == 2


# ------------------------------------------------------------------------------------------------------ generators


def test_a_generator_is_current_only_while_its_own_code_runs(notebook: MemoryResource) -> None:
    @transactional
    def work() -> Iterator[int]:
        assert current() is not None
        notebook.write("one")
        yield 1
        notebook.write("two")
        yield 2

    seen = []
    for number in work():
        assert current() is None
        seen.append(number)
    assert seen == [1, 2]
    assert notebook.lines == ["one", "two"]


def test_an_abandoned_generator_rolls_back(notebook: MemoryResource) -> None:
    @transactional
    def work() -> Iterator[int]:
        notebook.write("one")
        yield 1
        notebook.write("two")

    generator = work()
    assert next(generator) == 1
    generator.close()  # type: ignore[attr-defined]
    assert notebook.lines == []
    assert "rollback" in notebook.verbs


# ---------------------------------------------------------------------------------------------- threads and turns


def test_threads_of_one_transaction_take_turns(notebook: MemoryResource) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        handle = current()
        with handle.use(notebook) as page, handle.use(notebook) as again:
            assert page is again
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            page.write(str(number))
            inside.remove(number)

    with transaction():
        threads = [threading.Thread(target=carry(work), args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1
    assert sorted(notebook.lines) == list("01234")


def test_a_new_thread_has_no_transaction_unless_it_is_carried() -> None:
    seen: list[object] = []
    with transaction() as tx:
        for target in (lambda: seen.append(current()), carry(lambda: seen.append(current()))):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == [None, tx]


def test_commit_while_another_thread_uses_the_work_rolls_back(notebook: MemoryResource) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow() -> None:
        with current().use(notebook) as page:
            page.write("one")
            entered.set()
            go.wait(10)

    with pytest.raises(TransactionAborted, match="still running"), transaction():
        thread = threading.Thread(target=carry(slow))
        thread.start()
        assert entered.wait(10)
        threading.Timer(0.2, go.set).start()
    thread.join()
    assert notebook.lines == []
    eventually(lambda: notebook.verbs == ["begin", "interrupt", "rollback"])


# -------------------------------------------------------------------------------------------- rule 11: deadlines


def test_rule_11_an_open_branch_rolls_back_at_its_deadline_by_itself(manager: Client, notebook: MemoryResource) -> None:
    tx = TransactionManager(manager).begin(timeout=0.2)
    notebook.write("one")
    assert notebook.rolled_back.wait(5)
    assert notebook.verbs == ["begin", "rollback"]
    with pytest.raises(TransactionTimedOut, match=r"the transaction's deadline has passed; its timeout was 0\.\d+ s$"):
        notebook.write("two")
    with pytest.raises(TransactionTimedOut):
        tx.commit()
    assert notebook.lines == []


def test_rule_11_the_clock_goes_on_when_the_system_has_no_thread_left(
    manager: Client, notebook: MemoryResource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """F12: it ended with the exception, and no deadline was kept in that process any more."""
    start, refused = threading.Thread.start, list[threading.Thread]()

    def no_thread(thread: threading.Thread) -> None:
        if threading.current_thread().name == "txrpc-clock" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for timeout in (0.1, 0.3):
        TransactionManager(manager).begin(timeout=timeout)
        notebook.write("one")
        set_current(None)  # its code is gone; only the deadline ends it
    eventually(lambda: notebook.verbs.count("rollback") == 2)
    assert len(refused) == 1
    assert "no thread for a worker" in caplog.text


def test_rule_11_a_mistake_in_the_clock_does_not_end_it(
    manager: Client, notebook: MemoryResource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    woke, failed = manager.core.woke, list[int]()

    def mistaken() -> list[str]:
        if not failed:
            failed.append(1)
            raise KeyError("a mistake")
        return woke()

    monkeypatch.setattr(manager.core, "woke", mistaken)
    TransactionManager(manager).begin(timeout=0.1)
    notebook.write("one")
    set_current(None)
    eventually(lambda: notebook.verbs.count("rollback") == 1)
    assert "deadline or sweep failed" in caplog.text


def test_rule_11_work_in_use_at_the_deadline_is_interrupted(notebook: MemoryResource) -> None:
    with pytest.raises(TransactionTimedOut), transaction(timeout=0.2), current().use(notebook) as page:
        until = time.monotonic() + 5
        while not page.interrupted and time.monotonic() < until:
            time.sleep(0.01)
        page.write("too late")
    assert notebook.verbs == ["begin", "interrupt", "rollback"]


# ----------------------------------------------------------------------------------------------------- alone, forked


def test_without_a_coordinator_a_second_resource_is_refused(notebook: MemoryResource, manager: Client) -> None:
    second = manager.state.resources["second"]
    with pytest.raises(CoordinatorUnavailable, match="one resource"), transaction():
        notebook.write("one")
        second.write("two")
    assert notebook.lines == []


def test_without_a_coordinator_a_call_cannot_leave() -> None:
    with pytest.raises(CoordinatorUnavailable, match="coordinator running"), transaction() as tx:
        tx.outgoing()


def test_a_resource_of_somebody_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="stranger"), transaction():
        MemoryResource("stranger").write("x")


def test_a_resource_that_cannot_begin_leaves_nothing_behind(notebook: MemoryResource, manager: Client) -> None:
    with transaction():
        notebook.fail_begin = ConnectionError("down")
        with pytest.raises(ConnectionError):
            notebook.write("one")
        notebook.fail_begin = None
        notebook.write("two")
    assert notebook.lines == ["two"]


def test_a_forked_child_gets_a_clear_error() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            transaction().__enter__()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert text.startswith("ForkedError")
    assert "txrpc.connect()" in text


def test_nothing_is_kept_of_the_work_of_branches_that_have_ended(manager: Client, notebook: MemoryResource) -> None:
    with transaction():
        notebook.write("kept")
    with suppress(ValueError), transaction():
        notebook.write("not kept")
        raise ValueError
    assert manager.state.branches == {}


# ---------------------------------------------------------------------------------------------------------- replicas


def test_m2_a_root_warns_of_one_resource_in_two_processes_once(caplog: pytest.LogCaptureFixture) -> None:
    def part() -> LocalTransaction:
        return LocalTransaction(Xid(bytes(16)), None, "default", 10, False, 0)

    def ref(branch: int, participant: int, resource: str) -> BranchRef:
        return BranchRef(BranchId(bytes([branch] * 8)), resource, ParticipantId(bytes([participant] * 8)), 1)

    same, another, again = part(), part(), part()
    same.used(ref(1, 1, "stock of M2"))
    same.used(ref(1, 1, "stock of M2"))
    same.used(ref(2, 2, "another"))
    assert not caplog.records
    for each in (another, again):
        each.used(ref(1, 1, "stock of M2"))
        each.used(ref(2, 2, "stock of M2"))
    (record,) = caplog.records
    assert "uses resource 'stock of M2' in two processes" in record.getMessage()
