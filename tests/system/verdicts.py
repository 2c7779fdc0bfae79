"""What a soak's measurements mean.  Pure: measurements go in, verdicts come out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

__all__ = ["Reading", "Sample", "Soak", "Verdict", "verdicts"]

MEMORY_GROWTH, MEMORY_SLACK_MB = 1.15, 8.0
THREADS_SLACK, FILES_SLACK = 24, 24
LOG_GROWTH, LOG_SLACK_KB = 1.5, 2_048
IN_DOUBT_MAX_S = 20.0
"""While nothing is broken, and some seconds after that was so."""
STILL_MAX_S = 5.0
"""Without a commit while nothing is broken."""
LIFE_MIN = 12
"""Samples of one life of a process, below which its growth cannot be judged."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    at_s: float
    process: str
    life: int
    """Its process id: another one after each restart."""
    memory_mb: float
    threads: int
    files: int


@dataclass(frozen=True, slots=True)
class Reading:
    """The coordinator at one moment."""

    at_s: float
    calm: bool
    """Whether nothing has been broken for some seconds."""
    log_kb: float
    open: int
    in_doubt: int
    oldest_s: float
    committed: int
    """So far, as the clients were told."""


@dataclass(slots=True)
class Soak:
    """Everything that was measured."""

    samples: list[Sample] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Invariants that did not hold."""
    strange: list[str] = field(default_factory=list)
    """Errors that clients got and that are not documented."""
    left: list[str] = field(default_factory=list)
    """What was not at rest in the end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check."""

    name: str
    passed: bool
    text: str


def verdicts(soak: Soak) -> list[Verdict]:
    """All checks."""
    return [
        _growth(soak, "memory", "memory_mb", lambda early: early * MEMORY_GROWTH + MEMORY_SLACK_MB, "MB"),
        _growth(soak, "threads", "threads", lambda early: early + THREADS_SLACK, ""),
        _growth(soak, "files and sockets", "files", lambda early: early + FILES_SLACK, ""),
        _log(soak.readings),
        _doubts(soak.readings),
        _progress(soak.readings),
        _none("invariants", soak.broken, "money, both journals and what clients were told agree"),
        _none("errors", soak.strange, "clients got documented errors only"),
        _none("rest", soak.left, "nothing prepared, locked or open in the end"),
    ]


def _growth(soak: Soak, name: str, what: str, bound: object, unit: str) -> Verdict:
    """In the longest life of each process: the last quarter against the second one (the first is warming up)."""
    judged, passed = [], True
    for process, samples in sorted(_longest_lives(soak.samples).items()):
        if len(samples) < LIFE_MIN:
            continue
        values = [float(getattr(sample, what)) for sample in samples]
        quarter = len(values) // 4
        early, late = median(values[quarter : 2 * quarter]), median(values[-quarter:])
        assert callable(bound)
        passed = passed and late <= bound(early)
        judged.append(f"{process} {early:.0f} -> {late:.0f}{unit and ' '}{unit}")
    return Verdict(name, passed, ", ".join(judged) or "no process lived long enough to judge")


def _longest_lives(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.process, sample.life].append(sample)
    longest: dict[str, list[Sample]] = {}
    for (process, _), life in lives.items():
        if len(life) > len(longest.get(process, [])):
            longest[process] = life
    return longest


def _log(readings: Sequence[Reading]) -> Verdict:
    half = len(readings) // 2
    if half < LIFE_MIN // 2:
        return Verdict("log size", True, "too short to judge")
    early, late = (max(reading.log_kb for reading in part) for part in (readings[:half], readings[half:]))
    text = f"at most {early:,.0f} KB in the first half, {late:,.0f} KB in the second"
    return Verdict("log size", late <= early * LOG_GROWTH + LOG_SLACK_KB, text)


def _doubts(readings: Sequence[Reading]) -> Verdict:
    calm = [reading.oldest_s for reading in readings if reading.calm]
    anyhow = max((reading.oldest_s for reading in readings), default=0.0)
    text = f"the oldest was {max(calm, default=0):.1f} s while all was well, {anyhow:.1f} s at any time"
    return Verdict("in doubt", bool(calm) and max(calm) <= IN_DOUBT_MAX_S, text)


def _progress(readings: Sequence[Reading]) -> Verdict:
    pairs = [(one, other) for one, other in pairwise(readings) if one.calm and other.calm]
    still_s = longest_s = 0.0
    for one, other in pairs:
        still_s = still_s + other.at_s - one.at_s if other.committed == one.committed else 0.0
        longest_s = max(longest_s, still_s)
    total = readings[-1].committed if readings else 0
    seconds = readings[-1].at_s - readings[0].at_s if len(readings) > 1 else 1.0
    text = (
        f"{total:,} committed, {total / seconds:.1f} a second; at most {longest_s:.1f} s without one while all was well"
    )
    return Verdict("progress", bool(pairs) and longest_s <= STILL_MAX_S, text)


def _none(name: str, wrong: Sequence[str], fine: str) -> Verdict:
    return Verdict(name, not wrong, "; ".join(wrong[:5]) or fine)
