"""The command line: ``txrpc coordinator``, ``txrpc status``, ``txrpc close``, ``txrpc rebind``, ``txrpc group``,
``txrpc bench``, ``txrpc version``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from txrpc.cli.bench import bench
from txrpc.cli.membership import group
from txrpc.cli.options import config_options
from txrpc.cli.reach import Reach, reach_options

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Transactions over several gRPC services and their databases."""


main.add_command(group)
main.add_command(bench)


@main.command()
@config_options
@click.option("--config", "file", metavar="FILE", help="A TOML file with the same options.")
def coordinator(file: str | None, **given: Any) -> None:
    """Run a coordinator until SIGTERM or SIGINT.

    Every option may also be an environment variable (TXRPC_MAX_BRANCHES) or a key of the TOML file (max_branches);
    a flag wins over the environment, and that over the file.

    \b
    Exit codes:
      0  told to stop        3  the decision log cannot be opened
      1  an error in txrpc   4  fenced: a later coordinator has opened the log
      2  bad configuration   5  cannot listen
                             6  the log has lost decisions
                             7  removed from the group
    """  # noqa: D301  (click: what follows the backspace is not wrapped)
    from txrpc._coordinator import logging_setup
    from txrpc._coordinator.config import load
    from txrpc._coordinator.server import MISCONFIGURED, run
    from txrpc.errors import ConfigurationError

    try:
        config = load({key: value for key, value in given.items() if value is not None}, os.environ, file)
    except ConfigurationError as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(MISCONFIGURED)
    logging_setup.set_up(config.log_format, config.log_level)
    sys.exit(run(config))


@main.command()
@reach_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    help="Transactions to list, oldest first.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3_600),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the coordinator.",
)
def status(reach: Reach, as_json: bool, limit: int, timeout: float) -> None:
    """Show a coordinator: its log, who is connected, and every transaction that is not finished, with the reason.

    Exit code 1 if it does not answer.
    """
    from txrpc.cli import overview

    if timeout != timeout:  # not a number: no range holds it, and click lets it through
        raise click.BadParameter("nan is not a number of seconds", param_hint="--timeout")

    try:
        reply = overview.ask(reach, limit, timeout)
    except overview.NoAnswer as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(overview.as_dict(reply), indent=2))
    else:
        overview.show(reply, reach.address)


@main.command()
@click.argument("transaction", metavar="TRANSACTION")
@click.option("--branch", metavar="BRANCH", default="", help="Only this branch, as status --json shows it.")
@reach_options
def close(transaction: str, branch: str, reach: Reach) -> None:
    """Close the incidents of a TRANSACTION (as ``txrpc status`` shows it) whose branches did not end as it did.

    Do this when the data is as it should be: a branch that is lost, or not where it was, then counts as finished.
    Exit code 1 if the coordinator does not answer, or has no such incident.
    """
    from txrpc.cli import overview

    try:
        xid, branch_id = bytes.fromhex(transaction), bytes.fromhex(branch)
    except ValueError:
        raise click.BadParameter("a transaction and a branch are hexadecimal numbers, as status shows them") from None
    try:
        closed = overview.close(reach, xid, branch_id, 5.0)
    except overview.NoAnswer as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(1)
    click.echo(f"{closed} closed" if closed else f"no incident of transaction {transaction} is open")
    sys.exit(0 if closed else 1)


@main.command()
@click.argument("name", metavar="RESOURCE")
@click.argument("identity", metavar="[IDENTITY]", default="")
@reach_options
def rebind(name: str, identity: str, reach: Reach) -> None:
    """Let the name of a RESOURCE mean another database, e.g. after it was moved with dump and restore.

    IDENTITY is what the refusal of the new one names; without it the next database that is announced is taken.
    Do this only when nothing of the old database is in doubt any more.  Exit code 1 if the coordinator does not answer.
    """
    from txrpc.cli import overview

    try:
        before = overview.rebind(reach, name, identity, 5.0)
    except overview.NoAnswer as error:
        click.echo(f"txrpc: {error}", err=True)
        sys.exit(1)
    click.echo(f"{name} meant {before or 'no database yet'}, and means {identity or 'the next one that comes'} now")


@main.command()
def version() -> None:
    """Print the version."""
    from txrpc._coordinator.admin import library_version

    click.echo(f"txrpc {library_version()}")
