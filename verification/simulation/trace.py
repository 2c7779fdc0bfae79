"""A run as a person reads it: a sequence diagram in text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["diagram"]

Line = tuple[int, str, str, str]


def diagram(lines: Sequence[Line], about: str | None = None) -> str:
    """A sequence diagram, oldest first; *about*: only what names this transaction, and what happens to nodes."""
    names = _Names()
    start_ms = lines[0][0] if lines else 0
    shown = [line for line in lines if about is None or about in line[3] or "***" in line[3] or "starts" in line[3]]
    columns = _columns(shown)
    width = {name: max(len(name) + 2, 14) for name in columns}
    place, at = {}, 12
    for name in columns:
        place[name] = at + width[name] // 2
        at += width[name]
    head = " " * 12 + "".join(name.center(width[name]) for name in columns)
    return "\n".join([head, *(_row(line, start_ms, place, at, names) for line in shown)])


def _columns(lines: Iterable[Line]) -> list[str]:
    names = {name for line in lines for name in line[1:3]} - {"application"}
    order = ("client", "coordinator", "service", "db")
    return sorted(names, key=lambda name: (next((n for n, word in enumerate(order) if name.startswith(word)), 9), name))


def _row(line: Line, start_ms: int, place: dict[str, int], width: int, names: _Names) -> str:
    when_ms, source, target, text = line
    row = [" "] * width
    for at in place.values():
        row[at] = "|"
    if source in place and target in place and source != target:
        one, other = place[source], place[target]
        low, high = min(one, other), max(one, other)
        row[low + 1 : high] = "-" * (high - low - 1)
        row[other + (-1 if one < other else 1)] = ">" if one < other else "<"
    elif source in place:
        row[place[source]] = "*"
    stamp = f"{(when_ms - start_ms) / 1000:9.3f}   "
    return (stamp + "".join(row)[12:] + "  " + names.shorten(text)).rstrip()


class _Names:
    """x1, x2, … for transactions and b1, b2, … for branches, in the order of their appearance."""

    _HEX = re.compile(r"\b(?:[0-9a-f]{32}|[0-9a-f]{16})\b")

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def shorten(self, text: str) -> str:
        """Replace the identifiers in *text*."""
        return self._HEX.sub(lambda match: self._name(match[0]), text)

    def _name(self, identifier: str) -> str:
        letter = "x" if len(identifier) == 32 else "b"
        if identifier not in self._known:
            number = sum(name[0] == letter for name in self._known.values()) + 1
            self._known[identifier] = f"{letter}{number}"
        return self._known[identifier]
