"""The main job, on real processes: money moves between two banks while everything is killed on the way.

    python -m examples.bank.demo [--form FORM] [--transfers 2000] [--threads 8] [--group]

The forms:
    two-phase    two services with a PostgreSQL each, a coordinator and a teller
    final-calls  the same; the services prepare before they reply, and their votes come with the replies
    decides      the same; the second service's database decides, and its reply says that the transfer has committed
    embedded     one program, two PostgreSQL databases, and the coordinator inside it
    files        one program, a SQLite file that decides, and a box of cash in a folder: no PostgreSQL, and no server

With --group there are three coordinators with a disk each; the one that all begin with is killed and stays dead.

Ends with the proof and exit code 0, or with what is wrong and exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.panel import Panel

from examples.bank.demo.one_program import OneProgram, files
from examples.bank.demo.progress import Progress, Stores, picture, proof
from txrpc.testing.postgres import NoPostgres

FORMS = {
    "two-phase": "two PostgreSQL databases, two bank services and {}",
    "final-calls": "two PostgreSQL databases, two bank services and {}",
    "decides": "two PostgreSQL databases, two bank services and {}",
    "embedded": "two PostgreSQL databases, and a program with a coordinator inside",
    "files": "a SQLite file, a folder, and a program with a coordinator inside",
}
REST_S = 60.0


class World(Stores, Protocol):
    """Everything that runs beside this process."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def work(self, progress: Progress, console: Console, threads: int) -> None: ...


def make_world(folder: Path, form: str, *, group: bool) -> World:
    """Raises `NoPostgres`."""
    if form == "files":
        return OneProgram(folder, files(folder), lambda: None)
    if importlib.util.find_spec("psycopg") is None:
        raise NoPostgres("no driver of PostgreSQL here: pip install 'txrpc[postgresql]'")
    from examples.bank.demo.services import BANKS, Bank, Services

    if form != "embedded":
        return Services(folder, group=group, form=form)
    banks = {name: Bank() for name in BANKS}

    def stop() -> None:
        for bank in banks.values():
            bank.server.stop()

    return OneProgram(folder, banks, stop)


def rest(world: World) -> None:
    """Wait until nothing is in doubt any more, or long enough."""
    until = time.monotonic() + REST_S
    while time.monotonic() < until and any(world.prepared().values()):
        time.sleep(0.1)


def run(world: World, console: Console, arguments: argparse.Namespace) -> bool:
    """The whole demonstration; returns whether the proof holds."""
    world.start()
    before = world.total()
    title = "transfers between a box of cash and a bank" if arguments.form == "files" else "transfers between two banks"
    progress = Progress(title, arguments.transfers)
    with picture(console, progress):
        world.work(progress, console, arguments.threads)
        elapsed_s = progress.elapsed_s
        rest(world)
    holds, table = proof(world, progress, before)
    rate = progress.results["committed"] / elapsed_s
    counts = ", ".join(f"{count:,} {result}" for result, count in progress.results.most_common())
    console.print()
    console.print(
        f"{progress.done:,} transfers in {elapsed_s:.1f} s: {counts}; {progress.retries:,} were run again",
        highlight=False,
    )
    console.print(
        f"{rate:,.0f} commits a second over both; the longest pause was {progress.longest_gap_s:.1f} s",
        highlight=False,
    )
    console.print(Panel(table, title="the proof" if holds else "IT DOES NOT HOLD", width=78))
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.bank.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--form", choices=FORMS, default="")
    parser.add_argument("--transfers", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=8, help="of the teller")
    parser.add_argument("--group", action="store_true", help="three coordinators, of which one dies for good")
    arguments = parser.parse_args()
    if arguments.group and arguments.form in ("embedded", "files"):
        parser.error(f"--group: the coordinator of --form {arguments.form} is inside the program")
    # The events say what happens; the library's own log lines would tear the picture.
    logging.getLogger("txrpc").setLevel(logging.CRITICAL)
    # What is meant for another PostgreSQL of this machine (PGSSLMODE, PGOPTIONS, ...) would reach the private ones too.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="txrpc-demo-"))
    world = started(console, folder, arguments)
    try:
        holds = run(world, console, arguments)
    finally:
        world.stop()
    if holds:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"the logs are in {folder}")
    sys.exit(not holds)


def started(console: Console, folder: Path, arguments: argparse.Namespace) -> World:
    """The world of the form that was asked for; where none was, one that this machine can have."""
    wanted = arguments.form or "two-phase"
    coordinators = "three coordinators with a disk each" if arguments.group else "a coordinator"
    console.print(f"Starting {FORMS[wanted].format(coordinators)} ...", highlight=False)
    try:
        return make_world(folder, wanted, group=arguments.group)
    except NoPostgres as error:
        if arguments.form or arguments.group:
            folder.rmdir()
            sys.exit(str(error))
        console.print(f"There is {error}. So it is {FORMS['files']}.", highlight=False, markup=False, soft_wrap=True)
        arguments.form = "files"
        return make_world(folder, "files", group=False)


if __name__ == "__main__":
    main()
