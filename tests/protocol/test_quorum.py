"""The replicated log of one node: whatever happens to acceptors, epochs and messages, no two answers contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from txrpc._protocol.messages import FinishResult
from txrpc._protocol.quorum import acceptor, proposer
from txrpc._protocol.quorum.acceptor import (
    FURTHEST,
    Accept,
    Accepted,
    Disk,
    Install,
    Learn,
    Prepare,
    Promise,
    Refused,
    Slot,
    answer,
)
from txrpc._protocol.quorum.commands import Admit, Bind, Filler, Forget, LogState, Marker, Record, Report
from txrpc._protocol.quorum.proposer import Proposer, Stage
from txrpc._protocol.quorum.views import Quorums
from txrpc._protocol.records import Decision, Incident
from txrpc.errors import ConfigurationError
from txrpc.ids import BranchId, Epoch, Xid
from verification.quorum import QuorumWorld, Shape

E1, E2, E3 = (Epoch.make(number, 7) for number in (1, 2, 3))
X, Y = Xid(bytes(15) + b"x"), Xid(bytes(15) + b"y")
THREE = Quorums(("a0", "a1", "a2"), 2, 2)
SEEDS = 1_500


def record(xid: Xid, epoch: Epoch = E1) -> Record:
    return Record((Decision(xid, epoch, 5, ()),))


def state_after(*commands: Any) -> LogState:
    state = LogState()
    for command in commands:
        state.apply(command)
    return state


# ------------------------------------------------------------------------------------------------------ random worlds


@pytest.mark.parametrize("start", range(0, SEEDS, 500))
def test_rules_1_3_5_and_7_no_two_epochs_contradict_each_other(start: int) -> None:
    worlds = [QuorumWorld(seed, Shape.of(seed)) for seed in range(start, start + 500)]
    for world in worlds:
        world.run()
    assert sum(world.chosen for world in worlds) > 300
    assert sum(sum(each.stage is Stage.OVER for each in world.epochs) for world in worlds) > 300
    assert any(not committed for world in worlds for committed in world.told.values())


MOST_TELLING = Shape(epochs=5, records=8, steps=150)
"""In few steps, what most mistakes need: three acceptors, a lost disk, and epochs that overtake each other."""

Mutation = Callable[[], list[Any]]


def _accepts_what_it_has_promised_not_to() -> list[Any]:
    def mistaken(disk: Disk, question: Any) -> Any:
        promised = disk.promised
        if isinstance(question, Accept):
            disk.promised = Epoch(0)
        said = answer(disk, question)
        disk.promised = max(promised, disk.promised)
        return said

    return [patch.object(acceptor, "answer", mistaken)]


def _forgets_its_promise() -> list[Any]:
    def mistaken(disk: Disk, question: Any) -> Any:
        said = answer(disk, question)
        disk.promised = max((slot.epoch for slot in disk.slots.values()), default=Epoch(0))
        return said

    return [patch.object(acceptor, "answer", mistaken)]


def _adopts_only_what_a_quorum_of_the_answers_has() -> list[Any]:
    behind = proposer._behind

    def mistaken(known: Any, promises: Any) -> Any:
        base, _ = behind(known, promises)
        counts: dict[Any, int] = {}
        for each in promises:
            for number, slot in each.slots.items():
                counts[number, slot.command] = counts.get((number, slot.command), 0) + 1
        few = [
            replace(each, slots={n: s for n, s in each.slots.items() if counts[n, s.command] > 1}) for each in promises
        ]
        return base, behind(known, few)[1]

    return [patch.object(proposer, "_behind", mistaken)]


def _writes_no_marker() -> list[Any]:
    chose = Proposer._chose

    def mistaken(self: Any, command: Any) -> None:
        if isinstance(command, Marker):
            self.stage, self._command, self._out.opened = Stage.OPEN, None, True
        else:
            chose(self, command)

    begin = Proposer._begin

    def begins(self: Any, command: Any) -> None:
        if isinstance(command, Marker):
            mistaken(self, command)
        else:
            begin(self, command)

    return [patch.object(Proposer, "_begin", begins)]


def _answers_before_what_it_has_read_is_accepted_again() -> list[Any]:
    promised = Proposer._promised

    def mistaken(self: Any, said: Promise) -> None:
        reading = self.stage is Stage.READING
        promised(self, said)
        if reading and self.stage is Stage.OPENING:
            self.state = self.state.copy()
            for command in [self._command, *self._to_do]:
                self.state.apply(command)
            self.stage, self._command, self._to_do, self._out.opened = Stage.OPEN, None, [], True
            self._out.send.clear()

    return [patch.object(Proposer, "_promised", mistaken)]


def _takes_an_old_value_for_the_latest() -> list[Any]:
    def mistaken(known: Any, promises: Any) -> Any:
        base = max([known, *(each.base for each in promises if each.base)], key=lambda base: base.slot)
        last = max((number for each in promises for number in each.slots), default=0)
        found = [[each.slots[n] for each in promises if n in each.slots] for n in range(base.slot + 1, last + 1)]
        return base, [min(each, key=lambda slot: slot.epoch).command if each else Filler() for each in found]

    return [patch.object(proposer, "_behind", mistaken)]


def _folds_what_was_accepted_in_another_epoch() -> list[Any]:
    def mistaken(disk: Disk, chosen: int, _epoch: Epoch) -> None:
        while (following := disk.base.slot + 1) <= chosen and following in disk.slots:
            disk.base.apply(disk.slots.pop(following).command)

    return [patch.object(acceptor, "_fold", mistaken)]


def _lets_an_empty_disk_vote() -> list[Any]:
    def mistaken(disk: Disk, question: Any) -> Any:
        disk.votes = True
        return answer(disk, question)

    return [patch.object(acceptor, "answer", mistaken), patch.object(LogState, "counts", lambda *_: True)]


def _counts_a_write_that_a_minority_has_accepted() -> list[Any]:
    took = Proposer._took

    def mistaken(self: Any, said: Accepted) -> None:
        took(self, said)
        if self._command is not None and said.slot == self.state.slot + 1 and self.stage is Stage.OPEN:
            self._chose(self._command)

    return [patch.object(Proposer, "_took", mistaken)]


def _forgets_without_a_mark() -> list[Any]:
    apply = LogState.apply

    def mistaken(self: LogState, command: Any) -> None:
        apply(self, command)
        self.forgotten_ms = 0

    return [patch.object(LogState, "apply", mistaken)]


def _lets_an_older_disk_vote() -> list[Any]:
    def mistaken(self: QuorumWorld) -> None:
        name = self.dice.choice(sorted(self.backups or self.disks))
        self.disks[name] = self.backups.pop(name, self.disks[name])

    return [patch.object(QuorumWorld, "_lose_disk", mistaken)]


MUTANTS: list[Mutation] = [
    _accepts_what_it_has_promised_not_to,
    _forgets_its_promise,
    _adopts_only_what_a_quorum_of_the_answers_has,
    _writes_no_marker,
    _answers_before_what_it_has_read_is_accepted_again,
    _takes_an_old_value_for_the_latest,
    _folds_what_was_accepted_in_another_epoch,
    _lets_an_empty_disk_vote,
    _lets_an_older_disk_vote,
    _counts_a_write_that_a_minority_has_accepted,
    _forgets_without_a_mark,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__.strip("_").replace("_", " "))
def test_a_mistake_is_caught(mutant: Mutation) -> None:
    with ExitStack() as stack:
        for each in mutant():
            stack.enter_context(each)
        for seed in range(6_000):
            try:
                QuorumWorld(seed, Shape.of(seed) if seed % 2 else MOST_TELLING).run()
            except AssertionError as error:
                assert "committed, and aborted" in str(error) or "does not open" in str(error)  # noqa: PT017
                return
    pytest.fail("not caught")


# ------------------------------------------------------------------------------------------------------ single traces


class Group:
    """Three acceptors, and messages that arrive when a test says so."""

    def __init__(self) -> None:
        self.disks = {name: Disk(name) for name in THREE.acceptors}

    def epoch(self, epoch: Epoch, *reach: str) -> Proposer:
        """A proposer that has been answered by those that it reaches, until nothing more comes."""
        made = Proposer(epoch, THREE)
        self.carry(made, made.start(), reach)
        return made

    def carry(self, proposer: Proposer, out: Any, reach: tuple[str, ...]) -> list[Any]:
        """Deliver what *out* sends to those, and all that follows from it; returns every output."""
        outs, waiting = [out], list(out.send)
        while waiting:
            name, question = waiting.pop(0)
            if name in reach:
                outs.append(proposer.received(answer(self.disks[name], question)))
                waiting += outs[-1].send
        return outs

    def record(self, proposer: Proposer, xid: Xid, *reach: str) -> bool:
        """Whether the record is in the log for good."""
        outs = self.carry(proposer, proposer.propose(record(xid, proposer.epoch)), reach)
        return any(out.chosen is not None for out in outs)


def test_what_a_minority_had_accepted_and_nobody_read_stays_out_for_good() -> None:
    """V1 of the design's model: without the marker the third epoch would commit what the second one has called aborted."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert not group.record(first, X, "a0")
    second = group.epoch(E2, "a1", "a2")
    assert second.stage is Stage.OPEN
    assert X not in second.state.decisions
    third = group.epoch(E3, "a0", "a1")
    assert third.stage is Stage.OPEN
    assert X not in third.state.decisions
    assert list(third.state.epochs) == [E1, E2, E3]


def test_what_one_answer_has_is_accepted_again_before_anything_is_answered() -> None:
    """V3: what a minority had accepted is committed if it was read, and by the next epoch only when NW have it in that epoch."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert not group.record(first, X, "a0")
    second = Proposer(E2, THREE)
    asked = second.start().send
    outs = [second.received(answer(group.disks[name], question)) for name, question in asked[:2]]
    assert second.stage is Stage.OPENING
    assert not any(out.opened for out in outs)
    done = group.carry(second, outs[-1], ("a0", "a1"))
    assert any(out.opened for out in done)
    assert X in second.state.decisions


def test_who_is_fenced_after_it_has_proposed_does_not_know() -> None:
    """V4: a quorum cannot say that nothing was written."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert not group.record(first, X, "a0")
    group.epoch(E2, "a0", "a1")
    (late,) = [question for name, question in first.again().send if name == "a1"]
    out = first.received(answer(group.disks["a1"], late))
    assert (out.fenced, out.chosen, first.stage) == (E2, None, Stage.OVER)
    assert first.again().send == []
    with pytest.raises(AssertionError, match="one command at a time"):
        first.propose(Filler())


def test_a_lost_disk_is_let_in_by_a_command_that_the_others_accept_and_counts_only_then() -> None:
    """V7: until then it neither promises nor accepts, and what its predecessor has answered counts no more."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert group.record(first, X, "a0", "a1", "a2")
    group.disks["a2"] = Disk("a2", 2, votes=False)
    assert isinstance(answer(group.disks["a2"], Prepare(E2)), Refused)
    assert isinstance(answer(group.disks["a2"], Install(E2, first.state)), Refused)
    outs = group.carry(first, first.propose(Admit("a2", 2)), ("a0", "a1", "a2"))
    assert any(out.chosen == Admit("a2", 2) for out in outs)
    assert group.disks["a2"].votes
    assert X in group.disks["a2"].base.decisions
    second = group.epoch(E2, "a1", "a2")
    assert second.stage is Stage.OPEN
    assert X in second.state.decisions
    stale = Promise("a2", 1, E3, LogState(), {})
    third = Proposer(E3, THREE)
    third.start()
    third.received(answer(group.disks["a1"], Prepare(E3)))
    third.received(stale)
    assert third.stage is Stage.READING


def test_an_acceptor_that_has_missed_something_is_given_it() -> None:
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    for number in range(3):
        assert group.record(first, Xid(bytes(15) + bytes([number])), "a0", "a1")
    assert group.disks["a2"].base.slot == 0
    assert group.record(first, X, "a0", "a1", "a2")
    assert group.record(first, Y, "a0", "a1", "a2")
    assert group.disks["a2"].base.slot == first.state.slot - 1
    assert len(group.disks["a2"].base.decisions) == 4


def test_a_command_is_asked_again_of_those_that_have_not_answered() -> None:
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    first.propose(record(X))
    (question, *_) = [q for name, q in first.again().send if name == "a0"]
    first.received(answer(group.disks["a0"], question))
    assert sorted(name for name, _ in first.again().send) == ["a1", "a2"]


def test_what_is_accepted_is_folded_only_in_the_epoch_that_says_that_it_is_chosen() -> None:
    disk = Disk("a0")
    answer(disk, Accept(E1, 1, record(X), 0))
    answer(disk, Accept(E2, 2, record(Y, E2), 1))
    assert disk.base.slot == 0
    assert disk.slots[1] == Slot(E1, record(X))
    said = answer(disk, Accept(E1, 3, record(X), 2))
    assert isinstance(said, Refused)
    assert said.promised == E2


def test_one_that_was_admitted_and_has_not_heard_of_it_is_told_again_and_not_admitted_again() -> None:
    """Another admission would need all others once more, one of which may be dead by now."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    group.disks["a2"] = Disk("a2", 2, votes=False)
    group.carry(first, first.propose(record(X)), ("a0", "a1", "a2"))
    late = answer(group.disks["a2"], Prepare(E1, look=True))
    group.carry(first, first.propose(Admit("a2", 2)), ("a0", "a1"))
    out = first.received(late)
    assert not first.strangers
    assert [(name, type(question)) for name, question in out.send] == [("a2", Install)]
    group.carry(first, out, ("a2",))
    assert group.disks["a2"].votes
    assert group.record(first, Y, "a1", "a2")


def test_rule_15_an_epoch_from_beyond_all_numbers_is_not_promised() -> None:
    """A forged one would leave no numbers for those that follow; what a new disk is given is not measured."""
    group = Group()
    group.epoch(E1, "a0", "a1", "a2")
    disk = group.disks["a0"]
    forged = Epoch.make((1 << 31) - 1, 1)
    for question in (
        Prepare(forged),
        Accept(forged, 2, Filler(), 1),
        Learn(forged, 1),
        Install(forged, LogState(slot=9)),
    ):
        assert answer(disk, question) == Refused("a0", 1, forged, E1)
    assert (disk.promised, disk.base.slot, list(disk.slots)) == (E1, 0, [1])
    assert isinstance(answer(disk, Prepare(Epoch.make(1 + FURTHEST, 1))), Promise)
    new = Disk("a0", incarnation=7, votes=False)
    assert isinstance(answer(new, Install(forged, LogState(slot=9), 7)), Accepted)


def test_forgetting_leaves_a_mark() -> None:
    state = state_after(record(X), record(Y), Forget(frozenset({X}), 9), Filler())
    assert (state.slot, list(state.decisions), state.forgotten_ms, state.position) == (4, [Y], 9, 2)
    state.apply(record(Y))
    assert state.position == 2


def test_marks_of_done_travel_with_the_next_decisions() -> None:
    decision = record(Y).decisions[0]
    state = state_after(record(X), Record((decision,), done=(X, Y, Xid(bytes(16))), done_ms=70))
    assert state.done_ms == {X: 70, Y: 70}
    state.apply(Record((), done=(X,), done_ms=80))
    assert state.done_ms == {X: 70, Y: 70}
    state.apply(Forget(frozenset({X}), 75))
    assert state.done_ms == {Y: 70}


def test_incidents_are_kept_until_they_are_closed() -> None:
    one = Incident(X, BranchId(b"11111111"), "bank", FinishResult.LOST, 5)
    later = replace(one, at_ms=6)
    state = state_after(Report((one,)), Report((later,)))
    assert list(state.incidents.values()) == [later]
    state.apply(Report((), closed=((X, one.branch),)))
    assert not state.incidents


def test_rule_17_the_first_word_about_a_name_holds_until_an_operator_says_otherwise() -> None:
    state = state_after(Bind({"bank": "A", "shop": "S"}, {}), Bind({"bank": "B"}, {}))
    assert state.names == {"bank": "A", "shop": "S"}
    state.apply(Bind({}, {"bank": ""}))
    state.apply(Bind({"bank": "C"}, {}))
    assert state.names["bank"] == "C"


def test_what_a_copy_becomes_the_original_does_not() -> None:
    state = state_after(record(X), Marker(E1, "c2"), Admit("a2", 9))
    other = state.copy()
    assert other == state
    for command in (record(Y, E2), Marker(E2), Admit("a1", 7), Bind({"bank": "A"}, {})):
        other.apply(command)
    assert (list(state.decisions), list(state.epochs), state.incarnations, state.names) == ([X], [E1], {"a2": 9}, {})
    assert (state.epoch, state.holder, other.epoch) == (E1, "c2", E2)


def test_one_that_knows_a_prefix_is_told_only_what_comes_behind_it() -> None:
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert group.record(first, X, "a0", "a1", "a2")
    group.carry(first, first.learn(), ("a0", "a1", "a2"))
    said = answer(group.disks["a0"], Prepare(E2, first.state.slot))
    assert isinstance(said, Promise)
    assert (said.base, said.slots) == (None, {})
    second = Proposer(E2, THREE, known=first.state.copy())
    group.carry(second, second.start(), ("a1", "a2"))
    assert second.stage is Stage.OPEN
    assert X in second.state.decisions


def test_one_that_was_away_is_given_what_it_has_missed_though_nothing_new_comes() -> None:
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    assert group.record(first, X, "a0", "a1")
    group.carry(first, first.learn(), ("a0", "a1", "a2"))
    assert {disk.base.slot for disk in group.disks.values()} == {first.state.slot}


def test_a_disk_whose_answers_do_not_count_is_a_stranger_until_it_is_admitted() -> None:
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    group.disks["a2"] = Disk("a2", 2, votes=False)
    assert group.record(first, X, "a0", "a1", "a2")
    assert first.strangers == {"a2": 2}
    group.carry(first, first.propose(Admit("a2", 2)), ("a0", "a1", "a2"))
    assert not first.strangers
    assert group.record(first, Y, "a1", "a2")


def test_what_a_lost_disk_says_late_does_not_let_it_in_again() -> None:
    """It would take the place of the one that is there, which then needs all others once more to be let in."""
    group = Group()
    first = group.epoch(E1, "a0", "a1", "a2")
    out = first.propose(record(X))
    (question,) = [question for name, question in out.send if name == "a2"]
    late = answer(group.disks["a2"], question)
    group.carry(first, out, ("a0", "a1"))
    group.disks["a2"] = Disk("a2", 2, votes=False)
    group.carry(first, first.propose(Admit("a2", 2)), ("a0", "a1", "a2"))
    first.received(late)
    assert not first.strangers


@pytest.mark.parametrize(
    ("names", "reads", "writes", "says"),
    [
        (("a", "a"), 1, 2, "two acceptors have one name"),
        (("a", "b", "c"), 1, 2, "together they must be more than 3"),
        (("a", "b", "c"), 0, 3, "are not possible with 3 acceptors"),
        (("a", "b", "c"), 2, 4, "are not possible with 3 acceptors"),
        ((), 1, 1, "not possible"),
    ],
)
def test_quorums_that_could_miss_each_other_are_refused(
    names: tuple[str, ...], reads: int, writes: int, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Quorums(names, reads, writes)
