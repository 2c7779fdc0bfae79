"""Every mistake in `mutants` wakes a checker: a check that never fails proves nothing."""

from __future__ import annotations

import pytest

from tests.proof import note_proof
from verification import mutants_deciding
from verification.mutants import MUTANTS, Mutant
from verification.replay import report
from verification.simulation import Options, simulate
from verification.simulation.history import Violation

assert mutants_deciding.__all__ == []  # it enters its own into the same list
MOST = 3_000
DEAR = (
    "lets late calls in",
    "listens to an epoch that is over",
    "forgets that it has given the right to decide away",
    "claims in another incarnation than it decided in",
)
"""Those that take hundreds of worlds."""
_DEAR = [pytest.mark.proof, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, id=mutant.name, marks=_DEAR if mutant.name in DEAR else []) for mutant in MUTANTS],
)
def test_the_simulator_catches(mutant: Mutant) -> None:
    with mutant.made():
        for seed in range(MOST):
            run = simulate(seed, mutant.world or Options.of(seed))
            if run.violation is not None:
                break
    # An invariant of the code itself may be the first that objects: a log refuses a second decision about one transaction.
    assert isinstance(run.violation, Violation | AssertionError), run.violation or f"not caught by {MOST} seeds"
    caught_by = run.violation.rule if isinstance(run.violation, Violation) else mutant.breaks
    assert caught_by in mutant.rules, report(run)
    note_proof("mutant", name=mutant.name, breaks=mutant.breaks, seeds=seed + 1, caught_by=caught_by)


def test_there_is_a_mutant_for_every_rule() -> None:
    assert {mutant.breaks for mutant in MUTANTS} == {*range(1, 16), 17, 18, 21}


def test_without_a_mistake_the_same_seeds_are_clean() -> None:
    assert all(simulate(seed).violation is None for seed in range(50))
