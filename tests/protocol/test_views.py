"""Views of a group: members come and go while epochs of earlier views are still there, and no two answers contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from txrpc._protocol.quorum import acceptor
from txrpc._protocol.quorum.acceptor import Disk, Learn, Outdated, Prepare, answer
from txrpc._protocol.quorum.commands import ChangeView, Filler, LogState, Moved
from txrpc._protocol.quorum.proposer import Proposer, Stage
from txrpc._protocol.quorum.views import Quorums, View
from txrpc.ids import Epoch
from verification.quorum import QuorumWorld, Shape

E1, E2, E3 = (Epoch.make(number, 7) for number in (1, 2, 3))
THREE = Quorums(("a0", "a1", "a2"), 2, 2)
FOUR = Quorums(("a0", "a1", "a2", "a3"), 3, 3, view=2)
SEEDS = 600

# ------------------------------------------------------------------------------------------------------ random worlds


@pytest.mark.parametrize("start", range(0, SEEDS, 300))
def test_rules_1_3_5_and_7_hold_while_members_come_and_go(start: int) -> None:
    worlds = [QuorumWorld(seed, Shape.changing(seed)) for seed in range(start, start + 300)]
    for world in worlds:
        world.run()
    assert sum(len(world.views) > 2 for world in worlds) > 100
    assert sum(world.chosen for world in worlds) > 200


Mutation = Callable[[], list[Any]]


def _answers_in_a_view_that_is_over() -> list[Any]:
    def mistaken(disk: Disk, question: Any) -> Any:
        disk.view = min(disk.view, question.view)
        return answer(disk, question)

    return [patch.object(acceptor, "answer", mistaken)]


def _changes_again_before_the_log_has_moved() -> list[Any]:
    may_follow = QuorumWorld._may_follow

    def mistaken(self: QuorumWorld, now: Quorums, following: Quorums) -> bool:
        self.epochs[0].state.moved, was = now.view, self.epochs[0].state.moved
        try:
            return may_follow(self, now, following)
        finally:
            self.epochs[0].state.moved = was

    return [patch.object(QuorumWorld, "_may_follow", mistaken)]


def _moves_on_to_quorums_that_miss_those_before() -> list[Any]:
    return [patch.object(Quorums, "meets", lambda *_: True)]


def _counts_what_was_answered_in_an_earlier_view() -> list[Any]:
    received, move = Proposer.received, Proposer.move

    def mistaken(self: Any, said: Any) -> Any:
        return received(
            self,
            said if isinstance(said, Outdated) or not hasattr(said, "view") else replace(said, view=self._quorums.view),
        )

    def moves(self: Any, quorums: Quorums) -> Any:
        promises, accepted = dict(self._promises), set(self._accepted)
        out = move(self, quorums)
        self._promises, self._accepted = promises, accepted
        return out

    return [patch.object(Proposer, "received", mistaken), patch.object(Proposer, "move", moves)]


MUTANTS: list[Mutation] = [
    _answers_in_a_view_that_is_over,
    _changes_again_before_the_log_has_moved,
    _moves_on_to_quorums_that_miss_those_before,
    _counts_what_was_answered_in_an_earlier_view,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__.strip("_").replace("_", " "))
def test_a_mistake_is_caught(mutant: Mutation) -> None:
    with ExitStack() as stack:
        for each in mutant():
            stack.enter_context(each)
        for seed in range(4_000):
            try:
                QuorumWorld(seed, Shape.changing(seed)).run()
            except AssertionError as error:
                assert "committed, and aborted" in str(error) or "does not open" in str(error)  # noqa: PT017
                return
    pytest.fail("not caught")


# ------------------------------------------------------------------------------------------------------ single traces


class Group:
    """Acceptors, and messages that arrive when a test says so."""

    def __init__(self, *names: str) -> None:
        self.disks = {name: Disk(name) for name in names}

    def carry(self, proposer: Proposer, out: Any, *reach: str) -> list[Any]:
        """Deliver what *out* sends to those, and all that follows from it; returns every output."""
        outs, waiting = [out], list(out.send)
        while waiting:
            name, question = waiting.pop(0)
            if name in reach:
                outs.append(proposer.received(answer(self.disks[name], question)))
                waiting += outs[-1].send
        return outs

    def opened(self, epoch: Epoch, quorums: Quorums, *reach: str) -> Proposer:
        made = Proposer(epoch, quorums)
        self.carry(made, made.start(), *(reach or quorums.acceptors))
        assert made.stage is Stage.OPEN
        return made


TWO = Quorums(("a1", "a2"), 2, 2, view=2)
ALONE = Quorums(("a2",), 1, 1, view=3)


def test_an_acceptor_that_has_heard_of_a_view_answers_in_no_earlier_one_and_says_which_is_the_latest() -> None:
    group = Group("a0", "a1", "a2")
    first = group.opened(E1, THREE)
    group.carry(first, first.move(TWO), "a1", "a2")
    assert first.state.moved == 2
    late = Proposer(E2, THREE)
    outs = group.carry(late, late.start(), "a0", "a1")
    assert [out.outdated for out in outs] == [0, 0, 2]
    assert late.stage is Stage.READING
    assert isinstance(answer(group.disks["a2"], Learn(E3, 1)), Outdated)
    # It goes on in the later one, as the epoch that it is.
    group.carry(late, late.move(TWO), "a1", "a2")
    assert (late.stage, late.state.moved) == (Stage.OPEN, 2)


def test_what_was_promised_in_an_earlier_view_counts_in_no_quorum_of_the_next() -> None:
    group = Group("a0", "a1", "a2")
    first = Proposer(E1, THREE)
    promise = answer(group.disks["a1"], first.start().send[1][1])
    first.move(TWO)
    first.received(promise)
    first.received(answer(group.disks["a2"], Prepare(E1, view=2)))
    stages = [first.stage]
    first.received(answer(group.disks["a1"], Prepare(E1, view=2)))
    assert [*stages, first.stage] == [Stage.READING, Stage.OPENING]


def test_a_log_has_moved_when_a_quorum_of_the_new_view_has_everything_and_not_only_the_end() -> None:
    """Else a2, alone in the third view, would know that the log has moved, and not what was decided before."""
    group = Group("a0", "a1", "a2")
    first = group.opened(E1, THREE, "a0", "a1")
    missed = group.carry(first, first.propose(Filler()), "a0", "a1")
    assert any(out.chosen for out in missed)
    asked = first.move(TWO).send
    outs = [first.received(answer(group.disks[name], question)) for name, question in asked]
    assert first.state.moved == 1
    assert not any(out.chosen for out in outs)
    # It is given what it has missed, and asked again.
    for out in outs:
        group.carry(first, out, "a1", "a2")
    group.carry(first, first.again(), "a1", "a2")
    assert first.state.moved == 2
    assert group.disks["a2"].base.slot == first.state.slot - 1
    third = group.opened(E2, ALONE)
    assert third.state.epochs.keys() == {E1, E2}


def test_what_is_in_flight_stays_so_when_the_view_changes_and_the_log_moves_after_it() -> None:
    group = Group("a0", "a1", "a2", "a3")
    group.disks["a3"] = Disk("a3", 7, votes=False)
    first = group.opened(E1, THREE)
    first.propose(Filler())
    outs = group.carry(first, first.move(FOUR), "a0", "a1", "a2", "a3")
    assert [out.chosen for out in outs if out.chosen] == [Filler(), Moved(2)]
    assert (first.idle, first.view, first.strangers) == (True, 2, {"a3": 7})
    assert first.move(THREE).send == []


def test_a_disk_that_was_to_be_admitted_is_forgotten_when_its_owner_is_removed() -> None:
    group = Group("a0", "a1", "a2")
    group.disks["a0"] = Disk("a0", 7, votes=False)
    first = group.opened(E1, THREE)
    group.carry(first, first.learn(), "a0", "a1", "a2")
    assert first.strangers == {"a0": 7}
    group.carry(first, first.move(TWO), "a1", "a2")
    assert first.strangers == {}


@pytest.mark.parametrize(
    ("commands", "number"),
    [
        (["a"], 2),
        (["a", "b"], 2),
        (["a", "a"], 2),
        (["b"], None),
        (["a", Moved(2), "b"], 3),
        (["a", Moved(3), "b"], 2),
        ([Moved(2), "a"], None),
    ],
    ids=str,
)
def test_of_two_changes_the_first_holds_and_the_next_waits_until_the_log_has_moved(
    commands: list[Any], number: int | None
) -> None:
    views = {"a": View(2, {"a1": "h:1"}, 1, 1), "b": View(3, {"a2": "h:2"}, 1, 1)}
    state = LogState()
    for command in commands:
        state.apply(ChangeView(views[command]) if isinstance(command, str) else command)
    assert (state.view.number if state.view else None) == number
    assert state.copy() == state
