"""Both cores together: what a transaction costs end to end, and that it ends in agreement whatever dies in between."""

from __future__ import annotations

import pytest

from txrpc._protocol.messages import Outcome
from txrpc._protocol.participant.branch import BranchInput
from verification.explorer_model import SmallWorld as World
from verification.explorer_model import early

READ_ONLY, REFUSES = BranchInput.READ_ONLY, BranchInput.PREPARE_FAILED

# --------------------------------------------------------------------------- section 4: messages and forced writes


def spent(world: World) -> tuple[int, int, int, int]:
    """Client messages, participant messages, the log's forced writes, the databases' forced writes."""
    databases = sum(database.forced for database in world.databases.values())
    return world.counts["client"], world.counts["participant"], world.forced, databases


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_read_only_transaction_costs_one_round_and_no_forced_write(n: int) -> None:
    world = World(n)
    for database in world.databases.values():
        database.on_prepare = READ_ONLY
    world.client.commit(*[service.call() for service in world.services])
    world.settle()
    assert world.check() is Outcome.COMMITTED
    assert spent(world) == (2, 2 * n, 0, 0)


def test_one_branch_elsewhere_costs_one_round_the_token_and_one_forced_write() -> None:
    world = World(1)
    world.client.commit(world.services[0].call())
    world.settle()
    assert world.check() is Outcome.COMMITTED
    # CommitOnePhase, Committing (only from databases that have a token to give), OnePhaseDone.
    assert spent(world) == (2, 3, 0, 1)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_two_phases_cost_four_messages_a_branch_and_two_forced_writes_each(n: int) -> None:
    world = World(n)
    world.client.commit(*[service.call() for service in world.services])
    world.settle()
    assert world.check() is Outcome.COMMITTED
    assert spent(world) == (2, 4 * n, 1, 2 * n)


@pytest.mark.parametrize("n", [2, 3])
def test_early_votes_save_a_round(n: int) -> None:
    world = World(n)
    refs = early([service.call() for service in world.services], world.services)
    world.client.commit(*refs)
    world.settle()
    assert world.check() is Outcome.COMMITTED
    assert spent(world) == (2, 2 * n, 1, 2 * n)


def test_a_branch_that_only_read_takes_no_part_in_the_second_phase() -> None:
    world = World(3)
    world.databases["db1"].on_prepare = READ_ONLY
    world.client.commit(*[service.call() for service in world.services])
    world.settle()
    assert world.check() is Outcome.COMMITTED
    assert spent(world) == (2, 4 + 2 + 4, 1, 4)


def test_giving_up_costs_one_message_a_branch_and_no_forced_write() -> None:
    world = World(3)
    world.client.give_up(*[service.call() for service in world.services])
    world.settle()
    assert world.check() is Outcome.ABORTED
    assert spent(world) == (2, 3, 0, 0)


def test_a_refused_vote_costs_the_refuser_two_messages_and_writes_nothing_to_the_log() -> None:
    world = World(2)
    world.databases["db0"].on_prepare = REFUSES
    world.client.commit(*[service.call() for service in world.services])
    world.settle()
    assert world.check() is Outcome.ABORTED
    # The other one: Prepare, its vote, Rollback.
    assert spent(world)[:3] == (2, 2 + 3, 0)


# ------------------------------------------------------------------ crashes (every interleaving: tests/simulation/test_explorer)


def two_that_write(world: World) -> None:
    world.client.commit(*[service.call() for service in world.services])


def goes_well(world: World) -> Outcome | None:
    world.settle()
    outcome = world.check()
    world.bury()
    return outcome


def test_a_crash_after_the_decision_is_durable_never_loses_the_commit() -> None:
    steps = durable = 0
    while True:
        world = World(2)
        two_that_write(world)
        for _ in range(steps):
            if world.jobs:
                world.step()
        written, over = bool(world.log), not world.jobs
        world.crash_coordinator(lucky=False)
        assert goes_well(world) is (Outcome.COMMITTED if written else Outcome.ABORTED)
        durable += written
        if over:
            break
        steps += 1
    assert 0 < durable < steps


def test_a_commit_in_one_phase_whose_process_died_is_found_out_by_its_token() -> None:
    """CommitOnePhase and Committing have arrived; the COMMIT was carried out; nobody heard."""
    world = World(2)
    world.client.commit(world.services[0].call())
    while not any(job[0] == "operation" for job in world.jobs):
        world.step()
    world.step()  # Committing
    world.crash_service(0, lucky=True)
    assert goes_well(world) is Outcome.COMMITTED
