"""What is in doubt is said, branch by branch, and ever more rarely."""

from __future__ import annotations

from typing import Any

import pytest

from txrpc._coordinator import in_doubt as doubts
from txrpc._coordinator.in_doubt import InDoubtReporter, in_doubt
from txrpc._protocol.coordinator.events import Limits, Received, SessionOpened
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.messages import Acked, FinishResult, Hello, ResourceInfo
from txrpc._protocol.records import Decision, Opened, PreparedBranch
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid

PROCESS = ParticipantId(b"process.")
BEFORE, NOW = Epoch.make(1, 1), Epoch.make(2, 2)


def core(transactions: int = 1) -> Coordinator:
    """One that has just restarted, with decisions about two branches each to finish, in databases a and b."""
    pending = tuple(
        Decision(Xid.make(n + 1, bytes(10)), BEFORE, 1, tuple(PreparedBranch(branch(n, r), PROCESS, r) for r in "ab"))
        for n in range(transactions)
    )
    return Coordinator("c1", "default", Opened(NOW, {BEFORE: 0}, pending), Limits(), now_ms=0, clock_ms=1_000)


def branch(number: int, resource: str) -> BranchId:
    return BranchId(f"{resource}{number:07}".encode())


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, int]]:
    """Transaction, resource and age of each line, which are then forgotten."""
    records: list[Any] = caplog.records
    assert all(record.message == "in doubt" and record.reason for record in records)
    lines = [(record.xid, record.resource, record.age_ms) for record in records]
    caplog.clear()
    return lines


def test_every_branch_has_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    watch, restarted = InDoubtReporter(after_ms=100), core()
    watch.warn(restarted, 99)
    assert said(caplog) == []
    watch.warn(restarted, 100)
    xid = str(Xid.make(1, bytes(10)))
    assert {vars(record)["branch"] for record in caplog.records} == {str(branch(0, "a")), str(branch(0, "b"))}
    assert said(caplog) == [(xid, "a", 100), (xid, "b", 100)]


def test_it_is_said_again_whenever_the_age_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    watch, restarted = InDoubtReporter(after_ms=100), core()
    for now_ms in range(0, 2_001, 50):
        watch.warn(restarted, now_ms)
    assert [age for _, resource, age in said(caplog) if resource == "a"] == [100, 200, 400, 800, 1_600]


def test_what_has_been_acknowledged_is_not_said_any_more(caplog: pytest.LogCaptureFixture) -> None:
    watch, restarted = InDoubtReporter(after_ms=100), core()
    restarted.step(SessionOpened(1, Hello(1, "default", PROCESS, "t", (ResourceInfo("a", "t"),))), 10)
    restarted.step(
        Received(1, restarted.state.owner.node, Acked(Xid.make(1, bytes(10)), branch(0, "a"), FinishResult.DONE)), 20
    )
    watch.warn(restarted, 200)
    assert [resource for _, resource, _ in said(caplog)] == ["b"]
    assert [doubt.resource for doubt in in_doubt(restarted, 200)] == ["b"]


def test_thousands_in_doubt_are_said_a_few_at_a_time_and_each_in_its_turn(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "_LINES_MAX", 7)
    watch, restarted = InDoubtReporter(after_ms=100), core(transactions=10)
    heard = set()
    for now_ms in (150, 151, 152):
        watch.warn(restarted, now_ms)
        lines = said(caplog)
        assert len(lines) <= 7
        heard |= {(xid, resource) for xid, resource, _ in lines}
    assert len(heard) == 20
