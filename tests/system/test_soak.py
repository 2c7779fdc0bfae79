"""A short soak passes; and each of its checks can fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.postgres import needs_own_server
from tests.proof import note_proof
from tests.system.soak import OPTIONS, Run, report
from tests.system.verdicts import Reading, Sample, Soak, verdicts
from tests.system.world import World

SECONDS = float(os.environ.get("TXRPC_SOAK_S", "60"))


@pytest.mark.proof
@pytest.mark.timeout(600)
@needs_own_server
def test_a_short_soak_passes(make_world: Callable[..., World], connected: Callable[[World], object]) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    world = make_world(options=OPTIONS)
    connected(world)
    run = Run(world, seed, SECONDS)
    judged = run.go()
    text = f"seed {seed}\n{report(run, judged)}"
    print(text)
    assert all(one.passed for one in judged), f"{text}\n{world.evidence()}"
    told = list(run.told.values())
    assert told.count("committed") > 50
    assert sum(run.faults.values()) >= 2  # chance has its say: a failpoint that is not reached in time is none
    note_proof("soak", seconds=round(run.now_s), transactions=len(told), faults=dict(run.faults))


# ----------------------------------------------------------------------------------------------- each check can fail


def fine() -> Soak:
    """An hour in which nothing was wrong."""
    samples = [Sample(at * 5.0, "c1", 7, 60.0, 12, 30) for at in range(60)]
    samples += [Sample(at * 5.0, "bank-a", 8, 80.0, 30, 40) for at in range(60)]
    readings = [Reading(at * 5.0, at % 10 > 5, 4_000.0, 2, 0, 0.2, at * 100) for at in range(60)]
    return Soak(samples, readings)


def failed(soak: Soak) -> list[str]:
    return [verdict.name for verdict in verdicts(soak) if not verdict.passed]


def test_a_good_soak_passes() -> None:
    assert failed(fine()) == []


def grow(soak: Soak, **more: float) -> None:
    """The coordinator takes ever more of something."""
    ((name, each),) = more.items()
    for number, sample in enumerate(soak.samples):
        if sample.process == "c1":
            soak.samples[number] = replace(
                sample, **{name: getattr(sample, name) + type(getattr(sample, name))(number * each)}
            )


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("memory", lambda soak: grow(soak, memory_mb=1.0)),
        ("threads", lambda soak: grow(soak, threads=1.5)),
        ("files and sockets", lambda soak: grow(soak, files=1.0)),
        ("log size", lambda soak: soak.readings.append(replace(soak.readings[-1], calm=False, log_kb=9_000.0))),
        (
            "in doubt",
            lambda soak: soak.readings.append(replace(soak.readings[-1], calm=True, oldest_s=25.0, committed=10**6)),
        ),
        (
            "progress",
            lambda soak: soak.readings.append(replace(soak.readings[-1], calm=True, at_s=soak.readings[-1].at_s + 10)),
        ),
        ("invariants", lambda soak: soak.broken.append("a cent is gone")),
        ("errors", lambda soak: soak.strange.append("KeyError: 'x'")),
        ("rest", lambda soak: soak.left.append("prepared [1, 0]")),
    ],
)
def test_each_check_can_fail(name: str, spoil: Callable[[Soak], None]) -> None:
    soak = fine()
    spoil(soak)
    assert failed(soak) == [name]
