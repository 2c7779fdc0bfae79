"""What was measured, as a table, as a plot for the terminal, and as a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.world import Form, Run

__all__ = ["Statements", "draw", "machine", "ratios", "save", "show"]

_BAR = 40
_PROCESSES = {
    "CPU ms: client": "customers",
    "services": " bank-",
    "coordinator": "coordinator",
    "databases": "postgres",
}
"""What the names of those have in them whose processor time is shown together."""

Statements = Mapping[tuple[str, str], Sequence[float]]
"""What each database executes for a transfer, by form and style."""


def machine() -> str:
    """Return what the numbers are from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} processors ({model}), {platform.system()} {platform.release()}, Python {platform.python_version()}"


def ratios(runs: Sequence[Run], form: Form, style: str, clients: int) -> list[float]:
    """Return *form*'s rate over its base's, round by round."""
    mine, bases = (_series(runs, name, style, clients) for name in (form.name, form.base))
    return [run.rate / base.rate for run, base in zip(mine, bases, strict=True) if base.rate]


def _series(runs: Sequence[Run], form: str, style: str, clients: int) -> list[Run]:
    return [run for run in runs if (run.form, run.style, run.clients) == (form, style, clients)]


def _range(values: Iterable[float], digits: int) -> str:
    found = sorted(values)
    if not found:
        return "-"
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(found), found[0], found[-1]))
    return middle if low == high else f"{middle} ({low}–{high})"


def show(runs: Sequence[Run], forms: Sequence[Form], statements: Statements, console: Console) -> None:
    """Print two tables for each style and number of clients, medians with ranges: what was timed, and what was counted."""
    for style, clients in sorted({(run.style, run.clients) for run in runs}):
        title = f"{style}, {clients} client{'s' if clients > 1 else ''}"
        timed = _table(title, "a second", "ratio", "p50 ms", "p99 ms", *_PROCESSES)
        columns = ("forced writes", "messages", "batches", "decisions a log write", "statements")
        counted = _table(f"{title}: counted, a transfer", *columns)
        for form in forms:
            if series := _series(runs, form.name, style, clients):
                timed.add_row(form.label, *_timed(runs, form, series))
                counted.add_row(form.label, *_counted(series), _executed(statements.get((form.name, style), ())))
        console.print(timed, counted)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _timed(runs: Sequence[Run], form: Form, series: Sequence[Run]) -> list[str]:
    first = series[0]
    ratio = "" if form.base == form.name else _range(ratios(runs, form, first.style, first.clients), 2)
    cells = [_range((run.rate for run in series), 0), ratio]
    cells += [f"{statistics.median(run.percentile_ms(percent) for run in series):.1f}" for percent in (50, 99)]
    spent = [statistics.median(_cpu_ms(run, word) for run in series) for word in _PROCESSES.values()]
    return [*cells, *(f"{each:.1f}" if each else "" for each in spent)]


def _counted(series: Sequence[Run]) -> list[str]:
    each = [
        statistics.median(getattr(run, counted) / max(1, len(run.took_s)) for run in series)
        for counted in ("wal_syncs", "messages", "batches")
    ]
    together = statistics.median(run.decisions / max(1, run.log_writes) for run in series)
    return [f"{number:.1f}" if number else "" for number in (*each, together)]


def _executed(statements: Sequence[float]) -> str:
    """What each database executes: as a rule each the same."""
    shown = [f"{each:.1f}" for each in statements if each >= 0.05]
    return f"{shown[0]} each" if len(shown) > 1 and len(set(shown)) == 1 else " and ".join(shown)


def _cpu_ms(run: Run, word: str) -> float:
    """Processor milliseconds a transfer of the processes whose names have *word* in them."""
    names = [name for name in run.cpu_s if word in name and name.startswith("postgres") == (word == "postgres")]
    return sum(run.cpu_s[name] for name in names) * 1000 / max(1, len(run.took_s))


def draw(runs: Sequence[Run], forms: Sequence[Form], console: Console, picture: Path) -> None:
    """Plot the ratios at the greatest number of clients but one: bars in the terminal, and a PNG."""
    every = sorted({run.clients for run in runs})
    clients = every[-2] if len(every) > 1 else every[0]
    bars = [
        (f"{form.label} ({style})", statistics.median(found))
        for form in forms
        for style in form.styles
        if form.base != form.name and (found := ratios(runs, form, style, clients))
    ]
    console.print(f"\nrate over that of the same work without a transaction manager, {clients} clients")
    for label, ratio in bars:
        console.print(f"{label:50} {'█' * max(1, round(min(ratio, 1.5) * _BAR))} {ratio:.2f}", highlight=False)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(9, 0.45 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([label for label, _ in bars], [ratio for _, ratio in bars], color="#3b6ea5")
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    figure.supxlabel(f"rate over that of the same work without a transaction manager, {clients} clients", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    console.print(f"drawn: {picture}")


def save(runs: Sequence[Run], statements: Statements, path: Path) -> None:
    """Write what was measured as JSON, latencies as percentiles."""
    counted = [{"form": form, "style": style, "a transfer": each} for (form, style), each in statements.items()]
    rows = []
    for run in runs:
        row = asdict(run)
        del row["took_s"], row["statements"]
        row |= {"rate": run.rate, "p50_ms": run.percentile_ms(50), "p99_ms": run.percentile_ms(99)}
        rows.append(row)
    path.write_text(json.dumps({"machine": machine(), "statements": counted, "runs": rows}, indent=1), encoding="utf-8")
