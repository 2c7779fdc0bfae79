"""``python -m verification.simulate --seeds 1000000``: many simulated worlds, on all processors, until one breaks a rule."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from verification.replay import report
from verification.simulation import simulate

__all__ = ["Tally", "main", "run_seeds"]

_CHUNK = 50


@dataclass
class Tally:
    """What came of many seeds."""

    seeds: int = 0
    steps: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[int] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take *other* in."""
        self.seeds += other.seeds
        self.steps += other.steps
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.broken += other.broken


def run_seeds(seeds: Iterable[int]) -> Tally:
    """Run *seeds* one after another, all of them."""
    tally = Tally()
    for seed in seeds:
        run = simulate(seed)
        tally.seeds += 1
        tally.steps += run.steps
        tally.outcomes += run.outcomes
        tally.faults += run.faults
        if run.violation is not None:
            tally.broken.append(seed)
    return tally


def _chunks(start: int, seeds: int) -> Iterator[range]:
    for low in range(start, start + seeds, _CHUNK):
        yield range(low, min(low + _CHUNK, start + seeds))


@click.command()
@click.option("--seeds", default=20_000, show_default=True, help="How many.")
@click.option("--start", default=0, show_default=True, help="The first one.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Processes.")
def main(seeds: int, start: int, workers: int) -> None:
    """Run SEEDS simulated worlds; exit code 1 and a readable trace if one breaks a rule."""
    total, began = Tally(), time.monotonic()
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with multiprocessing.get_context("spawn").Pool(workers) as pool, Progress(*columns) as progress:
        bar = progress.add_task("", total=seeds)
        for tally in pool.imap_unordered(run_seeds, _chunks(start, seeds)):
            total.add(tally)
            progress.update(bar, advance=tally.seeds)
            if total.broken:
                break
    if total.broken:
        seed = min(total.broken)
        click.echo(report(simulate(seed, trace=True)))
        click.echo(f"\nagain: python -m verification.replay {seed}")
        sys.exit(1)
    ended = ", ".join(f"{count:,} {name}" for name, count in sorted(total.outcomes.items()))
    faults = ", ".join(f"{count:,} x {name}" for name, count in sorted(total.faults.items()))
    click.echo(f"{total.seeds:,} worlds, {total.steps:,} steps in {time.monotonic() - began:.0f} s: no rule was broken")
    click.echo(f"transactions: {ended}\nfaults: {faults}")


if __name__ == "__main__":
    main()
