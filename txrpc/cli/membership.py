"""``txrpc group``: who the members of a group of coordinators are, and who is to be one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from txrpc.cli.reach import Reach, reach_options

__all__ = ["group"]

_CHANGE_S = 60.0


@click.group()
def group() -> None:
    """Show and change the members of a group of coordinators (txrpc coordinator --members), while its transactions run."""


def _quorum_options(command: Callable[..., None]) -> Callable[..., None]:
    help_text = "Of the new group; by default a majority stays one, and another number what it is."
    for name in ("--write-quorum", "--read-quorum"):
        command = click.option(name, type=click.IntRange(1, 100), default=None, help=help_text)(command)
    return command


@group.command()
@reach_options
def show(reach: Reach) -> None:
    """Show the members, their addresses, and what the quorums survive."""
    _show(_asked(reach, {}, 5.0))


@group.command()
@click.argument("member", metavar="NODE=HOST:PORT")
@_quorum_options
@reach_options
def add(member: str, read_quorum: int | None, write_quorum: int | None, reach: Reach) -> None:
    """Let a new member in.

    Start it first, with an empty disk, --members that name all others and itself, and --node NODE: it waits to be added.  A name
    that is a member already gets the other address.
    """
    _change(reach, _named(member), (), read_quorum, write_quorum)


@group.command()
@click.argument("node", metavar="NODE")
@_quorum_options
@reach_options
def remove(node: str, read_quorum: int | None, write_quorum: int | None, reach: Reach) -> None:
    """Let a member go, dead or alive.

    What is left of its transactions is finished by another one.  Its process, if it lives, ends with exit code 7.
    """
    _change(reach, {}, (node,), read_quorum, write_quorum)


@group.command()
@click.argument("node", metavar="NODE")
@click.argument("member", metavar="NEW=HOST:PORT")
@reach_options
def replace(node: str, member: str, reach: Reach) -> None:
    """Let a new member in for one that goes: first in, then out, or the other way round if that one is dead."""
    come = _named(member)
    _change(reach, come, () if node in come else (node,), None, None)


@group.command()
@_quorum_options
@reach_options
def quorums(read_quorum: int | None, write_quorum: int | None, reach: Reach) -> None:
    """Set how many members make a quorum."""
    _change(reach, {}, (), read_quorum, write_quorum)


def _named(member: str) -> dict[str, str]:
    name, equals, address = member.partition("=")
    if not equals:
        raise click.BadParameter(f"a member is NODE=HOST:PORT, not {member!r}")
    return {name.strip(): address.strip()}


def _change(reach: Reach, come: dict[str, str], go: tuple[str, ...], reads: int | None, writes: int | None) -> None:
    _show(_asked(reach, {"come": come, "go": go, "reads": reads or 0, "writes": writes or 0}, _CHANGE_S))


def _asked(reach: Reach, change: dict[str, Any], timeout_s: float) -> Any:
    """The group after *change*, or as it is; ends the program where there is no such answer."""
    from txrpc._wire.v1 import admin_pb2
    from txrpc.cli import overview

    try:
        if not change:
            return overview.call(reach, "Group", admin_pb2.GroupRequest(), timeout_s)
        return overview.call(reach, "ChangeGroup", admin_pb2.ChangeGroupRequest(**change), timeout_s)
    except overview.Refused as error:
        click.echo(f"txrpc: {f'nothing was changed: {error}' if change else error}", err=True)
    except overview.NoAnswer as error:
        click.echo(f"txrpc: {error}", err=True)
    sys.exit(1)


def _show(status: Any) -> None:
    click.echo(f"view {status.number}: read quorum {status.reads}, write quorum {status.writes}")
    for name, address in sorted(status.addresses.items()):
        why = status.trouble.get(name)
        click.echo(f"  {name:<12} {address}" + (f"  ({why})" if why else ""))
    if status.former:
        click.echo(f"  left: {', '.join(status.former)}")
    click.echo(status.tolerance)
