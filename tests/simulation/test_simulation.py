"""A hundred thousand simulated worlds, each with faults of its own, and every rule watched from outside."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from tests.proof import note_proof
from verification.replay import report
from verification.simulate import run_seeds
from verification.simulation import Options, simulate
from verification.simulation.checkers import LateMessages, all_checkers
from verification.simulation.cluster import Cluster
from verification.simulation.history import FACTS, Violation


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand broken worlds have a lot to say."""
    caplog.set_level(logging.CRITICAL, "txrpc")


CHUNK = 1_000
FEW, MANY, MORE = 1_000, 5_000, 100_000
"""Seeds in `make test`, in CI as well, and in `make proof`."""


def _marks(start: int) -> list[pytest.MarkDecorator]:
    marks = [(FEW, pytest.mark.proof), (MANY, pytest.mark.long)]
    return [mark for bound, mark in marks if start >= bound]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("start", [pytest.param(start, marks=_marks(start)) for start in range(0, MORE, CHUNK)])
def test_no_world_breaks_a_rule(start: int) -> None:
    tally = run_seeds(range(start, start + CHUNK))
    for seed in tally.broken[:1]:
        pytest.fail(report(simulate(seed, trace=True)) + f"\nagain: python -m verification.replay {seed}")
    assert tally.outcomes["committed"] > CHUNK, "worlds in which hardly anything commits prove little"
    assert tally.outcomes["unknown"] < tally.outcomes["committed"] / 10
    note_proof(
        "simulator", start=start, seeds=tally.seeds, steps=tally.steps, outcomes=tally.outcomes, faults=tally.faults
    )


def test_every_fault_happens_and_every_option_is_drawn() -> None:
    tally = run_seeds([*range(200), 669])  # a write is overtaken in few worlds
    counted = {
        "partition",
        "one-way partition",
        "process crash",
        "client death",
        "coordinator crash",
        "takeover",
        "freeze",
    }
    databases = {"database crash", "log restore", "log brought back", "fail-over", "hand", "misname"}
    databases |= {"branch of a lost decision"}
    several = {"coordinator death", "usurpation", "lost disk", "change of members"}
    others = {"clock jump", "drift", "sleep", "forgery", "late request", "overtaken write"}
    assert counted | databases | several | others == set(tally.faults)
    drawn = {
        name
        for seed in range(200)
        for name in Options.__slots__
        if getattr(Options.of(seed), name) != getattr(Options(), name)
    }
    assert set(Options.__slots__) - drawn == {"nested", "own_resource", "trouble_ms"}


def test_a_group_that_is_whole_is_as_good_as_one_disk() -> None:
    for seed in range(30):
        run = simulate(seed, Options(gives_up=0, refuses=0, transactions=2, nodes=3, group=True))
        assert run.violation is None
        assert run.outcomes["committed"] >= 3
        assert run.outcomes["unknown"] == 0


def test_a_group_commits_while_its_members_lose_each_other_and_their_disks() -> None:
    """The real log of a group, over real acceptors and the bytes on their way, under the whole cluster."""
    broken = Options(
        nodes=3, group=True, member_cuts=0.3, disk_losses=2, view_changes=4, usurpations=3, coordinator_crashes=3
    )
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for seed in range(100):
        run = simulate(seed, broken)
        assert run.violation is None, report(run)
        outcomes.update(run.outcomes)
        faults.update(run.faults)
    assert outcomes["committed"] > 300
    assert faults["lost disk"] > 30
    assert faults["change of members"] > 30


def test_without_faults_everything_commits_that_was_not_given_up() -> None:
    for seed in range(100):
        run = simulate(seed, Options(gives_up=0, refuses=0, transactions=2))
        assert run.violation is None
        # A deadline of half a second can be too short even for a fast world.
        assert run.outcomes["committed"] >= 3
        assert run.outcomes["unknown"] == 0


def test_every_fact_has_a_checker_that_listens() -> None:
    heard = {fact for fact in FACTS for checker in all_checkers() if hasattr(checker, fact)}
    assert heard == set(FACTS)


def test_a_call_that_still_runs_when_its_transaction_ends_is_not_a_late_one() -> None:
    """Seed 96578 of an earlier world: a repeated call wrote in a branch that had just voted against because of it."""
    checker = LateMessages()
    checker.wrote(0, "x", "b1", "call 1", "p")
    checker.wrote(1, "x", "b2", "call 2", "p")
    checker.prepared(2, "x", "b1")
    checker.wrote(3, "x", "b2", "call 2", "p")
    with pytest.raises(Violation, match="rule 10"):
        checker.wrote(4, "x", "b1", "call 1", "p")
    with pytest.raises(Violation, match="rule 10"):
        checker.wrote(5, "x", "b3", "call 3", "p")


_DIGEST = """
import hashlib
from verification.simulation import simulate
digest = hashlib.sha256()
for seed in range(40):
    digest.update(repr(simulate(seed, trace=True).lines).encode())
print(digest.hexdigest())
"""


def test_a_seed_is_the_same_world_in_every_process() -> None:
    digests = set()
    for hashing in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hashing}
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        digests.add(done.stdout)
    here = hashlib.sha256()
    for seed in range(40):
        here.update(repr(simulate(seed, trace=True).lines).encode())
    assert digests == {here.hexdigest() + "\n"}


def test_a_database_that_decides_is_as_good_as_a_log() -> None:
    """No coordinator writes anything down, and all commits."""
    calm = Options(gives_up=0, refuses=0, transactions=2, decides=1.0, own_resource=0.4)
    for seed in range(60):
        run = simulate(seed, calm)
        assert run.violation is None, report(run)
        assert run.outcomes["committed"] >= 3
        assert run.outcomes["unknown"] == 0
        run = simulate(seed, replace(calm, final_calls=1.0))
        assert run.violation is None, report(run)
        assert run.outcomes["unknown"] == 0


ELSEWHERE = Options(
    databases=3, services=3, clients=3, calls=2, transactions=4, final_calls=1.0, decides=1.0, nested=0, own_resource=0
)
"""Many a root has to let its last call decide, because it does not reach the database itself."""


def test_a_last_call_decides_and_what_became_of_it_is_learnt() -> None:
    broken = replace(
        ELSEWHERE, nodes=2, crashes=4, coordinator_crashes=2, database_crashes=3, loss=0.03, freezes=3, cut_prepares=0.2
    )
    outcomes: Counter[str] = Counter()
    for seed in range(60):
        calm = simulate(seed, ELSEWHERE)
        assert calm.violation is None, report(calm)
        assert calm.outcomes["unknown"] == 0
        run = simulate(seed, broken)
        assert run.violation is None, report(run)
        outcomes.update(run.outcomes)
    assert outcomes["committed"] > 50


def test_a_decision_outlives_whatever_dies() -> None:
    broken = Options(
        nodes=3,
        decides=1.0,
        own_resource=0.4,
        final_calls=0.5,
        crashes=4,
        coordinator_crashes=3,
        usurpations=2,
        database_crashes=3,
        loss=0.05,
        duplication=0.1,
        late_requests=10,
    )
    facts: Counter[str] = Counter()
    for seed in range(100):
        cluster = Cluster(seed, broken)
        rows = [database.register.rows for database in cluster.databases]
        cluster.run()
        facts.update("committed" if row[0] else "claimed" for each in rows for row in each.values())
    assert facts["committed"] > 100
    assert facts["claimed"] > 10
