"""What begins, joins and ends a transaction in one asyncio process; what differs from the synchronous side most of all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.runtime.memory_resource import AsyncMemoryResource, NotebookError
from txrpc._client.client_async import AsyncClient
from txrpc._client.local_transaction import Status
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc._client.retry import Retry
from txrpc._client.scope import Propagation
from txrpc._client.transactional_async import transaction, transactional
from txrpc._context import current
from txrpc.errors import (
    AbortCode,
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
from txrpc.testing import failpoint


async def test_a_mistake_of_the_program_around_an_operation_leaves_no_work_open(
    aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource
) -> None:
    with failpoint("participant.before_commit_one_phase", "error"), pytest.raises(OutcomeUnknown):
        async with transaction():
            await aio_notebook.note("one")
    assert aio_notebook.verbs == ["begin", "rollback"]


async def test_a_block_commits_at_its_end(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    async with transaction() as tx:
        assert current() is tx
        await aio_notebook.note("one")
        assert aio_notebook.lines == []
    assert aio_notebook.lines == ["one"]
    assert tx.status is Status.COMMITTED
    assert current() is None
    assert aio_notebook.verbs == ["begin", "commit_one_phase"]


async def test_an_exception_rolls_back_and_goes_on(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    with pytest.raises(KeyError):
        async with transaction() as tx:
            await aio_notebook.note("one")
            raise KeyError("x")
    assert aio_notebook.lines == []
    assert tx.status is Status.ROLLED_BACK
    assert aio_notebook.verbs == ["begin", "rollback"]


async def test_explicit_begin_commit_and_rollback(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    tx = AsyncTransactionManager(aio_manager).begin(timeout=5)
    with pytest.raises(TransactionExists):
        AsyncTransactionManager(aio_manager).begin()
    await aio_notebook.note("one")
    await tx.commit()
    assert current() is None
    with pytest.raises(IllegalState):
        await tx.rollback()
    other = AsyncTransactionManager(aio_manager).begin()
    await aio_notebook.note("two")
    await other.rollback("changed my mind")
    assert aio_notebook.lines == ["one"]


async def test_cancelling_a_task_rolls_its_transaction_back(
    aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource
) -> None:
    wrote = asyncio.Event()

    async def work() -> None:
        async with transaction():
            await aio_notebook.note("one")
            wrote.set()
            await asyncio.sleep(30)

    task = asyncio.create_task(work())
    await wrote.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert aio_notebook.verbs == ["begin", "rollback"]
    assert aio_notebook.lines == []


async def test_tasks_of_one_transaction_take_turns(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    inside: list[int] = []
    most: list[int] = []

    async def work(number: int) -> None:
        handle = current()
        async with handle.use(aio_notebook) as page, handle.use(aio_notebook) as again:
            assert page is again
            inside.append(number)
            most.append(len(inside))
            await asyncio.sleep(0.01)
            page.write(str(number))
            inside.remove(number)

    async with transaction():
        await asyncio.gather(*(work(i) for i in range(5)))
    assert max(most) == 1
    assert sorted(aio_notebook.lines) == list("01234")


async def test_a_failed_statement_dooms_even_if_its_error_is_swallowed(
    aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource
) -> None:
    with pytest.raises(TransactionAborted) as caught:
        async with transaction():
            await aio_notebook.note("one")
            with pytest.raises(NotebookError):
                await aio_notebook.note("bad")
    assert caught.value.reason.code is AbortCode.STATEMENT_FAILED


@pytest.mark.parametrize("propagation", list(Propagation))
async def test_propagation(aio_manager: AsyncClient, propagation: Propagation) -> None:
    @transactional(propagation=propagation)
    async def inside() -> object:
        handle = current()
        return handle and handle.xid

    if propagation is Propagation.MANDATORY:
        with pytest.raises(NoTransaction):
            await inside()
    else:
        begins = propagation in (Propagation.REQUIRED, Propagation.REQUIRES_NEW)
        assert (await inside() is not None) == begins
    async with transaction() as tx:
        if propagation is Propagation.NEVER:
            with pytest.raises(TransactionExists):
                await inside()
        else:
            joins = propagation in (Propagation.REQUIRED, Propagation.MANDATORY, Propagation.SUPPORTS)
            assert (await inside() == tx.xid) == joins


async def test_retry_runs_the_whole_root_again(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    attempts: list[object] = []

    @transactional(retry=Retry(attempts=3, backoff_s=0))
    async def work() -> None:
        handle = current()
        attempts.append(handle.xid)
        await aio_notebook.note(f"attempt {len(attempts)}")
        if len(attempts) < 3:
            handle.set_rollback_only(Reason(AbortCode.DEADLOCK))

    await work()
    assert len(set(attempts)) == 3
    assert aio_notebook.lines == ["attempt 3"]


async def test_generators_are_current_only_while_their_own_code_runs(
    aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource
) -> None:
    @transactional
    async def work() -> AsyncIterator[int]:
        await aio_notebook.note("one")
        yield 1
        assert current() is not None
        await aio_notebook.note("two")
        yield 2

    seen = []
    async for number in work():
        assert current() is None
        seen.append(number)
    assert seen == [1, 2]
    assert aio_notebook.lines == ["one", "two"]
    generator = work()
    assert await anext(generator) == 1
    await generator.aclose()  # type: ignore[attr-defined]
    assert aio_notebook.lines == ["one", "two"]
    assert aio_notebook.verbs[-1] == "rollback"


async def test_rule_11_deadlines(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    tx = AsyncTransactionManager(aio_manager).begin(timeout=0.2)
    await aio_notebook.note("one")
    async with asyncio.timeout(5):
        while "rollback" not in aio_notebook.verbs:
            await asyncio.sleep(0.01)
    with pytest.raises(TransactionTimedOut):
        await tx.commit()
    with pytest.raises(TransactionTimedOut):
        async with transaction(timeout=0.2), current().use(aio_notebook) as page:
            async with asyncio.timeout(5):
                while not page.interrupted:
                    await asyncio.sleep(0.01)
            page.write("too late")
    assert aio_notebook.lines == []


async def test_without_a_coordinator(aio_manager: AsyncClient, aio_notebook: AsyncMemoryResource) -> None:
    with pytest.raises(CoordinatorUnavailable, match="one resource"):
        async with transaction():
            await aio_notebook.note("one")
            await aio_manager.state.resources["second"].note("two")
    assert aio_notebook.lines == []


async def test_synchronous_functions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"txrpc\.transactional"):

        @transactional
        def wrong() -> None: ...
