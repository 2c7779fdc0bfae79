"""Retry over real processes that die and come back (M5)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import txrpc
from tests.system.world import START, World
from tests.waiting import eventually

Make = Callable[..., World]
Connect = Callable[[World], txrpc.TransactionManager]


def test_m5_three_attempts_bridge_a_coordinator_that_is_away(make_world: Make, connected: Connect) -> None:
    world = make_world()
    manager = connected(world)
    teller, failed = world.teller(), threading.Event()
    world.coordinator.kill()
    eventually(lambda: manager.status().coordinator is None, 20)

    def come_back() -> None:
        assert failed.wait(20)
        world.coordinator.start()

    def before_retry(_: txrpc.FailedAttempt) -> None:
        failed.set()

    @txrpc.transactional(timeout=30, retry=txrpc.Retry(attempts=3, before_retry=before_retry))
    def transfer() -> None:
        teller.transfer(0, "0000", 1, "0000", 100)

    thread = threading.Thread(target=come_back)
    thread.start()
    transfer()
    thread.join()
    teller.close()
    world.at_rest()
    assert world.money() == [START - 100, START + 100]


@pytest.mark.proof
def test_m5_three_attempts_bridge_a_service_that_is_away(make_world: Make, connected: Connect) -> None:
    world = make_world()
    connected(world)
    teller, service = world.teller(), world.services["bank-b"]
    failures: list[txrpc.FailedAttempt] = []
    service.kill()
    back: list[threading.Thread] = []

    def before_retry(failed: txrpc.FailedAttempt) -> None:
        failures.append(failed)
        if len(failures) == 4:
            back.append(threading.Thread(target=service.start))
            back[0].start()

    @txrpc.transactional(timeout=40, retry=txrpc.Retry(attempts=3, before_retry=before_retry))
    def transfer() -> None:
        teller.transfer(0, "0000", 1, "0000", 100)

    transfer()
    back[0].join()
    teller.close()
    world.at_rest()
    assert len(failures) >= 4
    assert world.money() == [START - 100, START + 100]
