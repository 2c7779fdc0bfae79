"""Every state of a transaction, reached by events through the real door, against every input: what exactly happens.

`EXPECTED` (in `coordinator_expected`) is written down apart from the production table, so that neither can drift without the
other.  A line reads: the state afterwards, then the effects in their order.  An input that has no line does nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.protocol.coordinator_expected import EXPECTED, GRID
from tests.protocol.coordinator_kit import (
    CLIENT,
    EARLIER,
    EARLY,
    FULL,
    LEFT_MS,
    LIMITS,
    ONE,
    OTHER_CLIENT,
    REGISTER,
    TWO,
    CoordinatorHarness,
    L,
    P,
    Q,
    acked,
    answer,
    commit_request,
    committing,
    decided,
    decision,
    doubt,
    effects,
    hello,
    inquiry,
    one_phase_done,
    outcome_request,
    polled,
    registered,
    resolved,
    rollback_request,
    voted,
    xid,
)
from txrpc._protocol.coordinator.events import Drain, Forgot, LogHealth, Lookup, Output
from txrpc._protocol.coordinator.rows import Input, State
from txrpc._protocol.coordinator.table import TABLE, enter
from txrpc._protocol.messages import FinishResult, Outcome, OutcomeReply, Vote, Wait
from txrpc._protocol.outcomes import Found

# ------------------------------------------------------------------------------------------------ how to get there


def _absent() -> CoordinatorHarness:
    return CoordinatorHarness(CLIENT, OTHER_CLIENT, P, Q, L)


def _preparing() -> CoordinatorHarness:
    harness = _absent()
    harness.hear(CLIENT, commit_request(TWO))
    return harness


def _preparing_one_vote() -> CoordinatorHarness:
    harness = _preparing()
    harness.hear(P, voted(1))
    return harness


def _one_phase() -> CoordinatorHarness:
    harness = _absent()
    harness.hear(CLIENT, commit_request(ONE))
    return harness


def _one_phase_token() -> CoordinatorHarness:
    harness = _one_phase()
    harness.hear(P, committing())
    return harness


def _one_phase_homeless() -> CoordinatorHarness:
    harness = _one_phase()
    harness.leave(P)
    return harness


def _one_phase_resolving() -> CoordinatorHarness:
    harness = _one_phase_token()
    harness.leave(P)
    return harness


def _one_phase_unknown() -> CoordinatorHarness:
    harness = _one_phase()
    harness.hear(P, one_phase_done(Outcome.UNKNOWN))
    return harness


def _recording() -> CoordinatorHarness:
    harness = _preparing_one_vote()
    harness.hear(P, voted(2))
    return harness


def _committing() -> CoordinatorHarness:
    harness = _recording()
    harness.logged()
    return harness


def _committing_one_acked() -> CoordinatorHarness:
    harness = _committing()
    harness.hear(P, acked(1))
    return harness


def _committing_waits() -> CoordinatorHarness:
    harness = _committing()
    harness.leave(P)
    return harness


def _committing_client_told() -> CoordinatorHarness:
    harness = _committing()
    harness.sleep(LIMITS.ack_wait_ms)
    return harness


def _committing_recovered() -> CoordinatorHarness:
    return CoordinatorHarness(CLIENT, OTHER_CLIENT, pending=(decision(EARLY),))


def _polled() -> CoordinatorHarness:
    harness = _absent()
    harness.hear(CLIENT, commit_request(registered(*TWO)))
    harness.hear(P, polled(1))
    harness.hear(P, polled(2))
    return harness


def _deciding() -> CoordinatorHarness:
    """The first branch is to decide."""
    harness = _absent()
    harness.hear(CLIENT, commit_request(registered(*TWO), register=REGISTER, decider=1))
    harness.hear(P, polled(2))
    return harness


def _deciding_row() -> CoordinatorHarness:
    """None of them is: a process with the register writes the row alone."""
    harness = _absent()
    harness.hear(CLIENT, commit_request(registered(*EARLY), register=REGISTER))
    return harness


def _left() -> CoordinatorHarness:
    """It was to decide, and its process was lost."""
    harness = _deciding()
    harness.leave(P)
    harness.join(P)
    return harness


def _committing_elsewhere() -> CoordinatorHarness:
    harness = _polled()
    harness.hear(L, decided(1, 2))
    return harness


def _committed() -> CoordinatorHarness:
    harness = _committing_one_acked()
    harness.hear(P, acked(2))
    return harness


def _aborted() -> CoordinatorHarness:
    harness = _preparing_one_vote()
    harness.hear(P, voted(2, Vote.ABORT))
    return harness


STORIES: dict[str, Callable[[], CoordinatorHarness]] = {
    "absent": _absent,
    "preparing": _preparing,
    "preparing, one vote": _preparing_one_vote,
    "one phase": _one_phase,
    "one phase, token": _one_phase_token,
    "one phase, homeless": _one_phase_homeless,
    "one phase, resolving": _one_phase_resolving,
    "one phase, unknown": _one_phase_unknown,
    "recording": _recording,
    "committing": _committing,
    "committing, one acked": _committing_one_acked,
    "committing, waits": _committing_waits,
    "committing, client told": _committing_client_told,
    "committing, recovered": _committing_recovered,
    "polled": _polled,
    "deciding": _deciding,
    "deciding, the row alone": _deciding_row,
    "left": _left,
    "committing, decided elsewhere": _committing_elsewhere,
    "committed": _committed,
    "aborted": _aborted,
}

# --------------------------------------------------------------------------------------------------- what comes in


def _replaced(harness: CoordinatorHarness) -> Output:
    return harness.join(P + 100)


def _looked(found: bool) -> Callable[[CoordinatorHarness], Output]:
    lookup = Lookup(OTHER_CLIENT, outcome_request(TWO, epoch=EARLIER), xid())
    return lambda harness: harness.looked(lookup, decision() if found else None)


def _later(ms: int) -> Callable[[CoordinatorHarness], Output]:
    def sleep(harness: CoordinatorHarness) -> Output:
        return Output(send=harness.sleep(ms))

    return sleep


def _about(number: int) -> Callable[[CoordinatorHarness], Output]:
    return lambda harness: harness.hear(P, voted(number))


def _answered(harness: CoordinatorHarness, found: Found, *numbers: int) -> Output:
    """A branch asks, and the register answers."""
    asked = harness.hear(P, doubt(1))
    heard = harness.hear(L, answer(found, *numbers))
    return Output(send=asked.send + heard.send, done=heard.done, notes=asked.notes + heard.notes)


INPUTS: dict[str, Callable[[CoordinatorHarness], Output]] = {
    "commit request": lambda o: o.hear(OTHER_CLIENT, commit_request(TWO)),
    "commit request, wait decision": lambda o: o.hear(OTHER_CLIENT, commit_request(TWO, wait=Wait.DECISION)),
    "commit request, earlier epoch": lambda o: o.hear(OTHER_CLIENT, commit_request(TWO, epoch=EARLIER)),
    "rollback request": lambda o: o.hear(OTHER_CLIENT, rollback_request(TWO)),
    "outcome request": lambda o: o.hear(OTHER_CLIENT, outcome_request(TWO)),
    "outcome request, earlier epoch": lambda o: o.hear(OTHER_CLIENT, outcome_request(TWO, epoch=EARLIER)),
    "looked, none": _looked(False),
    "looked, record": _looked(True),
    "voted prepared": lambda o: o.hear(P, voted(1)),
    "voted read-only": lambda o: o.hear(P, voted(1, Vote.READ_ONLY)),
    "voted abort": lambda o: o.hear(P, voted(1, Vote.ABORT)),
    "voted, last": lambda o: o.hear(P, voted(2)),
    "voted, by another": lambda o: o.hear(Q, voted(1, Vote.ABORT)),
    "voted, not listed": lambda o: o.hear(P, voted(9, Vote.ABORT)),
    "committing": lambda o: o.hear(P, committing()),
    "one phase committed": lambda o: o.hear(P, one_phase_done()),
    "one phase aborted": lambda o: o.hear(P, one_phase_done(Outcome.ABORTED)),
    "one phase unknown": lambda o: o.hear(P, one_phase_done(Outcome.UNKNOWN)),
    "resolved committed": lambda o: o.hear(P, resolved()),
    "resolved by another": lambda o: o.hear(Q, resolved()),
    "resolved by another, unknown": lambda o: o.hear(Q, resolved(Outcome.UNKNOWN)),
    "acked": lambda o: o.hear(P, acked(1)),
    "acked, last": lambda o: o.hear(P, acked(2)),
    "acked, by hand": lambda o: o.hear(P, acked(1, FinishResult.HEURISTIC)),
    "acked by another": lambda o: o.hear(Q, acked(1)),
    "inquiry": lambda o: o.hear(P, inquiry(1)),
    "inquiry, not listed": lambda o: o.hear(P, inquiry(9)),
    "inquiry, time left": lambda o: o.hear(P, inquiry(1, left_ms=1_000)),
    "inquiry by another": lambda o: o.hear(Q, inquiry(1)),
    "decided": lambda o: o.hear(L, decided(1, 2)),
    "decided, no branches": lambda o: o.hear(L, decided()),
    "decided, by another": lambda o: o.hear(P, decided(1, 2)),
    "the register has it committed": lambda o: o.hear(L, answer(Found.COMMITTED, 1, 2)),
    "the register has it aborted": lambda o: o.hear(L, answer(Found.ABORTED)),
    "the register cannot tell": lambda o: o.hear(L, answer(Found.UNREACHABLE)),
    "the register refuses": lambda o: o.hear(L, answer(Found.LOST)),
    "session with the register lost": lambda o: o.leave(L),
    "doubt": lambda o: o.hear(P, doubt(1)),
    "doubt, not listed": lambda o: o.hear(P, doubt(9)),
    "doubt, time left": lambda o: o.hear(P, doubt(1, left_ms=1_000)),
    "doubt, and it was committed": lambda o: _answered(o, Found.COMMITTED, 1, 2),
    "doubt, and it is aborted": lambda o: _answered(o, Found.ABORTED),
    "logged": lambda o: o.logged(),
    "not logged": lambda o: o.not_logged(),
    "session lost": lambda o: o.leave(P),
    "session of another lost": lambda o: o.leave(Q),
    "session of the client lost": lambda o: o.leave(CLIENT),
    "session found": lambda o: o.join(P),
    "session replaced": _replaced,
    "hello again": lambda o: o.hear(P, hello(P)),
    "hello as another": lambda o: o.hear(P, hello(Q)),
    "time up": _later(LEFT_MS),
    "later": _later(LEFT_MS + LIMITS.ack_wait_ms),
    "much later": _later(20 * LIMITS.max_timeout_ms),
    "draining": lambda o: o.step(Drain()),
    "log trouble": lambda o: o.step(LogHealth(False, "the disk is full")),
    "log works": lambda o: o.step(LogHealth(True)),
    "log forgot": lambda o: o.step(Forgot(1)),
}


def arrived(harness: CoordinatorHarness, arrive: Callable[[CoordinatorHarness], Output]) -> str:
    """What one input does, in words; "nothing" if it leaves no trace, "noted" if it only matters later."""
    before, state = copy.deepcopy(_kept(harness)), harness.state()
    words = effects(arrive(harness))
    if words or harness.state() is not state:
        return "; ".join([harness.state().value, *words])
    return "nothing" if _kept(harness) == before else "noted"


def _kept(harness: CoordinatorHarness) -> tuple[object, ...]:
    return harness.core.state.transactions, harness.core.state.questions, harness.leftovers()


def _input(name: str, harness: CoordinatorHarness) -> Callable[[CoordinatorHarness], Output]:
    """`session found` is for a process that is not connected."""
    if name == "session found" and P in harness.core.state.directory.sessions:
        return lambda o: o.join(Q + 100)
    return INPUTS[name]


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_what_each_input_does_in_each_state(name: str, word: str) -> None:
    harness = STORIES[name]()
    assert arrived(harness, _input(word, harness)) == EXPECTED[name].get(word, "nothing")


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_an_end_stays_whatever_comes_after(name: str, word: str) -> None:
    """Each input twice, then every other one: the outcome that anybody has heard never changes.

    What the log or a register says is left out, because here it would not be true, and so is giving up what was forgotten long
    ago: a root that gives up says itself that it has not asked for the commit.
    """
    harness = STORIES[name]()
    ended = harness.state()
    for again in (word, word, *INPUTS):
        forgotten = harness.state() is State.ABSENT and ended is not State.ABSENT
        untrue = "session found", "session replaced", "looked", "decided", "doubt, and", "the register"
        if again.startswith(untrue) or (forgotten and again == "rollback request"):
            continue
        INPUTS[again](harness)
        ended = harness.state() if harness.state() is not State.ABSENT else ended
    told = {m.outcome for _, m in harness.all.send if isinstance(m, OutcomeReply)} - {Outcome.UNKNOWN}
    assert len(told) <= 1
    assert len(harness.all.append) <= 1
    assert len(harness.all.done) <= 1


def test_every_state_is_reached_and_the_table_has_exactly_these_entries() -> None:
    """As a grid, one row a state; inputs in the order of `Input`.  A dot is an input that nobody should send there."""
    assert {story().state() for story in STORIES.values()} == set(State)
    grid = {state.value: "".join("x" if (state, kind) in TABLE else "." for kind in Input) for state in State}
    assert grid == GRID


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", Input)
def test_every_entry_is_entered_and_every_missing_one_is_noted(state: State, kind: Input) -> None:
    harness = next(harness for harness in (story() for story in STORIES.values()) if harness.state() is state)
    session, event = _bare(kind)
    before = copy.deepcopy(_kept(harness))
    harness.core.state.out = out = Output()
    enter(harness.core.state, xid(), kind, session, event)
    if (state, kind) not in TABLE:
        assert effects(out) == ["violation"]
        assert _kept(harness) == before
    else:
        assert "violation" not in effects(out)


def _bare(kind: Input) -> tuple[int | None, object]:
    """An input as the table's actions take it."""
    messages: dict[Input, tuple[int | None, object]] = {
        Input.COMMIT_REQUEST: (CLIENT, commit_request(TWO)),
        Input.ROLLBACK_REQUEST: (CLIENT, rollback_request(TWO)),
        Input.OUTCOME_REQUEST: (CLIENT, outcome_request(TWO)),
        Input.VOTED: (P, voted(1)),
        Input.COMMITTING: (P, committing()),
        Input.ONE_PHASE_DONE: (P, one_phase_done()),
        Input.RESOLVED: (P, resolved()),
        Input.ACKED: (P, acked(1)),
        Input.NOT_LOGGED: (None, FULL),
        Input.DECIDED: (L, decided(1, 2)),
        Input.CLAIMED: (L, answer(Found.ABORTED)),
        Input.UNDECIDED: (L, answer(Found.UNREACHABLE)),
        Input.SESSION_LOST: (P, ONE[0].branch),
        Input.SESSION_FOUND: (P, ONE[0].branch),
    }
    return messages.get(kind, (None, None))
