"""Both cores together: what a transaction costs end to end, and that it ends in agreement whatever dies in between."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from txrpc.protocol.branch import BranchInput
from txrpc.protocol.messages import Outcome
from txrpc.testing.small_world import SmallWorld as World
from txrpc.testing.small_world import early

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


# ------------------------------------------------------------------------------------ crashes between any two steps


def two_that_write(world: World) -> None:
    world.client.commit(*[service.call() for service in world.services])


def one_that_writes(world: World) -> None:
    world.client.commit(world.services[0].call())


def one_of_two_only_reads(world: World) -> None:
    world.databases["db1"].on_prepare = READ_ONLY
    two_that_write(world)


def one_of_two_refuses(world: World) -> None:
    world.databases["db1"].on_prepare = REFUSES
    two_that_write(world)


def both_vote_early(world: World) -> None:
    world.client.commit(*early([service.call() for service in world.services], world.services))


def both_vote_early_and_the_root_gives_up(world: World) -> None:
    world.client.give_up(*early([service.call() for service in world.services], world.services))


def the_root_dies_before_it_asks(world: World) -> None:
    early([service.call() for service in world.services], world.services)


STORIES: dict[str, tuple[int, Callable[[World], None]]] = {
    "two that write": (2, two_that_write),
    "one that writes": (1, one_that_writes),
    "one of two only reads": (2, one_of_two_only_reads),
    "one of two refuses": (2, one_of_two_refuses),
    "both vote early": (2, both_vote_early),
    "both vote early, the root gives up": (2, both_vote_early_and_the_root_gives_up),
    "both vote early, the root dies": (2, the_root_dies_before_it_asks),
}
CRASHES: dict[str, Callable[[World], None]] = {
    "coordinator": lambda world: world.crash_coordinator(lucky=False),
    "coordinator, written": lambda world: world.crash_coordinator(lucky=True),
    "first service": lambda world: world.crash_service(0, lucky=False),
    "first service, done": lambda world: world.crash_service(0, lucky=True),
    "last service": lambda world: world.crash_service(-1, lucky=False),
    "last service, done": lambda world: world.crash_service(-1, lucky=True),
    "the client's connection": lambda world: world.cut(world.client),
    "the first service's connection": lambda world: world.cut(world.services[0]),
}


def begun(story: str, seed: int) -> World:
    size, begin = STORIES[story]
    generator = random.Random(seed)
    world = World(size, (lambda jobs: 0) if seed == 0 else generator.randrange)
    begin(world)
    return world


def steps_of(story: str, seed: int) -> int:
    world, steps = begun(story, seed), 0
    while world.jobs:
        world.step()
        steps += 1
    return steps


def goes_well(world: World) -> Outcome | None:
    world.settle()
    outcome = world.check()
    world.bury()
    return outcome


@pytest.mark.parametrize("story", STORIES)
def test_without_a_crash_every_order_of_steps_ends_well(story: str) -> None:
    outcomes = {goes_well(begun(story, seed)) for seed in range(60)}
    assert len(outcomes) == 1
    assert outcomes <= {None, Outcome.COMMITTED, Outcome.ABORTED}


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("story", STORIES)
def test_a_crash_between_any_two_steps(story: str, crash: str) -> None:
    for seed in range(6):
        for after in range(steps_of(story, seed) + 1):
            world = begun(story, seed)
            for _ in range(after):
                world.step()
            CRASHES[crash](world)
            outcome = goes_well(world)
            # Only a process that died in the middle of its one COMMIT leaves nobody who could know.
            assert outcome is not Outcome.UNKNOWN or (story == "one that writes" and "service" in crash)
            assert outcome is not Outcome.UNKNOWN or "connection" not in crash


@pytest.mark.parametrize("second", CRASHES)
@pytest.mark.parametrize("first", CRASHES)
def test_two_crashes_between_any_steps_of_a_commit_in_two_phases(first: str, second: str) -> None:
    for after in range(steps_of("two that write", 0) + 1):
        for then in (0, 1, 3, 6):
            world = begun("two that write", 0)
            for _ in range(after):
                world.step()
            CRASHES[first](world)
            for _ in range(min(then, len(world.jobs))):
                world.step()
            CRASHES[second](world)
            goes_well(world)


def test_a_crash_after_the_decision_is_durable_never_loses_the_commit() -> None:
    for after in range(steps_of("two that write", 0) + 1):
        world = begun("two that write", 0)
        for _ in range(after):
            world.step()
        durable = bool(world.log)
        world.crash_coordinator(lucky=False)
        assert goes_well(world) is (Outcome.COMMITTED if durable else Outcome.ABORTED)


def test_a_commit_in_one_phase_whose_process_died_is_found_out_by_its_token() -> None:
    """CommitOnePhase and Committing have arrived; the COMMIT was carried out; nobody heard."""
    world = begun("one that writes", 0)
    while not any(job[0] == "operation" for job in world.jobs):
        world.step()
    world.step()  # Committing
    world.crash_service(0, lucky=True)
    assert goes_well(world) is Outcome.COMMITTED
