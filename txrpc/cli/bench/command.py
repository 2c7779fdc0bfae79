"""The command line of ``txrpc bench``, and what it shows."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # the other commands need no database's driver
    from txrpc.cli.bench.run import Measured

__all__ = ["bench"]

_LABELS = {
    "alone": "each service commits alone",
    "two-phase": "a transaction",
    "final calls": "with final calls",
}


@click.command()
@click.argument("first", metavar="URL")
@click.argument("second", metavar="URL")
@click.option("--clients", type=click.IntRange(1, 200), default=8, show_default=True, help="At one time.")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=3.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Measurements of each form.")
def bench(first: str, second: str, clients: int, seconds: float, rounds: int) -> None:
    """Measure what txrpc costs on your databases: two URLs of SQLAlchemy's, of two PostgreSQL databases.

    A transfer between two services, one UPDATE and one INSERT a side, with and without a transaction, in turns: by one client, and
    by many.  Services, clients and a coordinator run here; run this where yours would.  The tables are in a schema of their own,
    txrpc_bench, which is dropped at the end.  Each service opens up to twice as many connections as there are clients, and a few.

    Exit code 2 if a database cannot take part, 1 if a transfer fails.
    """
    import grpc

    from txrpc.cli.bench.run import FORMS, measure
    from txrpc.errors import TransactionAborted, TxrpcError

    console = Console()
    numbers = sorted({1, clients})
    total = rounds * len(numbers) * len(FORMS)
    runs: list[Measured] = []
    try:
        with console.status("starts a coordinator and two services") as shown:
            for run in measure((first, second), numbers, seconds, rounds):
                runs.append(run)
                shown.update(f"{len(runs)} of {total} measured; {_LABELS[run.form]}: {run.rate:.0f} a second")
    except (grpc.RpcError, TransactionAborted) as error:
        click.echo(f"txrpc: a transfer failed: {error}", err=True)
        sys.exit(1)
    except TxrpcError as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(2)
    wide = Console(width=max(100, console.width))
    for number in numbers:
        _show([run for run in runs if run.customers == number], wide)
    wide.print(_meaning([run for run in runs if run.customers == 1]), highlight=False, soft_wrap=True)


def _show(runs: Sequence[Measured], console: Console) -> None:
    """Print medians of the rounds, with ranges."""
    by = f"{runs[0].customers} client{'s' * (runs[0].customers > 1)}"
    table = Table(title=f"a transfer between two databases, {by}", title_justify="left")
    for number, column in enumerate(("", "a second", "ratio", "median ms", "p99 ms")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    base = _of(runs, "alone")
    for form, label in _LABELS.items():
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
