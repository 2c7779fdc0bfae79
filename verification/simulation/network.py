"""What lies between the nodes: messages are late, lost, repeated, overtaken; pairs of nodes cannot reach each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc._protocol.messages import Welcome
from verification.simulation.history import History
from verification.simulation.options import Options
from verification.simulation.scheduler import Node, Scheduler
from verification.words import message as in_words

__all__ = ["Network", "Stream"]

NOTICES_MS = 5_000
"""Within which a process notices that its session has died, so that it is back before the recovery wait is over."""


class Network:
    """One network; nodes are known by name."""

    def __init__(self, scheduler: Scheduler, options: Options) -> None:
        self._scheduler = scheduler
        self._dice = scheduler.dice
        self.options = options
        self.cut: set[tuple[str, str]] = set()
        """(from, to): nothing gets through."""

    def repair(self) -> None:
        """From now on messages arrive, once, and in time."""
        self.cut.clear()
        self.options = self.options.without("loss", "duplication", "reordering", "stray")

    def delay_ms(self) -> int:
        """How long one message takes."""
        most = self.options.delay_ms
        if self.options.stray and self._dice.random() < self.options.stray:
            most *= 100
        return 1 + int(self._dice.random() * most)

    def send(self, source: Node, target: Node, function: Callable[..., None], *arguments: Any) -> None:
        """Carry a datagram: it calls *function* at *target*, whatever incarnation that is by then; perhaps twice or never."""
        copies = 1
        if self.options.duplication and self._dice.random() < self.options.duplication:
            copies = 2
        for _ in range(copies):
            if not self.lost(source, target):
                self._scheduler.after(self.delay_ms(), self._arrive, source, target, function, arguments)

    def lost(self, source: Node, target: Node) -> bool:
        """Whether a message does not get there."""
        if (source.name, target.name) in self.cut:
            return True
        return bool(self.options.loss) and self._dice.random() < self.options.loss

    def _arrive(self, source: Node, target: Node, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if target.up and (source.name, target.name) not in self.cut:
            target.later(0, function, *arguments)


class Stream:
    """One session between two incarnations: ordered each way, until it breaks, which each end notices for itself.

    Real streams neither lose nor repeat nor reorder.  This one does, if the options say so: the protocol must be safe without.
    Nothing overtakes a greeting all the same: what came before it would be dropped, and waited for as long as the stream lives.
    """

    def __init__(self, network: Network, scheduler: Scheduler, history: History, near: Node, far: Node) -> None:
        self._network, self._scheduler, self._history = network, scheduler, history
        self._ends = {near.name: near, far.name: far}
        self._lives = {near.name: near.life, far.name: far.life}
        self._last_ms = {near.name: 0, far.name: 0}
        self._greeted_ms = {near.name: 0, far.name: 0}
        self._open = {near.name, far.name}
        self._broken = False
        self.on_end: dict[str, Callable[[], None]] = {}
        """What each end does when it notices."""
        self.on_message: dict[str, Callable[[Any], None]] = {}

    def send(self, source: str, message: tuple[str, Any]) -> None:
        """Send *message*, a coordinator's name and what is said to it or by it, to the other end."""
        if source not in self._open:
            return
        (target,) = self._ends.keys() - {source}
        self._history.line(source, target, lambda: in_words(message[1]))
        options, dice = self._network.options, self._scheduler.dice
        copies = 2 if options.duplication and dice.random() < options.duplication else 1
        for _ in range(copies):
            if self._network.lost(self._ends[source], self._ends[target]):
                self.break_()
                continue
            when_ms = self._scheduler.now_ms + self._network.delay_ms()
            if not (options.reordering and dice.random() < options.reordering):
                when_ms = self._last_ms[target] = max(when_ms, self._last_ms[target])
            when_ms = max(when_ms, self._greeted_ms[target])
            if isinstance(message[1], Welcome):
                self._greeted_ms[target] = when_ms
            self._scheduler.at(when_ms, self._arrive, source, target, message)

    def break_(self) -> None:
        """It will not carry much more; each end notices within some seconds."""
        if not self._broken:
            self._broken = True
            for name in self._ends:
                self._scheduler.after(self._scheduler.dice.randint(1, NOTICES_MS), self._notice, name)

    def close(self, source: str) -> None:
        """One end closes it, or dies; the other one hears of it, or notices, within some seconds in any case (keepalive)."""
        self._open.discard(source)
        (target,) = self._ends.keys() - {source}
        if self._network.lost(self._ends[source], self._ends[target]):
            self.break_()
        else:
            self._scheduler.after(min(self._network.delay_ms(), NOTICES_MS), self._notice, target)

    def _arrive(self, source: str, target: str, message: Any) -> None:
        if (source, target) in self._network.cut:
            self.break_()
        elif target in self._open:
            self._at(target, self._take, target, message)

    def _take(self, target: str, message: Any) -> None:
        if target in self._open:
            self.on_message[target](message)

    def _notice(self, name: str) -> None:
        if name in self._open:
            self._at(name, self._ended, name)

    def _ended(self, name: str) -> None:
        if name in self._open:
            self._open.discard(name)
            self.on_end[name]()

    def _at(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        end = self._ends[name]
        if end.life == self._lives[name]:
            end.later(0, function, *arguments)
