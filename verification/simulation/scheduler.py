"""Simulated time: one heap of events, one source of chance, and the promises and tasks with which flows wait.

Everything that happens in a run happens in `Scheduler.run`, one event after another.  Where the order is open, chance decides it
by drawing delays; the same seed draws the same ones.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Any

from txrpc._client.flow import Flow

__all__ = ["Node", "Promise", "Scheduler", "Task"]

_LOOK_MS = 500


class Scheduler:
    """The clock, the dice and the order of events."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now_ms = 1_000_000
        self.steps = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when_ms: int, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* at that time; events of one moment happen in the order in which they were entered."""
        self._count += 1
        heapq.heappush(self._heap, (max(when_ms, self.now_ms), self._count, function, arguments))

    def after(self, delay_ms: int, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* so much later."""
        self.at(self.now_ms + delay_ms, function, *arguments)

    def run(self, until_ms: int, done: Callable[[], bool] = lambda: False, most: int = 200_000) -> None:
        """Let events happen until that time, or until *done* says so after one of them.

        Raises `TimeoutError` after *most* steps: something goes round in circles.
        """
        heap = self._heap
        last = self.steps + most
        while heap and heap[0][0] <= until_ms:
            when_ms, _, function, arguments = heapq.heappop(heap)
            self.now_ms = when_ms
            self.steps += 1
            function(*arguments)
            if done():
                return
            if self.steps > last:
                raise TimeoutError(f"{most} steps, and no end: the last one was {function}")
        self.now_ms = max(self.now_ms, until_ms)


class Node:
    """Something that can crash, stand still, and be slow.  What it had under way dies with it."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.up = True
        self.life = 0
        """Counts its incarnations."""
        self.slow = 1
        self._frozen_until_ms = 0
        self._missed: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = []
        """What was to happen while it stood still."""
        self._clock: tuple[int, int, float] = 0, 0, 1.0
        """When the clock was last set right or wrong, what it showed, and how fast it has gone since."""

    def clock_ms(self) -> int:
        """What this node's monotonic clock shows."""
        since_ms, shown_ms, speed = self._clock
        return shown_ms + int(max(0, self.scheduler.now_ms - since_ms) * speed)

    def drift(self, speed: float) -> None:
        """From now on the clock goes so fast: 1 is right."""
        since_ms, _, _ = self._clock
        self._clock = max(since_ms, self.scheduler.now_ms), self.clock_ms(), speed

    def later(self, delay_ms: int, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* so much later, unless this incarnation is over by then; if it stands still, when it goes on."""
        self.scheduler.after(delay_ms * self.slow, self._live, self.life, function, arguments)

    def soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* after the time that such a node takes for anything."""
        self.later(self.scheduler.dice.randint(0, 5), function, *arguments)

    def alarm(self, delay_ms: int, function: Callable[..., None], *arguments: Any) -> None:
        """As `later`, for what waits for a time, by the node's own clock: slow nodes only notice late."""
        late_ms = self.scheduler.dice.randint(0, 20 * self.slow) if self.slow > 1 else 0
        due_ms = self.clock_ms() + max(0, delay_ms) + late_ms
        self.scheduler.after(
            self._from_now_ms(due_ms), self._live, self.life, self._rings, (due_ms, function, arguments)
        )

    def _from_now_ms(self, due_ms: int) -> int:
        """How long it is until the clock shows *due_ms*, or until it is time to look at a clock that does not go right."""
        since_ms, shown_ms, speed = self._clock
        wait_ms = since_ms + math.ceil((due_ms - shown_ms) / speed) - self.scheduler.now_ms
        right = speed == 1 and since_ms <= self.scheduler.now_ms
        return wait_ms if right else min(wait_ms, _LOOK_MS)

    def _rings(self, due_ms: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        wait_ms = self._from_now_ms(due_ms)
        if wait_ms > 0:
            self.scheduler.after(wait_ms, self._live, self.life, self._rings, (due_ms, function, arguments))
        else:
            function(*arguments)

    def freeze(self, for_ms: int) -> None:
        """Stand still; the clock goes on."""
        self._frozen_until_ms = max(self._frozen_until_ms, self.scheduler.now_ms + for_ms)
        self.scheduler.at(self._frozen_until_ms, self._go_on)

    def sleep(self, for_ms: int) -> None:
        """Stand still with the machine, and with its monotonic clock (a laptop that is closed, a machine that is moved)."""
        self.freeze(for_ms)
        shown_ms, (_, _, speed) = self.clock_ms(), self._clock
        self._clock = self.scheduler.now_ms + for_ms, shown_ms, speed

    def thaw(self) -> None:
        """Go on, with a clock that goes right."""
        self._frozen_until_ms = 0
        self._clock = self.scheduler.now_ms, self.clock_ms(), 1.0
        self._go_on()

    def die(self) -> None:
        """This incarnation is over."""
        self.up = False
        self.life += 1
        self._frozen_until_ms = 0
        self._missed.clear()
        _, _, speed = self._clock
        self._clock = self.scheduler.now_ms, self.clock_ms(), speed  # it does not sleep, if it did

    def _go_on(self) -> None:
        if self.scheduler.now_ms >= self._frozen_until_ms:
            missed, self._missed = self._missed, []
            for life, function, arguments in missed:
                self.scheduler.after(0, self._live, life, function, arguments)

    def _live(self, life: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if life != self.life or not self.up:
            return
        if self.scheduler.now_ms < self._frozen_until_ms:
            self._missed.append((life, function, arguments))
        else:
            function(*arguments)


class Promise:
    """A result that comes later.  The first word counts."""

    __slots__ = ("_waiting", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._waiting: list[Callable[[Promise], None]] = []

    def keep(self, value: Any) -> None:
        """Here it is."""
        self._end(value, None)

    def break_(self, error: BaseException) -> None:
        """It will not come."""
        self._end(None, error)

    def then(self, function: Callable[[Promise], None]) -> None:
        """Call *function* when it has come, or at once."""
        if self.done:
            function(self)
        else:
            self._waiting.append(function)

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            function(self)


class Task:
    """Drives a flow in one node's life: what it yields may return a `Promise`, and then it waits for it."""

    def __init__(self, node: Node, flow: Flow[Any]) -> None:
        self._node, self._life = node, node.life
        self._flow = flow
        self.end = Promise()
        self._go(flow.send, None)

    def _go(self, send: Any, argument: Any) -> None:
        while True:
            try:
                function, arguments = send(argument)
            except StopIteration as stop:
                self.end.keep(stop.value)
                return
            except Exception as error:
                self.end.break_(error)
                return
            try:
                result = function(*arguments)
            except Exception as error:
                send, argument = self._flow.throw, error
                continue
            if isinstance(result, Promise):
                result.then(self._resume)
                return
            send, argument = self._flow.send, result

    def _resume(self, promise: Promise) -> None:
        if self._life != self._node.life:
            return
        if promise.error is not None:
            self._node.soon(self._go, self._flow.throw, promise.error)
        else:
            self._node.soon(self._go, self._flow.send, promise.value)
