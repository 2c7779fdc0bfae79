"""What the demonstration shows: how far it has come, and the proof at its end."""

from __future__ import annotations

import collections
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["Progress", "Stores", "picture", "proof"]


class Stores(Protocol):
    """The two places between which money moves, looked at from outside."""

    def prepared(self) -> dict[str, int]:
        """Return how many branches each holds prepared."""

    def journals(self) -> list[dict[str, int]]:
        """Return what each transaction did to each, in cents."""

    def total(self) -> int:
        """Return the money in both together, in cents."""


@dataclass
class Progress:
    """What the screen shows."""

    title: str
    transfers: int
    began: float = field(default_factory=time.monotonic)
    results: collections.Counter[str] = field(default_factory=collections.Counter)
    retries: int = 0
    told_committed: set[str] = field(default_factory=set)
    told_unknown: set[str] = field(default_factory=set)
    longest_gap_s: float = 0.0
    events: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last_commit: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.results.total()

    def wait_for(self, share: float) -> None:
        """Wait until that part of the transfers is done."""
        while self.done < share * self.transfers:
            time.sleep(0.02)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def again(self, xid: str) -> None:
        """This one was rolled back, and its transfer is run again."""
        with self._lock:
            self.retries += 1
            self.told_unknown.discard(xid)

    def finished(self, result: str, xid: str) -> None:
        with self._lock:
            self.results[result] += 1
            if result == "committed":
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - self._last_commit)
                self._last_commit = now
                self.told_committed.add(xid)
            if result == "outcome unknown":
                self.told_unknown.add(xid)
            else:
                self.told_unknown.discard(xid)

    def tried(self, xid: str) -> None:
        """A program that may be killed has begun this one: should it never say more, any end is right."""
        with self._lock:
            self.told_unknown.add(xid)

    def killed(self, console: Console, what: str, stores: Stores) -> None:
        """Say so, and what is prepared at this moment."""
        held = ", ".join(f"{count} in {name}" for name, count in stores.prepared().items() if count)
        self.say(console, f"kill -9 {what}" + (f"; prepared and waiting: {held}" if held else ""))

    def say(self, console: Console, text: str) -> None:
        line = f"{self.elapsed_s:6.1f} s  {text}"
        self.events.append(line)
        if not console.is_terminal:
            console.print(line, highlight=False, soft_wrap=True)


def screen(progress: Progress) -> RenderableType:
    """The picture while it runs."""
    counts = Table.grid(padding=(0, 2))
    counts.add_row("committed", "rolled back", "outcome unknown", "run again", "per second", style="dim")
    rate = progress.results["committed"] / max(0.1, progress.elapsed_s)
    shown = [progress.results["committed"], progress.results["rolled back"], progress.results["outcome unknown"]]
    counts.add_row(*(f"{number:,}" for number in [*shown, progress.retries]), f"{rate:,.0f}", style="bold")
    bar = ProgressBar(total=progress.transfers, completed=progress.done, width=60)
    events = Text("\n".join(progress.events))
    return Panel(Group(bar, Text(), counts, Text(), events), title=progress.title, width=78)


def proof(world: Stores, progress: Progress, before: int) -> tuple[bool, Table]:
    """Hold what the databases say against what the client was told."""
    journals, after = world.journals(), world.total()
    in_both = journals[0].keys() & journals[1].keys()
    in_one = journals[0].keys() ^ journals[1].keys()
    unbalanced = [xid for xid in in_both if journals[0][xid] + journals[1][xid]]
    missing = progress.told_committed - in_both
    surplus = in_both - progress.told_committed - progress.told_unknown
    prepared = sum(world.prepared().values())
    checks = [
        (before == after, "money", f"{before / 100:,.2f} before, {after / 100:,.2f} after"),
        (not in_one, "atomicity", f"{len(in_both):,} transfers are in both journals, {len(in_one)} in only one"),
        (not unbalanced, "balance", f"{len(unbalanced)} transfers changed the two by different amounts"),
        (not missing, "durability", f"{len(missing)} transfers were reported committed and are not there"),
        (not surplus, "honesty", f"{len(surplus)} transfers were reported rolled back and are there"),
        (not prepared, "in doubt", f"{prepared} prepared branches are left in the databases"),
    ]
    table = Table.grid(padding=(0, 2))
    for holds, name, text in checks:
        table.add_row(Text("yes", "bold green") if holds else Text("NO", "bold red"), Text(name, "bold"), text)
    return all(holds for holds, _, _ in checks), table


def picture(console: Console, progress: Progress) -> AbstractContextManager[object]:
    """A live picture on a terminal; elsewhere the events are printed one by one."""
    if not console.is_terminal:
        return nullcontext()
    return Live(console=console, get_renderable=lambda: screen(progress), refresh_per_second=8)
