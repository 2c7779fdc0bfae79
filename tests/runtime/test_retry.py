"""Retry: a policy in time, which bridges what it names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

import txrpc.aio
from tests.runtime.conftest import NoSession
from tests.runtime.memory_resource import MemoryResource
from txrpc._client.client import Client
from txrpc._client.retry import Attempts, FailedAttempt, Retry
from txrpc._client.scope import default_client, set_default_client
from txrpc._client.transactional import transactional
from txrpc._context import current
from txrpc._protocol.messages import Owner, Welcome
from txrpc.errors import (
    AbortCode,
    CoordinatorUnavailable,
    NotJoined,
    Reason,
    ResourceUnavailable,
    TransactionAborted,
    UsageError,
    aborted,
)
from txrpc.ids import Epoch

RETRYABLE = sorted(code for code in AbortCode if code.retryable)


def conflict(code: AbortCode = AbortCode.DEADLOCK) -> TransactionAborted:
    return aborted(None, Reason(code))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ------------------------------------------------------------------------------------------------------ the policy alone


@pytest.mark.parametrize("code", AbortCode)
def test_what_is_run_again_is_what_the_code_says(code: AbortCode) -> None:
    assert Attempts(Retry(), 5).may_go_on(conflict(code), None) is code.retryable


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (CoordinatorUnavailable("x"), True),
        (ResourceUnavailable("x"), True),
        (NotJoined("x"), False),
        (KeyError("x"), False),
    ],
)
def test_what_is_run_again_is_what_left_nothing(error: Exception, again: bool) -> None:
    assert Attempts(Retry(), 5).may_go_on(error, None) is again
    assert not Attempts(None, 5).may_go_on(error, None)


def test_by_default_the_timeout_bounds_all_attempts_together() -> None:
    clock = Clock()
    attempts = Attempts(Retry(backoff_s=0), 5, clock)
    assert attempts.timeout_s() == 5
    for second in range(1, 5):
        clock.now = 100.0 + second
        assert attempts.may_go_on(conflict(), None)
        assert attempts.timeout_s() == 5 - second
    clock.now = 105.0
    assert not attempts.may_go_on(conflict(), None)


def test_without_a_timeout_the_default_one_bounds_them() -> None:
    clock = Clock()
    attempts = Attempts(Retry(backoff_s=0), None, clock)
    assert attempts.timeout_s() is None
    clock.now += 29.0
    assert attempts.may_go_on(conflict(), None)
    assert attempts.timeout_s() == 1.0
    clock.now += 1.0
    assert not attempts.may_go_on(conflict(), None)


def test_within_s_is_for_all_attempts_and_the_timeout_for_each() -> None:
    clock = Clock()
    attempts = Attempts(Retry(within_s=60, backoff_s=0), 5, clock)
    assert attempts.timeout_s() == 5
    clock.now += 58
    assert attempts.may_go_on(conflict(), None)
    assert attempts.timeout_s() == 2
    assert Attempts(Retry(within_s=2), 5, clock).timeout_s() == 2


def test_no_attempt_begins_after_the_time_is_up() -> None:
    clock = Clock()
    attempts = Attempts(Retry(backoff_s=1e9, max_backoff_s=1e9), 5, clock)
    assert not attempts.may_go_on(conflict(), None)


def test_a_number_bounds_the_attempts_as_well() -> None:
    attempts = Attempts(Retry.make(3), 5)
    assert [attempts.may_go_on(conflict(), None) for _ in range(3)] == [True, True, False]


def test_m5_only_conflicts_count_what_was_out_of_reach_does_not() -> None:
    attempts = Attempts(Retry(attempts=2, backoff_s=0), 5)
    out_of_reach = [CoordinatorUnavailable("x"), ResourceUnavailable("x"), conflict(AbortCode.CALL_END_UNKNOWN)]
    out_of_reach += [conflict(AbortCode.PARTICIPANT_LOST), conflict(AbortCode.COORDINATOR_RESTARTED)]
    assert all(attempts.may_go_on(error, None) for error in out_of_reach)
    assert attempts.may_go_on(conflict(), None)
    assert all(attempts.may_go_on(error, None) for error in out_of_reach)
    assert not attempts.may_go_on(conflict(), None)


def test_true_is_the_default_policy_and_false_is_none() -> None:
    assert Retry.make(True) == Retry()
    assert Retry.make(False) is None
    assert Retry.make(None) is None


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"backoff_s": -1}, {"max_backoff_s": -1}, {"within_s": 0}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a retry policy"):
        Retry(**wrong)


def test_the_last_error_names_the_one_before() -> None:
    attempts = Attempts(Retry(attempts=2, backoff_s=0), 5)
    assert attempts.may_go_on(conflict(), None)
    last = KeyError("x")
    assert not attempts.may_go_on(last, None)
    (note,) = last.__notes__
    assert note.startswith("attempt 2 in 0.0 s; the one before failed with TransactionAborted: ")
    assert "deadlock" in note
    first = KeyError("y")
    assert not Attempts(Retry(), 5).may_go_on(first, None)
    assert not hasattr(first, "__notes__")


def test_pauses_grow_and_have_a_limit_even_after_thousands() -> None:
    policy = Retry(backoff_s=0.1, max_backoff_s=2)
    assert all(0 <= policy.sleep_s(1) <= 0.1 for _ in range(100))
    assert all(0 <= policy.sleep_s(10_000) <= 2 for _ in range(100))
    assert max(policy.sleep_s(5) for _ in range(200)) > 0.8


def test_before_retry_is_told_what_failed_and_may_end_it(session: LateSession) -> None:
    told: list[FailedAttempt] = []

    def hook(failed: FailedAttempt) -> None:
        told.append(failed)
        if failed.number == 2:
            raise InterruptedError

    @transactional(timeout=20, retry=Retry(backoff_s=0, before_retry=hook))
    def work() -> None:
        current().set_rollback_only(Reason(AbortCode.DEADLOCK))

    with pytest.raises(InterruptedError):
        work()
    assert [failed.number for failed in told] == [1, 2]
    assert all(isinstance(failed.error, TransactionAborted) for failed in told)
    assert told[0].pause_s == 0
    assert 0 <= told[0].elapsed_s <= told[1].elapsed_s < 20
    assert told[0].left_s + told[0].elapsed_s == pytest.approx(20)


async def test_before_retry_may_be_a_coroutine_function(aio_manager: Any) -> None:
    told: list[int] = []

    async def hook(failed: FailedAttempt) -> None:
        await asyncio.sleep(0)
        told.append(failed.number)

    @txrpc.aio.transactional(retry=Retry(attempts=3, backoff_s=0, before_retry=hook))
    async def work() -> None:
        current().set_rollback_only(Reason(AbortCode.DEADLOCK))

    with pytest.raises(TransactionAborted):
        await work()
    assert told == [1, 2]


# ------------------------------------------------------------------------------------------------------- in a process


class LateSession(NoSession):
    """A coordinator that comes back when a test says so."""

    def __init__(self) -> None:
        self.waited = threading.Event()
        self.back = threading.Event()

    @property
    def over(self) -> bool:  # type: ignore[override]
        self.waited.set()  # it is looked at before it is waited for
        return False


@pytest.fixture
def session() -> Iterator[LateSession]:
    session = LateSession()
    client = Client("default", [cast("Any", MemoryResource())])
    client.start(session)
    set_default_client("txrpc", client, on=True)
    yield session
    client.close()


def test_m5_an_attempt_waits_for_the_coordinator_to_come_back(session: LateSession) -> None:
    attempts: list[int] = []

    @transactional(timeout=20, retry=2)
    def work() -> str:
        attempts.append(1)
        if not session.back.is_set():
            raise CoordinatorUnavailable("no session")
        return "done"

    def come_back() -> None:
        assert session.waited.wait(20)
        session.back.set()
        core = default_client("txrpc").core
        core.on_welcome(session, Welcome(Owner("c1", Epoch.make(1, 1)), 1, 60_000, 0, 0))

    thread = threading.Thread(target=come_back)
    thread.start()
    assert work() == "done"
    thread.join()
    assert len(attempts) == 2


def test_waiting_for_the_coordinator_ends_with_the_time(session: LateSession) -> None:
    attempts: list[int] = []

    @transactional(timeout=0.3, retry=True)
    def work() -> None:
        attempts.append(1)
        raise CoordinatorUnavailable("no session")

    with pytest.raises(CoordinatorUnavailable):
        work()
    assert session.waited.is_set()
    assert attempts == [1]


def test_a_later_attempt_has_only_the_time_that_is_left(session: LateSession, monkeypatch: pytest.MonkeyPatch) -> None:
    core, given = default_client("txrpc").core, list[float]()
    begin_part = core.begin_part

    def noted(timeout_s: float, *arguments: Any) -> Any:
        given.append(timeout_s)
        return begin_part(timeout_s, *arguments)

    monkeypatch.setattr(core, "begin_part", noted)

    @transactional(timeout=20, retry=Retry(backoff_s=0))
    def work() -> None:
        if len(given) == 1:
            current().set_rollback_only(Reason(AbortCode.DEADLOCK))

    work()
    first, second = given
    assert second < first == 20


async def test_m5_an_attempt_waits_for_the_coordinator_in_asyncio_too(aio_manager: Any) -> None:
    waits: list[float] = []

    async def reconnect(_node: str, timeout_s: float) -> None:
        waits.append(timeout_s)

    aio_manager.state.runtime.reconnect = reconnect

    @txrpc.aio.transactional(timeout=20, retry=2)
    async def work() -> str:
        if not waits:
            raise CoordinatorUnavailable("no session")
        return "done"

    assert await work() == "done"
    assert len(waits) == 1
    assert 0 < waits[0] <= 20
