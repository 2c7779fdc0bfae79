"""Draw the state diagrams of docs/protocol.md from the tables of the machines; with --check say whether they are up to date.

An arrow carries every input that may lead that way.  Inputs that change nothing are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from txrpc._protocol.coordinator.table import TABLE as COORDINATOR
from txrpc._protocol.participant.table import TABLE as PARTICIPANT
from txrpc._protocol.quorum.proposer import STAGES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
BEGIN, END = "<!-- {}: made by scripts/diagrams.py -->\n", "<!-- end -->\n"


def diagram(table: Mapping[tuple[Enum, Enum], Any]) -> str:
    """A Mermaid diagram of *table*, whose entries are states, or have `next_states`."""
    arrows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, kind), entry in table.items():
        for after in getattr(entry, "next_states", (entry,)):
            if after is not state:
                arrows[state.name, after.name].append(kind.value)
    lines = [f"    {source} --> {target}: {', '.join(kinds)}" for (source, target), kinds in sorted(arrows.items())]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def drawn(page: str) -> str:
    """*page* with the diagrams of today's tables."""
    for name, table in (("coordinator", COORDINATOR), ("participant", PARTICIPANT), ("proposer", STAGES)):
        begin = BEGIN.format(name)
        before, _, rest = page.partition(begin)
        _, end, after = rest.partition(END)
        page = before + begin + diagram(table) + end + after
    return page


def main() -> int:
    """See the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the state diagrams of docs/protocol.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything would change")
    page = PAGE.read_text()
    if parser.parse_args().check:
        if drawn(page) != page:
            print("docs/protocol.md: the diagrams are stale, run python scripts/diagrams.py")
            return 1
        return 0
    PAGE.write_text(drawn(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
