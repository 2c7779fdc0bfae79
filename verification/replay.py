"""``python -m verification.replay SEED``: run one simulated world again and show what happened, as a sequence diagram in text."""

from __future__ import annotations

import re
import sys
import traceback

import click

from verification.simulation import simulate
from verification.simulation.cluster import Run
from verification.simulation.history import Violation
from verification.simulation.trace import diagram

__all__ = ["main", "report"]


def report(run: Run, everything: bool = False) -> str:
    """What a person needs who wants to understand *run*: the world, the diagram, and what is wrong."""
    text = [f"seed {run.seed}: {run.steps} steps, {_counts(run)}", f"world: {_world(run)}", ""]
    named = re.search(r"[0-9a-f]{32}", str(run.violation)) if run.violation is not None else None
    about = named[0] if named and not everything else None
    text += [diagram(run.lines, about), ""]
    if run.violation is None:
        text.append("no rule was broken")
    elif isinstance(run.violation, Violation):
        text.append(f"BROKEN: {run.violation}")
    else:
        text.append("".join(traceback.format_exception(run.violation)))
    return "\n".join(text)


def _counts(run: Run) -> str:
    parts = [f"{count} {name}" for name, count in (*sorted(run.outcomes.items()), *sorted(run.faults.items()))]
    return ", ".join(parts) or "nothing happened"


def _world(run: Run) -> str:
    options, plain = run.options, type(run.options)()
    changed = [name for name in options.__slots__ if getattr(options, name) != getattr(plain, name)]
    return ", ".join(f"{name}={getattr(options, name):.3g}" for name in changed) or "the plain one"


@click.command()
@click.argument("seed", type=int)
@click.option(
    "--all", "everything", is_flag=True, help="Show every message, not only those of the transaction in question."
)
def main(seed: int, everything: bool) -> None:
    """Run the world of SEED again and show it.  Exit code 1 if it breaks a rule."""
    run = simulate(seed, trace=True)
    click.echo(report(run, everything))
    sys.exit(run.violation is not None)


if __name__ == "__main__":
    main()
