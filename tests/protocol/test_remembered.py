"""What is remembered of ended transactions, against a dumb twin: one dictionary with the tick of each entry."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.coordinator_kit import ENOUGH, xid
from txrpc._protocol.coordinator.ended import EndedTransactions
from txrpc.errors import Reason
from txrpc.ids import Xid

GENERATIONS = 4
HORIZON = 30
LIMIT = 12


@dataclass
class Twin:
    """Everything that ever ended, by what it knows of it: never forgets, so that it can say what may be forgotten."""

    ended: dict[Xid, tuple[int, Reason | None]] = field(default_factory=dict)

    def add(self, xid: Xid, end: Reason | None, tick: int) -> None:
        self.ended.setdefault(xid, (tick, end))

    def check(self, real: EndedTransactions, tick: int, begun: dict[Xid, int]) -> None:
        """Nothing that a request above the floor can ask for is missing, and nothing remembered is false."""
        for each, (_, end) in self.ended.items():
            if each in real:
                assert real[each] == end
            else:
                assert begun[each] < real.floor, "forgotten, and yet a request about it would be believed"


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["end", "end", "abort", "again", "sleep", "advance"]), st.integers(0, 40)), max_size=120
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STEPS)
def test_nothing_is_forgotten_that_can_still_be_asked_for(steps: list[Step]) -> None:
    tick, real, twin = 1_000, EndedTransactions(HORIZON, LIMIT, 1_000), Twin()
    begun: dict[Xid, int] = {}
    floor = real.floor
    for number, (kind, size) in enumerate(steps):
        if kind == "sleep":
            tick += size
        elif kind == "advance":
            real.advance(tick)
        elif kind == "again" and begun:
            old = list(begun)[size % len(begun)]
            if old in real:  # one that is forgotten does not come again: requests about it are refused
                real.add(old, ENOUGH)
                twin.add(old, ENOUGH, tick)
        else:
            end = ENOUGH if kind == "abort" else None
            begun[xid(number)] = tick - size % 20  # the root's view of our clock is never ahead
            if begun[xid(number)] >= real.floor:
                real.add(xid(number), end)
                twin.add(xid(number), end, tick)
            else:
                del begun[xid(number)]
        assert real.floor >= floor, "the floor only rises"
        floor = real.floor
        twin.check(real, tick, begun)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=30, max_size=60))
def test_what_ended_within_the_horizon_is_remembered(naps: list[int]) -> None:
    """As long as there is room: the limit is not reached here."""
    tick, real = 1_000, EndedTransactions(HORIZON, 10_000, 1_000)
    ends: list[int] = []
    for number, nap in enumerate(naps):
        real.add(xid(number), None)
        ends.append(tick)
        tick += nap
        real.advance(tick)
        for each, ended in enumerate(ends):
            assert xid(each) in real or tick - ended >= HORIZON
        assert real.floor <= max(0, tick - HORIZON) + 1


def test_memory_is_bounded_in_time() -> None:
    tick, real = 1_000, EndedTransactions(HORIZON, 10_000, 1_000)
    longest = 0
    for number in range(1_000):
        real.add(xid(number), None)
        tick += 1
        real.advance(tick)
        longest = max(longest, len(real))
    assert longest <= HORIZON * GENERATIONS // (GENERATIONS - 1) + GENERATIONS
    assert real.floor > 1_900


@pytest.mark.parametrize("limit", [1, 4, 40])
def test_memory_is_bounded_in_number(limit: int) -> None:
    real = EndedTransactions(HORIZON, limit, 1_000)
    for number in range(1_000):
        real.add(xid(number), None)
        real.advance(1_000)
        assert len(real) <= max(limit, GENERATIONS)
    assert real.floor == 1_001, "requests from that second are refused now, because some of it is forgotten"


def test_a_wake_up_after_a_long_sleep_loses_nothing_too_early() -> None:
    """Nobody was connected for a day, so nobody rang; then somebody asks about the last transaction before that."""
    real = EndedTransactions(HORIZON, LIMIT, 1_000)
    real.add(xid(1), ENOUGH)
    real.advance(90_000)
    assert real[xid(1)] == ENOUGH
    for tick in range(90_000, 90_000 + 2 * HORIZON):
        real.advance(tick)
    assert xid(1) not in real
    assert real.floor > 1_000


def test_the_first_end_stands() -> None:
    real = EndedTransactions(HORIZON, LIMIT, 1_000)
    real.add(xid(1), ENOUGH)
    real.add(xid(1), None)
    real.add(xid(2), None)
    real.advance(1_000 + HORIZON)
    real.add(xid(2), ENOUGH)
    assert (real[xid(1)], real[xid(2)]) == (ENOUGH, None)
    assert len(real) == 2
    with pytest.raises(KeyError):
        real[xid(3)]
