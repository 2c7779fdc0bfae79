"""The command line of ``txrpc bench``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # the other commands load none of that
    from txrpc.cli.bench.run import Measured

__all__ = ["bench"]


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
    from rich.console import Console

    from txrpc.cli.bench.report import LABELS, show
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
                shown.update(f"{len(runs)} of {total} measured; {LABELS[run.form]}: {run.rate:.0f} a second")
    except (grpc.RpcError, TransactionAborted) as error:
        click.echo(f"txrpc: a transfer failed: {error}", err=True)
        sys.exit(1)
    except TxrpcError as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(2)
    show(runs, console)
