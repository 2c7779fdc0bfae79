"""Every interleaving of small worlds, with one crash and one lost or repeated message; and that a mistake would be found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.proof import note_proof
from txrpc._protocol.coordinator import registers
from verification import mutants_deciding
from verification.explorer import DECIDED, STORIES, Budget, Explored, Mistake, explore
from verification.explorer_model import SmallWorld
from verification.mutants import MUTANTS

assert mutants_deciding.__all__ == []  # it enters its own into the same list
OUTCOMES = {
    "two that write": {"COMMITTED", "ABORTED", "not asked"},
    "one that writes": {"COMMITTED", "ABORTED", "UNKNOWN", "not asked"},
    "one of two only reads": {"COMMITTED", "ABORTED", "not asked"},
    "one of two refuses": {"ABORTED", "not asked"},
    "both vote early": {"COMMITTED", "ABORTED", "not asked"},
    "both vote early, the root gives up": {"ABORTED", "not asked"},
    "the ledger decides": {"COMMITTED", "ABORTED", "not asked"},
    "the ledger decides when all have voted": {"COMMITTED", "ABORTED", "not asked"},
    "the ledger is to decide, the root gives up": {"ABORTED"},
    "a service decides": {"COMMITTED", "ABORTED", "not asked"},
    "a register decides, without work": {"COMMITTED", "ABORTED", "not asked"},
}


DEAR = (
    "two that write",
    "one of two refuses",
    "one of two only reads",
    "the ledger decides",
    "the ledger decides when all have voted",
    "a register decides, without work",
)
"""Stories in which a crash can come at very many moments."""


def _note(story: str, budget: Budget, found: Explored) -> None:
    note_proof(
        "explorer",
        story=story,
        crashes=budget.crashes,
        messages=budget.messages,
        early=budget.early,
        takeovers=budget.takeovers,
        failovers=budget.failovers,
        states=found.states,
        steps=found.steps,
    )


@pytest.mark.parametrize(
    ("story", "budget"),
    [
        pytest.param(
            story,
            budget,
            id=f"{kind}-{story}",
            marks=[pytest.mark.proof] if kind == "crash" and story in DEAR else [],
        )
        for kind, budget in (("crash", Budget(1, 0)), ("message", Budget(0, 1)), ("deadline", Budget(0, 0, 1)))
        for story in STORIES
    ],
)
def test_rule_1_every_interleaving_ends_in_agreement(story: str, budget: Budget) -> None:
    found = explore(story, budget)
    assert found.outcomes <= OUTCOMES[story]
    if budget.crashes:
        assert found.outcomes == OUTCOMES[story], "a crash can bring about every outcome that there is"
    assert found.ends > 0
    _note(story, budget, found)


@pytest.mark.proof
@pytest.mark.timeout(1_500)
@pytest.mark.parametrize(
    "story",
    [
        "one that writes",
        *[pytest.param(story, marks=pytest.mark.long) for story in STORIES if story != "one that writes"],
    ],
)
def test_every_interleaving_with_a_crash_and_a_lost_or_repeated_message_ends_in_agreement(story: str) -> None:
    test_rule_1_every_interleaving_ends_in_agreement(story, Budget(1, 1))


@pytest.mark.timeout(1_500)
@pytest.mark.parametrize(
    "story",
    [
        "one that writes",
        pytest.param("one of two only reads", marks=pytest.mark.proof),
        *[
            pytest.param(story, marks=[pytest.mark.proof, pytest.mark.long])
            for story in STORIES
            if story not in ("one that writes", "one of two only reads")
        ],
    ],
)
def test_rule_7_a_coordinator_may_be_taken_over_while_it_sleeps_in_the_middle_of_anything(story: str) -> None:
    """Two coordinators on one log: what the sleeper was writing had got there, or comes too late; it wakes up at any time."""
    test_rule_1_every_interleaving_ends_in_agreement(story, Budget(0, 0, takeovers=1))


@pytest.mark.timeout(1_500)
@pytest.mark.parametrize(
    ("story", "budget"),
    [
        pytest.param(story, replace(others, failovers=1), id=f"{story}-{kind}", marks=marks)
        for kind, others, marks in (
            ("alone", Budget(0, 0), []),
            ("message", Budget(0, 1), [pytest.mark.proof]),
            ("deadline", Budget(0, 0, 1), [pytest.mark.proof, pytest.mark.long]),
            ("crash", Budget(1, 0), [pytest.mark.proof, pytest.mark.long]),
        )
        for story in DECIDED
    ],
)
def test_rule_16_a_standby_may_take_over_the_database_that_decides_with_its_latest_decision_or_without(
    story: str, budget: Budget
) -> None:
    """What was not decided before cannot be after it; where a decision may be lost, an operator is called, and only there."""
    found = explore(story, budget)
    assert found.outcomes <= OUTCOMES[story] | {"UNKNOWN"}
    _note(story, budget, found)


MISTAKES = {
    "tells before the decision is durable": ("two that write", Budget(0, 0)),
    "marks the record done at the decision": ("two that write", Budget(1, 0)),
    "takes a vote against for a vote for": ("one of two refuses", Budget(0, 0)),
    "rolls back a prepared branch at its deadline": ("both vote early", Budget(0, 0, 1)),
    "lets unprepared branches live for ever": ("one of two refuses", Budget(0, 1)),
    "guesses how a commit in one phase ended": ("one that writes", Budget(1, 0)),
    "remembers nothing of what has ended": ("both vote early", Budget(0, 1)),
    "answers a question about a running transaction with presumed abort": ("both vote early", Budget(1, 0)),
    "does not take up what the log has pending": ("two that write", Budget(1, 0)),
    "calls a slow commit aborted": ("two that write", Budget(0, 0, 2)),
    "counts a lost voter as read only": ("two that write", Budget(0, 1)),
    "calls a decision done before all have committed": ("the ledger decides", Budget(0, 0)),
    "presumes abort where there is no row": ("the ledger decides", Budget(0, 0, 1)),
    "gives a promise up at its deadline": ("the ledger decides", Budget(0, 0, 1)),
    "never asks under a register": ("the ledger is to decide, the root gives up", Budget(0, 1)),
    "has it decided before all have voted": ("a service decides", Budget(0, 0)),
    "calls it aborted when the decider does not answer": ("a service decides", Budget(1, 0)),
    "forgets that it has given the right to decide away": ("a service decides", Budget(1, 1)),
    "asks for ever for what other hands have ended": ("the ledger decides", Budget(0, 0, failovers=1)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_explorer_finds_mistakes_as_well(name: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    with mutant.made(), pytest.raises(Mistake) as caught:
        explore(*MISTAKES[name], most=20_000)
    note_proof("explorer mutant", name=name, breaks=mutant.breaks, steps=len(caught.value.way))


def _writes_though_its_epoch_is_over(self: SmallWorld, coordinator: Any, decisions: Any) -> None:
    self.log.update({decision.xid: decision for decision in decisions})
    self._job_heard(coordinator, decisions)


def _is_listened_to_though_its_epoch_is_over(self: SmallWorld, session: int) -> None:
    if session in self.links:
        link = self.links[session]
        link.peer.take(link.down.popleft())


@pytest.mark.parametrize(
    ("job", "mistaken", "story", "said"),
    [
        pytest.param(
            "_job_log",
            _writes_though_its_epoch_is_over,
            "one of two only reads",
            "said both",
            marks=pytest.mark.proof,
        ),
        ("_job_down", _is_listened_to_though_its_epoch_is_over, "one that writes", "the way there"),
    ],
)
def test_the_explorer_finds_a_sleeper_that_is_not_stopped(
    job: str, mistaken: Any, story: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallWorld, job, mistaken)
    with pytest.raises(Mistake, match=said):
        explore(story, Budget(0, 0, takeovers=1), most=20_000)


def test_the_explorer_finds_an_operator_who_is_called_while_it_is_being_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A branch was called one of a lost decision although this coordinator knew it, or was waiting for it to be made."""
    tell = registers._cannot_tell
    final = {registers._UNKNOWN[found] for found in registers._REFUSED}

    def mistaken(state: Any, session: int, message: Any, text: str, refused: bool = False) -> None:
        tell(state, session, message, text, text in final)

    monkeypatch.setattr(registers, "_cannot_tell", mistaken)
    with pytest.raises(Mistake, match="an operator is called, and it is deciding here"):
        explore("a register decides, without work", Budget(0, 0, 1, failovers=1), most=20_000)


def test_a_mistake_comes_with_the_shortest_way_to_it() -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "tells before the decision is durable"]
    with mutant.made(), pytest.raises(Mistake) as caught:
        explore("two that write", Budget(0, 0))
    lines = str(caught.value).splitlines()
    assert "said before it was durable" in lines[0]
    assert lines[1] == "the way there:"
    assert lines[2].strip() == "1. CommitRequest from the client"
    assert "Voted from db" in lines[-1]
