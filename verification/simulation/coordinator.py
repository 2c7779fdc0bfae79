"""A coordinator process: the coordinator of its own node, and those of nodes that it has taken over, on its sessions' streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc._decision_log.memory import MemoryHeartbeats
from txrpc._protocol.coordinator.events import Received, SessionClosed, SessionOpened
from txrpc._protocol.messages import GoAway, Hello, Takeover
from txrpc._protocol.takeover import NodeRow, NodeWatch
from txrpc.errors import Fenced
from txrpc.ids import BranchId, Epoch
from verification.simulation.engine import Disk, Engine
from verification.simulation.history import History
from verification.simulation.network import Stream
from verification.simulation.options import Options
from verification.simulation.process import GROUP
from verification.simulation.scheduler import Node, Scheduler

__all__ = ["CoordinatorProcess"]

_BEAT_MS = 500
_TAKEOVER_MS = 2_000


class CoordinatorProcess(Node):
    """One process of a node.  A restart is another object, and a second process of the same node may be started meanwhile."""

    def __init__(
        self, scheduler: Scheduler, name: str, node: str, disk: Disk, options: Options, history: History, wall_ms: int
    ) -> None:
        super().__init__(scheduler, name)
        self.node = node
        self._disk, self._options, self._history, self._wall_ms = disk, options, history, wall_ms - scheduler.now_ms
        self.on_behind: Callable[[], None] = lambda: None
        self.call_operator: Callable[[BranchId], None] = lambda _: None
        """See `Host`."""
        """What an operator does about a log that has lost decisions."""
        self._parts: dict[int, tuple[Stream, str]] = {}
        """Sessions: on which stream, and of which node."""
        self._last_session = 0
        self.guests: dict[str, Engine] = {}
        self.home = self._engine(node)
        self._beats = MemoryHeartbeats(disk)
        self._watch = NodeWatch(node, _BEAT_MS, _TAKEOVER_MS)
        if options.nodes > 1:
            self._beats.join(node, GROUP, wall_ms)
            self.alarm(_BEAT_MS, self._beat)

    @property
    def machine(self) -> Node:
        """See `Host`."""
        return self

    @property
    def engines(self) -> list[Engine]:
        """The home first."""
        return [self.home, *self.guests.values()]

    @property
    def writing(self) -> bool:
        """True while a batch is on its way to the disk."""
        return self.up and any(engine.writing for engine in self.engines)

    def _engine(self, node: str, expect: Epoch | None = None) -> Engine:
        if self._disk.opening(node):
            self._history.line(self.name, self.name, lambda: f"*** {node} has written what it does not know yet")
        holder = self.node if node != self.node else ""
        wall_ms = self._wall_ms + self.scheduler.now_ms
        return Engine(self, self._disk, self._options, self._history, wall_ms, node, holder, expect)

    # ------------------------------------------------------------------------------------------------------- the ends

    def crash(self) -> None:
        """The machine goes down."""
        if not self.up:
            return
        in_office = {engine.node for engine in self.engines if not engine.over}
        for engine in self.engines:
            engine.crash()
        dice, often = self.scheduler.dice, self._options.lost_writes
        self._disk.crash(in_office, lambda unforced: dice.randint(0, unforced) if dice.random() < often else 0)
        self._stop()

    def _stop(self) -> None:
        self.die()
        for engine in self.engines:
            engine.over = True
        for stream in {id(stream): stream for stream, _ in self._parts.values()}.values():
            stream.close(self.name)

    def repair(self) -> None:
        """From now on the disk works."""
        self._options = self._options.without("log_errors")
        for engine in self.engines:
            engine.repair()

    def ended(self, engine: Engine, behind: str) -> None:
        """See `Host`."""
        if engine is not self.home:
            self.guests.pop(engine.node, None)
            for session in [number for number, (_, node) in self._parts.items() if node == engine.node]:
                self.hang_up(session, engine.node, GoAway("fenced", "it is back", retry=True))
        elif behind:
            self._stop()
            self.on_behind()
        elif self._disk.nodes[self.node].holder == self.node:
            self._stop()  # by another process of the same name
        else:
            self._come_back()

    def _come_back(self) -> None:
        """It was taken over alive: all its streams end, and it opens its log again."""
        for session, (_, node) in list(self._parts.items()):
            if node == self.node and session in self._parts:
                self.hang_up(session, node, GoAway("fenced", "it was taken over", retry=True))
        self.later(self.scheduler.dice.randint(1, 50), self._open_again)

    def _open_again(self) -> None:
        self.home = self._engine(self.node)

    # ------------------------------------------------------------------------------------------------------- takeovers

    def _beat(self) -> None:
        self.alarm(_BEAT_MS, self._beat)
        self._disk.hear_of_epochs()
        rows = self._beats.beat()
        epochs = {row.node: row.epoch for row in rows}
        for engine in self.engines:
            if not engine.over and epochs[engine.node] > engine.owner.epoch and self._disk.tells_of_epochs():
                engine.stop()
        if not self.up:
            return
        for row in self._watch.observe(rows, list(self.guests), self.clock_ms()):
            self.later(self.scheduler.dice.randint(0, 50), self._take_over, row)

    def _take_over(self, row: NodeRow) -> None:
        if row.node not in self.guests:
            self.take_over(row.node, row.epoch)

    def take_over(self, node: str, expect: Epoch | None = None) -> None:
        """Open that node's log and run its coordinator here, unless it has opened it itself since *expect*."""
        try:
            self.guests[node] = self._engine(node, expect)
        except Fenced:
            return
        self._history.line(self.name, self.name, lambda: f"*** takes over {node}")
        for stream in {id(stream): stream for stream, _ in self._parts.values()}.values():
            stream.send(self.name, (node, Takeover()))

    # ------------------------------------------------------------------------------------------------------- sessions

    def accept(self, stream: Stream) -> None:
        """A process has dialled."""
        parts: dict[str, int] = {}
        stream.on_message[self.name] = lambda item: self._heard(parts, stream, *item)
        stream.on_end[self.name] = lambda: self._hung_up(parts)

    def _heard(self, parts: dict[str, int], stream: Stream, node: str, message: Any) -> None:
        if self.node not in parts:
            if isinstance(message, Hello) and not self.home.over:
                self._open(parts, stream, self.home, message)
                for name in self.guests:
                    stream.send(self.name, (name, Takeover()))
            else:
                stream.close(self.name)
            return
        guest = self.guests.get(node)
        if guest is not None and isinstance(message, Hello) and parts.get(node) not in self._parts:
            self._open(parts, stream, guest, message)
        elif node in parts:
            engine = self.home if node == self.node else guest
            if engine is not None and parts[node] in self._parts:
                engine.step(Received(parts[node], node, message))
        else:
            self.home.step(Received(parts[self.node], node, message))

    def _open(self, parts: dict[str, int], stream: Stream, engine: Engine, hello: Hello) -> None:
        self._last_session += 1
        session = parts[engine.node] = self._last_session
        self._parts[session] = stream, engine.node
        engine.step(SessionOpened(session, hello))

    def _hung_up(self, parts: dict[str, int]) -> None:
        for session in parts.values():
            if self._parts.pop(session, None) is not None:
                for engine in self.engines:
                    engine.step(SessionClosed(session))

    def tell(self, session: int, node: str, message: Any) -> None:
        """See `Host`."""
        if session in self._parts:
            self._parts[session][0].send(self.name, (node, message))

    def hang_up(self, session: int, node: str, farewell: GoAway) -> None:
        """See `Host`.  A guest leaves the stream, which goes on."""
        part = self._parts.pop(session, None)
        if part is None:
            return
        stream = part[0]
        stream.send(self.name, (node, farewell))
        if node == self.node:
            stream.close(self.name)
            for number in [number for number, (other, _) in self._parts.items() if other is stream]:
                del self._parts[number]
                for engine in self.engines:
                    engine.step(SessionClosed(number))

    # ------------------------------------------------------------------------------------------------ to be looked at

    def close_incidents(self) -> None:
        """An operator has seen to all of them."""
        for engine in self.engines:
            engine.close_incidents()

    def doubts(self) -> set[tuple[Any, Any]]:
        """Return what an operator would be shown."""
        return {shown for engine in self.engines for shown in engine.doubts()}
