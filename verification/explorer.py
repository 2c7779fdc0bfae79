"""Every interleaving of a small world: ``python -m verification.explorer`` walks through all of them, breadth first.

A state is a whole `SmallWorld` with what may still go wrong in it.  From each state every next step is taken: any message that is
first on its way, any operation of a database, any write of the log; a crash and restart of any node, with what it was doing having
taken effect or not; a lost message (its connection breaks) or a repeated one; a deadline that passes too early; a standby that
takes over the database that decides, with its latest decision or without.  States are told apart by a hash of everything in them,
and counted.  Where nothing is under way, time goes on to whatever is due; where nothing is due either, all must have ended in
agreement.

(After Holzmann's SPIN and the model checkers of TLA+, but on the code itself.)
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import click

from txrpc._protocol.coordinator.rows import BranchRow, Question, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.participant.branch import BranchInput, ParticipantBranch
from txrpc.ids import BranchId, Epoch, ParticipantId, RegisterId, Xid
from verification.explorer_model import SmallWorld, early
from verification.explorer_nodes import Database, Ledger

__all__ = ["DECIDED", "STORIES", "Budget", "Explored", "Mistake", "explore", "main"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may still go wrong."""

    crashes: int = 1
    messages: int = 1
    """Lost or repeated."""
    early: int = 0
    """Deadlines that pass while messages are on their way."""
    takeovers: int = 0
    """Another process opens the log, while the coordinator sleeps in the middle of whatever it does."""
    failovers: int = 0
    """A standby takes over the database that decides."""


@dataclass(frozen=True, slots=True)
class Explored:
    """How far one story was followed."""

    story: str
    states: int
    steps: int
    ends: int
    outcomes: frozenset[str]
    seconds: float


class Mistake(AssertionError):
    """A rule is broken, or something goes on for ever; with the way there."""

    def __init__(self, text: str, way: list[str]) -> None:
        self.way = way
        super().__init__("\n".join([text, "the way there:", *(f"  {n:3}. {step}" for n, step in enumerate(way, 1))]))


# --------------------------------------------------------------------------------------------------------- the stories


def _two_that_write(world: SmallWorld) -> None:
    world.client.commit(*[service.call() for service in world.services])


def _one_that_writes(world: SmallWorld) -> None:
    world.client.commit(world.services[0].call())


def _one_of_two_only_reads(world: SmallWorld) -> None:
    world.databases["db1"].on_prepare = BranchInput.READ_ONLY
    _two_that_write(world)


def _one_of_two_refuses(world: SmallWorld) -> None:
    world.databases["db1"].on_prepare = BranchInput.PREPARE_FAILED
    _two_that_write(world)


def _both_vote_early(world: SmallWorld) -> None:
    world.client.commit(*early([service.call() for service in world.services], world.services))


def _both_vote_early_and_the_root_gives_up(world: SmallWorld) -> None:
    world.client.give_up(*early([service.call() for service in world.services], world.services))


def _the_ledger_decides(world: SmallWorld) -> None:
    refs = early([service.call() for service in world.services], world.services)
    world.client.decide(*refs)


def _the_ledger_decides_when_all_have_voted(world: SmallWorld) -> None:
    world.client.commit(*[service.call() for service in world.services])


def _a_service_decides(world: SmallWorld) -> None:
    refs = [service.call() for service in world.services]
    world.has_work_in_the_ledger(refs[0])
    world.client.commit(*refs, decider=refs[0])


DECIDED: dict[str, tuple[str, Callable[[SmallWorld], None]]] = {
    "the ledger decides": ("root", _the_ledger_decides),
    "the ledger decides when all have voted": ("root", _the_ledger_decides_when_all_have_voted),
    "the ledger is to decide, the root gives up": ("root", _both_vote_early_and_the_root_gives_up),
    "a service decides": ("service", _a_service_decides),
    "a register decides, without work": ("service", _both_vote_early),
}
"""Stories in which a database decides, of the root's or of a service's."""
STORIES: dict[str, tuple[int, Callable[[SmallWorld], None]]] = {
    "two that write": (2, _two_that_write),
    "one that writes": (1, _one_that_writes),
    "one of two only reads": (2, _one_of_two_only_reads),
    "one of two refuses": (2, _one_of_two_refuses),
    "both vote early": (2, _both_vote_early),
    "both vote early, the root gives up": (2, _both_vote_early_and_the_root_gives_up),
    **{story: (2, begin) for story, (_whose, begin) in DECIDED.items()},
}


# ------------------------------------------------------------------------------------------------------------ the steps

_Step = tuple[str, Callable[[], None], Budget]


def _steps(world: SmallWorld, budget: Budget) -> Iterator[_Step]:
    """All that can happen now: its name, how to do it, and what may go wrong afterwards."""
    jobs = list(dict.fromkeys(world.jobs))
    if not all(map(world.is_for_an_operator, jobs)):  # who looks when nothing is under way any more
        jobs = [job for job in jobs if not world.is_for_an_operator(job)]
    for job in jobs:
        yield world.name_of(job), partial(world.carry_out, job), budget
    if all(map(world.is_asleep, jobs)) and not world.quiet:
        yield "time passes", world.let_time_pass, budget
    if budget.early and jobs:
        yield "a deadline passes early", world.let_time_pass, replace(budget, early=budget.early - 1)
    if budget.crashes:
        yield from _crashes(world, replace(budget, crashes=budget.crashes - 1))
    if budget.messages:
        yield from _accidents(world, replace(budget, messages=budget.messages - 1))
    if budget.takeovers:
        after = replace(budget, takeovers=budget.takeovers - 1)
        for landed in (False, True):
            how = "what it was writing gets there before" if landed else "what it was writing comes too late"
            yield f"the coordinator sleeps and is taken over, {how}", partial(world.take_over, landed), after

    if budget.failovers and world.ledger is not None:
        after = replace(budget, failovers=budget.failovers - 1)
        for kept in (False, True):
            how = "which has the latest decision" if kept else "which lacks the latest decision"
            yield f"a standby takes the ledger over, {how}", partial(world.fail_over, kept), after


def _crashes(world: SmallWorld, after: Budget) -> Iterator[_Step]:
    for lucky in (False, True):
        how = "what it was doing took effect" if lucky else "what it was doing is lost"
        yield f"the coordinator crashes, {how}", partial(world.crash_coordinator, lucky), after
        for index, service in enumerate(world.services):
            yield f"service {service.resource} crashes, {how}", partial(world.crash_service, index, lucky), after
    if world.client.session in world.links:
        yield "the client dies", world.kill_client, after


def _accidents(world: SmallWorld, after: Budget) -> Iterator[_Step]:
    for session, link in list(world.links.items()):
        for way, messages in (("up", link.up), ("down", link.down)):
            if messages:
                name = f"{type(messages[0]).__name__} {'from' if way == 'up' else 'to'} {world.peer_name(session)}"
                yield f"{name} is lost, and the connection breaks", partial(world.lose, session, way), after
                yield f"{name} is delivered twice", partial(world.repeat, session, way), after


# -------------------------------------------------------------------------------------------------------- the exploration


def explore(story: str, budget: Budget | None = None, most: int = 2_000_000) -> Explored:
    """Follow *story* through every interleaving.  Raises `Mistake`, or `MemoryError` if there are more than *most* states."""
    budget = budget or Budget()
    began = time.monotonic()
    size, begin = STORIES[story]
    world = SmallWorld(size, DECIDED[story][0] if story in DECIDED else "")
    begin(world)
    shelf = _Shelf()
    first = shelf.put(world, budget)
    came_from: dict[bytes, tuple[bytes, str]] = {_digest(first): (b"", "")}
    queue = deque([(first, _digest(first))])
    steps, ends, outcomes = 0, 0, set()
    while queue:
        packed, digest = queue.popleft()
        world, budget = shelf.take(packed)
        names = [name for name, _, _ in _steps(world, budget)]
        if world.quiet and not world.jobs:
            ends += 1
            outcome = _check(world, came_from, digest)
            outcomes.add(outcome)
        for number, name in enumerate(names):
            if number:
                world, budget = shelf.take(packed)
            _, act, after = list(_steps(world, budget))[number]
            try:
                act()
            except AssertionError as error:
                raise Mistake(f"{story}: {_said(error)}", _way(came_from, digest, name)) from error
            steps += 1
            packed_next = shelf.put(world, after)
            digest_next = _digest(packed_next)
            if digest_next not in came_from:
                came_from[digest_next] = (digest, name)
                queue.append((packed_next, digest_next))
        if len(came_from) > most:
            raise MemoryError(f"{story}: more than {most} states")
    if not ends:
        raise Mistake(f"{story}: it never ends", [])
    return Explored(story, len(came_from), steps, ends, frozenset(outcomes), time.monotonic() - began)


def _check(world: SmallWorld, came_from: dict[bytes, tuple[bytes, str]], digest: bytes) -> str:
    try:
        outcome = world.check()
    except AssertionError as error:
        raise Mistake(_said(error), _way(came_from, digest)) from error
    return "not asked" if outcome is None else outcome.name


def _said(error: AssertionError) -> str:
    """Without what pytest adds to it."""
    return str(error).partition("\n")[0]


def _way(came_from: dict[bytes, tuple[bytes, str]], digest: bytes, *last: str) -> list[str]:
    way = list(last)
    while digest in came_from:
        digest, name = came_from[digest]
        if name:
            way.insert(0, name)
    return way


def _digest(packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=16).digest()


_ATOMS = (Xid, BranchId, ParticipantId, RegisterId, Epoch, str, int)


def _is_frozen(kind: type[Any]) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen) and bool(fields(kind))


def _remake(kind: type[Any], *values: Any) -> Any:
    made: Any = object.__new__(kind)
    for name, value in zip(kind.__slots__, values, strict=True):
        setattr(made, name, value)
    return made


def _reduce(value: Any) -> tuple[Any, ...]:
    """Without the names of the attributes, which would be most of the bytes."""
    kind = type(value)
    return _remake, (kind, *[getattr(value, name) for name in kind.__slots__])


_PLAIN = dict.fromkeys(
    (ParticipantBranch, BranchRow, TransactionRow, Question, Database, Ledger, SessionEntry), _reduce
)


class _Shelf:
    """Worlds as bytes.  Frozen values are kept once, and equal ones have one number: that is quick, and equal worlds look equal."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._frozen: dict[type, bool] = {}

    def put(self, world: SmallWorld, budget: Budget) -> bytes:
        """Pack it; what only counts and does not act is left out."""
        world.tidy()
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, 5)
        pickler.persistent_id = self._number  # type: ignore[method-assign]
        pickler.dispatch_table = _PLAIN
        pickler.dump((world, budget))
        return buffer.getvalue()

    def take(self, packed: bytes) -> tuple[SmallWorld, Budget]:
        """Unpack it."""
        unpickler = pickle.Unpickler(io.BytesIO(packed))
        unpickler.persistent_load = self._values.__getitem__  # type: ignore[method-assign]
        world, budget = unpickler.load()
        return world, budget

    def _number(self, value: Any) -> int | None:
        kind = type(value)
        frozen = self._frozen.get(kind)
        if frozen is None:
            frozen = (kind in _ATOMS and kind is not int) or _is_frozen(kind)
            self._frozen[kind] = frozen
        if not frozen and not (kind is tuple and all(type(one) in _ATOMS for one in value)):
            return None
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number


@click.command()
@click.option("--crashes", default=1, show_default=True)
@click.option("--messages", default=1, show_default=True, help="Lost or repeated.")
@click.option("--early", default=0, show_default=True, help="Deadlines that pass too early.")
@click.option("--failovers", default=0, show_default=True, help="Of the database that decides.")
@click.argument("stories", nargs=-1)
def main(stories: tuple[str, ...], crashes: int, messages: int, early: int, failovers: int) -> None:
    """Walk through every interleaving of STORIES (all of them by default)."""
    for story in stories or STORIES:
        try:
            found = explore(story, Budget(crashes, messages, early, failovers=failovers))
        except Mistake as mistake:
            click.echo(str(mistake))
            sys.exit(1)
        outcomes = ", ".join(sorted(found.outcomes)).lower()
        click.echo(
            f"{story}: {found.states:,} states, {found.steps:,} steps, {found.ends:,} ends ({outcomes}), {found.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
