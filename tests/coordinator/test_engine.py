"""The engine with the real core and a log that misbehaves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest

from tests.waiting import aeventually
from txrpc._coordinator import log_writer
from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._decision_log.memory import MemoryLog, MemoryStore
from txrpc._decision_log.port import Decision, NotRecorded, RecordUncertain
from txrpc._protocol.coordinator.events import Limits, Received, SessionOpened
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.messages import (
    Acked,
    BranchRef,
    Commit,
    CommitRequest,
    FinishResult,
    FromCoordinator,
    GoAway,
    Hello,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Prepare,
    ResourceInfo,
    Vote,
    Voted,
    Welcome,
)
from txrpc.errors import AbortCode, Fenced
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid

PROCESS = ParticipantId(b"process.")


class RoughLog(MemoryLog):
    """A memory log that raises what it was given, then works; and writes down its batches."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.troubles: list[Exception] = []
        self.batches: list[int] = []
        self.writing = 0
        """How many decisions the last record() was given, from its beginning."""
        self.lookup_s = 0.0
        self.done_troubles: list[Exception] = []
        self.forgets: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def record(self, decisions: Sequence[Decision]) -> int:
        self.writing = len(decisions)
        self.gate.wait(60)
        if self.troubles:
            raise self.troubles.pop(0)
        if decisions:
            self.batches.append(len(decisions))
        return super().record(decisions)

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        if self.done_troubles:
            raise self.done_troubles.pop(0)
        super().done(xids, now_ms)

    def forget(self, done_before_ms: int, limit: int) -> int:
        self.forgets.append((done_before_ms, limit))
        return super().forget(done_before_ms, limit)

    def outcome(self, xid: Xid) -> Decision | None:
        time.sleep(self.lookup_s)
        return super().outcome(xid)


class Box:
    """An outbox that votes and acknowledges by itself."""

    def __init__(self, driver: CoordinatorDriver, process: ParticipantId = PROCESS) -> None:
        self.driver = driver
        self.number = driver.attach(self)
        self.messages: list[FromCoordinator] = []
        self.farewell: GoAway | None = None
        self.deaf = False
        hello = Hello(1, "default", process, "test", (ResourceInfo("a", "test"), ResourceInfo("b", "test")))
        driver.step(SessionOpened(self.number, hello))

    def put(self, message: FromCoordinator) -> None:
        self.messages.append(message)
        loop = asyncio.get_running_loop()
        if isinstance(message, Prepare):
            loop.call_soon(self.say, Voted(message.xid, message.branch, Vote.PREPARED, None, "1"))
        elif isinstance(message, Commit) and not self.deaf:
            loop.call_soon(self.say, Acked(message.gid.xid, message.gid.branch, FinishResult.DONE))

    def say(self, message: Voted | Acked | CommitRequest | OutcomeRequest) -> None:
        self.driver.step(Received(self.number, self.driver.core.state.owner.node, message))

    def close(self, farewell: GoAway) -> None:
        self.farewell = farewell

    def commit(self, number: int) -> Xid:
        xid = Xid.make(number, bytes(10))
        refs = tuple(BranchRef(BranchId(f"{name}{number:07}".encode()), name, PROCESS, 1) for name in ("a", "b"))
        core = self.driver.core
        self.say(CommitRequest(xid, core.state.owner.epoch, core.state.tick, refs, 30_000))
        return xid

    async def outcome(self, xid: Xid, timeout_s: float = 10) -> OutcomeReply:
        async with asyncio.timeout(timeout_s):
            while True:
                for message in self.messages:
                    if isinstance(message, OutcomeReply) and message.xid == xid:
                        return message
                await asyncio.sleep(0.005)


@pytest.fixture
def log() -> RoughLog:
    return RoughLog()


@pytest.fixture
async def driver(log: RoughLog) -> AsyncIterator[CoordinatorDriver]:
    driver = CoordinatorDriver(log, "c1", "default", Limits(), retention_s=60, in_doubt_warn_s=0.1)
    await driver.start()
    yield driver
    await driver.stop()


async def test_commit_through_the_log(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    assert isinstance(box.messages[0], Welcome)
    reply = await box.outcome(box.commit(1))
    assert reply.outcome is Outcome.COMMITTED
    assert log.batches == [1]
    assert driver.messages["sent Prepare"] == 2


async def test_rule_3_nobody_hears_committed_before_the_log_has_it(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    log.gate.clear()
    xid = box.commit(1)
    await aeventually(lambda: log.writing == 1)
    assert not [m for m in box.messages if isinstance(m, Commit | OutcomeReply)]
    log.gate.set()
    assert (await box.outcome(xid)).outcome is Outcome.COMMITTED


async def test_group_commit_takes_everything_that_waits_as_one_batch(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    log.gate.clear()
    first = box.commit(1)
    await aeventually(lambda: log.writing == 1)
    rest = [box.commit(i) for i in range(2, 42)]
    transactions = driver.core.state.transactions.values()
    await aeventually(lambda: [row.state for row in transactions] == [State.RECORDING] * 41)
    log.gate.set()
    for xid in (first, *rest):
        assert (await box.outcome(xid)).outcome is Outcome.COMMITTED
    assert log.batches == [1, 40]


async def test_what_is_certainly_not_recorded_aborts_and_the_log_is_tried_again(
    driver: CoordinatorDriver, log: RoughLog
) -> None:
    box = Box(driver)
    log.troubles = [NotRecorded("the disk is full: free some space"), NotRecorded("still full")]
    reply = await box.outcome(box.commit(1))
    assert reply.outcome is Outcome.ABORTED
    assert reply.reason is not None
    assert reply.reason.code is AbortCode.LOG_UNAVAILABLE
    assert "free some space" in reply.reason.text
    refused = await box.outcome(box.commit(2))
    assert refused.outcome is Outcome.ABORTED
    await aeventually(lambda: not driver.core.state.log_trouble)
    assert (await box.outcome(box.commit(3))).outcome is Outcome.COMMITTED


async def test_what_may_be_recorded_is_repeated_and_never_aborted(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    log.troubles = [RecordUncertain("no answer"), RecordUncertain("no answer")]
    reply = await box.outcome(box.commit(1))
    assert reply.outcome is Outcome.COMMITTED
    assert log.batches == [1]
    assert not driver.core.state.log_trouble


async def test_a_repeat_that_was_not_recorded_says_nothing_about_the_first_try(
    driver: CoordinatorDriver, log: RoughLog
) -> None:
    box = Box(driver)
    log.troubles = [RecordUncertain("no answer"), NotRecorded("cannot connect"), NotRecorded("cannot connect")]
    reply = await box.outcome(box.commit(1))
    assert reply.outcome is Outcome.COMMITTED


async def test_a_mistake_in_a_task_ends_the_engine_instead_of_letting_it_hang(
    driver: CoordinatorDriver, log: RoughLog, caplog: pytest.LogCaptureFixture
) -> None:
    box = Box(driver)
    log.troubles = [AssertionError("two decisions about one transaction")]
    box.commit(1)
    async with asyncio.timeout(10):
        error = await asyncio.shield(driver.over)
    assert isinstance(error, AssertionError)
    assert box.farewell is not None
    assert (box.farewell.code, box.farewell.retry) == ("internal", True)
    assert not [m for m in box.messages if isinstance(m, Commit | OutcomeReply)]
    assert "engine failed" in caplog.text
    assert "two decisions" in caplog.text


async def test_a_mistake_at_a_timer_ends_the_engine_too(
    driver: CoordinatorDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(driver.core), "next_wakeup_ms", lambda self: driver.now_ms() + 20)

    def broken(_self: object, event: object, _now_ms: int) -> None:
        raise AssertionError(f"no row for {event}")

    monkeypatch.setattr(type(driver.core), "step", broken)
    driver._reschedule()
    async with asyncio.timeout(10):
        assert isinstance(await asyncio.shield(driver.over), AssertionError)


async def test_a_commit_does_not_wait_behind_all_questions(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    log.lookup_s = 0.002
    strange = Epoch.make(driver.core.state.owner.epoch.number, 7)
    for number in range(3_000):  # six seconds of questions
        box.say(OutcomeRequest(Xid.make(10_000 + number, bytes(10)), strange, 0))
    reply = await box.outcome(box.commit(1), timeout_s=3)
    assert reply.outcome is Outcome.COMMITTED
    assert driver.book.questions[box.number] > 1_000


async def test_rule_7_fenced_ends_the_engine_and_tells_every_session(driver: CoordinatorDriver, log: RoughLog) -> None:
    box = Box(driver)
    log.troubles = [Fenced("epoch 2 has opened the log")]
    box.commit(1)
    async with asyncio.timeout(10):
        error = await asyncio.shield(driver.over)
    assert isinstance(error, Fenced)
    assert box.farewell is not None
    assert box.farewell.code == "fenced"
    assert not [m for m in box.messages if isinstance(m, Commit)]


async def test_a_shutdown_finishes_what_is_being_decided_and_refuses_the_rest(
    driver: CoordinatorDriver, log: RoughLog
) -> None:
    box = Box(driver)
    log.gate.clear()
    xid = box.commit(1)
    await aeventually(lambda: log.writing == 1)
    draining = asyncio.create_task(driver.drain(10))
    await aeventually(lambda: driver.core.state.draining)
    late = await box.outcome(box.commit(2))
    assert late.reason is not None
    assert late.reason.code is AbortCode.SHUTTING_DOWN
    log.gate.set()
    await draining
    assert (await box.outcome(xid)).outcome is Outcome.COMMITTED
    assert box.farewell is not None
    assert box.farewell.retry


async def test_g10_an_idle_session_goes_at_once_while_others_are_still_decided(
    log: RoughLog, driver: CoordinatorDriver
) -> None:
    """It was kept for the whole grace, though the next coordinator had been there after a second."""
    busy, idle = Box(driver), Box(driver, ParticipantId(b"idle...."))
    log.gate.clear()
    xid = busy.commit(1)
    await aeventually(lambda: log.writing)
    draining = asyncio.create_task(driver.drain(60))
    await aeventually(lambda: idle.farewell is not None)
    assert busy.farewell is None
    log.gate.set()
    assert (await busy.outcome(xid)).outcome is Outcome.COMMITTED
    await draining


async def test_a_restart_takes_up_what_was_not_done(log: RoughLog) -> None:
    store = MemoryStore()
    first = CoordinatorDriver(RoughLog(store), "c1", "default", Limits(), 60, 10)
    await first.start()
    box = Box(first)
    box.deaf = True
    xid = box.commit(1)
    await aeventually(lambda: store.nodes["c1"].decisions)
    await first.stop()
    second = CoordinatorDriver(RoughLog(store), "c1", "default", Limits(), 60, 10)
    await second.start()
    again = Box(second)
    await aeventually(lambda: not second.core.state.transactions)
    assert {m.gid.xid for m in again.messages if isinstance(m, Commit)} == {xid}
    await second.stop()
    assert xid in store.nodes["c1"].done_ms


# ------------------------------------------------------------------------------------ retention, clock, marks of done


async def started(log: RoughLog, retention_s: float) -> CoordinatorDriver:
    driver = CoordinatorDriver(log, "c1", "default", Limits(), retention_s, in_doubt_warn_s=10)
    await driver.start()
    return driver


async def test_rule_6_marks_of_done_are_repeated_until_the_log_has_them(log: RoughLog) -> None:
    """A log that fails in between loses none, and records nothing twice."""
    store = MemoryStore()
    log = RoughLog(store)
    log.done_troubles = [NotRecorded("full"), RecordUncertain("no answer")]
    driver = await started(log, 60)
    box = Box(driver)
    xids = [box.commit(number) for number in range(1, 4)]
    for xid in xids:
        assert (await box.outcome(xid)).outcome is Outcome.COMMITTED
    await aeventually(lambda: set(store.nodes["c1"].done_ms) == set(xids))
    assert log.done_troubles == []
    assert list(log.pending()) == []
    await driver.stop()


async def test_rule_6_what_is_not_acknowledged_is_never_forgotten(log: RoughLog) -> None:
    driver = await started(log, 0)
    box = Box(driver)
    box.deaf = True
    xid = box.commit(1)
    await aeventually(lambda: log.outcome(xid))
    await aeventually(lambda: len(log.forgets) > 1)
    assert log.outcome(xid) is not None
    await driver.stop()


async def test_rule_12_what_is_done_is_kept_for_the_retention_time_and_then_deleted() -> None:
    store = MemoryStore()
    driver = await started(RoughLog(store), 2)
    box = Box(driver)
    xid = box.commit(1)
    assert (await box.outcome(xid)).outcome is Outcome.COMMITTED
    await aeventually(lambda: xid in store.nodes["c1"].done_ms)
    done_ms = store.nodes["c1"].done_ms[xid]
    await aeventually(lambda: xid not in store.nodes["c1"].decisions)
    assert driver.clock_ms() - done_ms >= 2_000
    assert store.nodes["c1"].forgotten_ms > done_ms
    await driver.stop()


async def test_forgetting_goes_on_in_batches_until_nothing_is_left(
    log: RoughLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "_FORGET_BATCH", 2)
    driver = await started(log, 0)
    box = Box(driver)
    xids = [box.commit(number) for number in range(1, 6)]
    for xid in xids:
        await box.outcome(xid)
    await aeventually(lambda: not any(log.outcome(xid) for xid in xids))
    assert {limit for _, limit in log.forgets} == {2}
    await driver.stop()


async def test_rule_12_what_a_full_log_deletes_early_is_not_taken_for_aborted() -> None:
    """Of an epoch before: what is decided in the present one is remembered."""
    store = MemoryStore(keeps=0)
    first = await started(RoughLog(store), 3_600)
    epoch, begun_tick = first.owner.epoch, first.core.state.tick
    early = (box := Box(first)).commit(1)
    assert (await box.outcome(early)).outcome is Outcome.COMMITTED
    await first.stop()
    second = await started(RoughLog(store), 3_600)
    second.book._forget_at_ms = 0
    await aeventually(lambda: early not in store.nodes["c1"].decisions)
    box = Box(second)
    box.say(OutcomeRequest(early, epoch, begun_tick))
    assert (await box.outcome(early)).outcome is Outcome.UNKNOWN
    await second.stop()


async def test_the_coordinators_clock_never_goes_back_over_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's may: what is decided later has the later time all the same, or it would be forgotten too early."""
    store = MemoryStore()
    first = await started(RoughLog(store), 60)
    earlier = (box := Box(first)).commit(1)
    await box.outcome(earlier)
    await first.stop()
    early_ms = store.nodes["c1"].decisions[earlier].decided_ms
    monkeypatch.setattr(time, "time_ns", lambda: (early_ms - 3_600_000) * 1_000_000)
    second = await started(RoughLog(store), 60)
    later = (box := Box(second)).commit(2)
    await box.outcome(later)
    await second.stop()
    assert store.nodes["c1"].decisions[later].decided_ms > early_ms
    assert second.core.state.tick >= early_ms // 1000
