"""What was measured, for people."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from txrpc.cli.bench.run import Measured

__all__ = ["LABELS", "show"]

LABELS = {
    "alone": "each service commits alone",
    "two-phase": "a transaction",
    "final calls": "with final calls",
    "a database decides": "one of the databases decides",
}


def show(runs: Sequence[Measured], console: Console) -> None:
    """Print a table for each number of clients, and what they mean."""
    wide = Console(width=max(100, console.width))
    for number in sorted({run.customers for run in runs}):
        _show([run for run in runs if run.customers == number], wide)
    wide.print(_meaning([run for run in runs if run.customers == 1]), highlight=False, soft_wrap=True)


def _show(runs: Sequence[Measured], console: Console) -> None:
    """Print medians of the rounds, with ranges."""
    by = f"{runs[0].customers} client{'s' * (runs[0].customers > 1)}"
    table = Table(title=f"a transfer between two databases, {by}", title_justify="left")
    for number, column in enumerate(("", "a second", "ratio", "median ms", "p99 ms")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    base = _of(runs, "alone")
    for form, label in LABELS.items():
        series = _of(runs, form)
        ratios = [run.rate / each.rate for run, each in zip(series, base, strict=True)]
        table.add_row(
            label,
            _range((run.rate for run in series), 0),
            "" if form == "alone" else _range(ratios, 2),
            _range((run.percentile_ms(50) for run in series), 1),
            _range((run.percentile_ms(99) for run in series), 1),
        )
    console.print(table)


def _meaning(runs: Sequence[Measured]) -> str:
    alone, together = (
        statistics.median(run.percentile_ms(50) for run in _of(runs, form)) for form in ("alone", "two-phase")
    )
    return (
        f"On its own a transaction takes {together - alone:.1f} ms more than the same two calls without one. With many clients, "
        f"they, the services and the coordinator share {os.cpu_count()} processors: the ratio is one of processor time."
    )


def _of(runs: Sequence[Measured], form: str) -> list[Measured]:
    return [run for run in runs if run.form == form]


def _range(values: Iterable[float], digits: int) -> str:
    found = sorted(values)
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(found), found[0], found[-1]))
    return middle if low == high else f"{middle} ({low}-{high})"
