"""Every interleaving of small worlds, with one crash and one lost or repeated message; and that a mistake would be found."""

from __future__ import annotations

import pytest

from tests.proof import note_proof
from txrpc.testing.explorer import STORIES, Budget, explore

OUTCOMES = {
    "two that write": {"COMMITTED", "ABORTED", "nobody asked"},
    "one that writes": {"COMMITTED", "ABORTED", "UNKNOWN", "nobody asked"},
    "one of two only reads": {"COMMITTED", "ABORTED", "nobody asked"},
    "one of two refuses": {"ABORTED", "nobody asked"},
    "both vote early": {"COMMITTED", "ABORTED", "nobody asked"},
    "both vote early, the root gives up": {"ABORTED", "nobody asked"},
}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("budget", [Budget(1, 0), Budget(0, 1), Budget(0, 0, 1)], ids=["crash", "message", "deadline"])
def test_every_interleaving_ends_in_agreement(story: str, budget: Budget) -> None:
    found = explore(story, budget)
    assert found.outcomes <= OUTCOMES[story]
    assert found.ends > 0
    note_proof(
        "explorer",
        story=story,
        crashes=budget.crashes,
        messages=budget.messages,
        early=budget.early,
        states=found.states,
        steps=found.steps,
    )


def test_a_crash_reaches_every_outcome_that_there_is() -> None:
    for story, outcomes in OUTCOMES.items():
        if story != "two that write":
            assert explore(story, Budget(1, 0)).outcomes == outcomes
