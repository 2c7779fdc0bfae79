"""Random histories of one coordinator against a checker outside that is too simple to be wrong (see `coordinator_world`)."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.coordinator_world import LEFT_MS, LIMITS, RESOURCES, Root, World
from txrpc.protocol.events import LogHealth, Received
from txrpc.protocol.messages import Outcome

NUMBERS = st.integers(0, 65_535)


def heal(world: World) -> None:
    """No more trouble: everybody connects, everything is delivered, deadlines pass; then all must have ended."""
    world.tell(LogHealth(True))
    for _ in range(4):
        for process in range(len(RESOURCES)):
            world.connect(process)
        calm(world)
        world.sleep(LEFT_MS + LIMITS.ack_wait_ms)
        calm(world)
    for work in world.work.values():
        if work.state == "active":
            work.state = "rolled back"  # at its deadline


def calm(world: World) -> None:
    for _ in range(10_000):
        actions = [*world.possible("arrive"), *world.possible("receive"), *world.possible("log")]
        if not actions:
            return
        actions[0]()
    raise AssertionError("it never ends")


def check_end(world: World) -> None:
    """Agreement, answers, and nothing left behind."""
    for root in world.roots:
        states = world.states(root)
        assert "prepared" not in states, "in doubt for ever"
        assert not {"committed", "rolled back"} <= states, "no agreement"
        if root.asked:
            _check_answer(world, root, states)
    assert set(world.ever) == world.done
    world.sleep(40 * LIMITS.max_timeout_ms)
    assert not world.core.transactions
    assert not world.core._homeless
    assert not [entry for entry in world.core.directory.sessions.values() if entry.owes]


def _check_answer(world: World, root: Root, states: set[str]) -> None:
    """Whoever asks hears the truth, and soon; that nobody knows only where nobody can."""
    answer = _answer_to(world, root)
    assert answer is not None, "not answered"
    one_phase = len(root.refs) == 1 and root.refs[0].vote is None
    if answer is Outcome.UNKNOWN:
        assert one_phase or root.begun_tick * 1000 <= world.forgotten_ms
    elif states:
        assert answer is (Outcome.COMMITTED if states == {"committed"} else Outcome.ABORTED)


def _answer_to(world: World, root: Root) -> Outcome | None:
    root.last = None
    session = next(s for s, p in world.sessions.items() if p == root.client)
    world.tell(Received(session, world.question(root)))
    calm(world)
    world.sleep(LIMITS.ack_wait_ms)
    calm(world)
    return root.last


@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(NUMBERS, max_size=200))
def test_whatever_happens_branches_agree_and_everybody_hears_the_truth(history: list[int]) -> None:
    world = World()
    for number in history:
        world.step(number)
    heal(world)
    check_end(world)


@pytest.mark.parametrize("part", range(4))
def test_long_histories(part: int) -> None:
    """The same, longer than Hypothesis likes; a failure names the seed."""
    for seed in range(part * 60, part * 60 + 60):
        generator = random.Random(seed)
        world = World()
        try:
            for _ in range(400):
                world.step(generator.randrange(65_536))
            heal(world)
            check_end(world)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_these_histories_are_worth_something() -> None:
    """They reach all outcomes, records, restarts and commits in one phase: a world in which nothing happens is always right."""
    seen = {"committed": 0, "aborted": 0, "records": 0, "epochs": 0, "one phase": 0}
    for seed in range(80):
        generator = random.Random(seed)
        world = World()
        for _ in range(400):
            world.step(generator.randrange(65_536))
        seen["records"] += len(world.ever)
        seen["epochs"] += len(world.epochs) - 1
        seen["committed"] += sum(Outcome.COMMITTED in root.heard for root in world.roots)
        seen["aborted"] += sum(Outcome.ABORTED in root.heard for root in world.roots)
        alone = [root for root in world.roots if len(root.refs) == 1 and root.refs[0].vote is None]
        seen["one phase"] += sum(world.work[root.refs[0].branch].state == "committed" for root in alone)
    assert min(seen.values()) >= 8, seen
