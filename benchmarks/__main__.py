"""What a transaction costs, beside the same work without one and with other tools: make bench.

A transfer between two banks, each with a PostgreSQL cluster of its own: one UPDATE and one INSERT a side.  All forms run side by
side and take turns, round by round, so that a ratio compares what was measured within minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.report import draw, machine, save, show
from benchmarks.world import Form, Run, World

FORMS = (
    Form("plain", "two services, each commits alone", "plain", "plain"),
    Form("two", "two remote branches", "txrpc", "plain"),
    Form("two-final", "two remote branches, final calls", "txrpc", "plain"),
    Form("two-elsewhere", "two remote branches, one decides at commit", "txrpc", "plain"),
    Form("two-decides", "two remote branches, the last call decides", "txrpc", "plain"),
    Form("plain-own", "own database and a service, each commits alone", "plain", "plain-own"),
    Form("own", "own database and a remote branch", "txrpc", "plain-own"),
    Form("own-final", "own database and a remote branch, final call", "txrpc", "plain-own"),
    Form("own-decides", "own database decides, final call to the other", "txrpc", "plain-own"),
    Form("textbook", "textbook coordinator", "textbook", "plain", ("sync",)),
    Form("dbos", "DBOS Transact, one process", "", "by-hand", ("sync",)),
    Form("embedded", "embedded, one process", "", "by-hand", ("sync",)),
    Form("embedded-decides", "embedded, one process, a database decides", "", "by-hand", ("sync",)),
    Form("zope", "Zope transaction, one process", "", "by-hand", ("sync",)),
    Form("by-hand", "two-phase commit by hand, one process", "", "by-hand", ("sync",)),
    Form("plain-one", "one service commits alone", "plain", "plain-one"),
    Form("one", "one remote branch", "txrpc", "plain-one"),
    Form("one-decides", "one remote branch, the call decides", "txrpc", "plain-one"),
    Form("bare-local", "a transaction of SQLAlchemy's", "", "bare-local"),
    Form("local", "one local resource", "", "bare-local"),
)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--forms", nargs="+", choices=[form.name for form in FORMS], default=[form.name for form in FORMS]
    )
    parser.add_argument("--styles", nargs="+", choices=("sync", "asyncio"), default=["sync", "asyncio"])
    parser.add_argument("--into", type=Path, default=Path("build/bench"), help="where the picture and the numbers go")
    given = parser.parse_args()
    wanted = [form for form in FORMS if form.name in given.forms]
    wanted += [form for form in FORMS if form not in wanted and any(form.name == each.base for each in wanted)]
    given.into.mkdir(parents=True, exist_ok=True)
    console = Console()
    wide = Console(width=max(150, console.width))
    console.print(machine())
    runs: list[Run] = []
    styles = [(form, style) for form in wanted for style in form.styles if style in given.styles]
    with tempfile.TemporaryDirectory() as folder, World(Path(folder)) as world:
        statements = {(form.name, style): world.statements(form, style) for form, style in styles}
        for number in range(given.rounds):
            for clients in given.clients:
                for form, style in styles:
                    run = world.run(form, style, clients, given.seconds)
                    runs.append(run)
                    console.print(
                        f"round {number + 1}: {form.label}, {style}, {clients}: {run.rate:.0f}/s", style="dim"
                    )
    ordered = [form for form in FORMS if form in wanted]
    show(runs, ordered, statements, wide)
    draw(runs, ordered, wide, given.into / "ratios.png")
    save(runs, statements, given.into / "results.json")


if __name__ == "__main__":
    main()
