"""Every state of a branch, reached by events through the real door, against every input: what exactly happens.

`EXPECTED` (in `participant_expected`) is a second statement of the production table, so that neither can drift
without the other. A line reads: the state afterwards; what was asked of the resource; what was sent; whether a
local waiter was told. An input that has no line changes nothing and has no effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.protocol.participant_expected import EXPECTED, GRID
from tests.protocol.participant_kit import (
    DEADLINE_MS,
    ENOUGH,
    FAILED,
    OTHER,
    T0,
    Process,
    answers,
    commit,
    decide,
    gid,
    one_phase,
    prepare,
    resolve,
    rollback,
)
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc._protocol.participant.branch import BranchInput as In
from txrpc._protocol.participant.branch import BranchState, Effects, Operation, ParticipantBranch
from txrpc._protocol.participant.table import TABLE
from txrpc.ids import BranchId

ONE = gid(1)
FOREIGN = gid(9, participant=OTHER)
DONE_1PC = (Outcome.COMMITTED, None)

# ------------------------------------------------------------------------------------------------ how to get there

Story = Callable[[Process], None]


def _active(p: Process) -> None:
    p.open(ONE)


def _in_use(p: Process) -> None:
    p.open(ONE).users = 1


def _doomed(p: Process) -> None:
    p.open(ONE).doom = FAILED


def _voting(p: Process) -> None:
    _active(p)
    p.hear(prepare(ONE))


def _voting_in_vain(p: Process) -> None:
    _voting(p)
    p.hear(rollback(ONE))


def _voting_early(p: Process) -> None:
    _active(p)
    p.local(In.VOTE_EARLY, ONE)


def _voting_early_in_vain(p: Process) -> None:
    _voting_early(p)
    p.hear(rollback(ONE))


def _prepared(p: Process) -> None:
    _voting(p)
    p.local(In.PREPARED, ONE, "t1")


def _one_phase(p: Process) -> None:
    _active(p)
    p.hear(one_phase(ONE))


def _one_phase_here(p: Process) -> None:
    _active(p)
    p.local(In.LOCAL_COMMIT, ONE, 1)


def _committing(p: Process) -> None:
    _prepared(p)
    p.hear(commit(ONE))


def _committing_waits(p: Process) -> None:
    _committing(p)
    p.local(In.FINISH_FAILED, ONE, FAILED)


def _undoing(p: Process) -> None:
    _prepared(p)
    p.hear(rollback(ONE))


def _undoing_waits(p: Process) -> None:
    _undoing(p)
    p.local(In.FINISH_FAILED, ONE, FAILED)


def _rolling_back(p: Process) -> None:
    _active(p)
    p.hear(rollback(ONE))


def _rolling_back_in_use(p: Process) -> None:
    _in_use(p)
    p.hear(rollback(ONE))
    p.table.rows[ONE.branch].users = 0


def _resolving(p: Process) -> None:
    p.table.resolve_foreign(ONE, "t1", p.now_ms)


def _resolving_waits(p: Process) -> None:
    _resolving(p)
    p.local(In.FINISH_FAILED, ONE, FAILED)


def _ended_committed(p: Process) -> None:
    _committing(p)
    p.local(In.FINISHED, ONE, FinishResult.DONE)


def _ended_undone(p: Process) -> None:
    _undoing(p)
    p.local(In.FINISHED, ONE, FinishResult.DONE)


def _ended_rolled_back(p: Process) -> None:
    _rolling_back(p)
    p.local(In.ROLLED_BACK, ONE)


def _ended_read_only(p: Process) -> None:
    _voting(p)
    p.local(In.READ_ONLY, ONE)


def _ended_one_phase(p: Process) -> None:
    _one_phase(p)
    p.local(In.ONE_PHASE_ENDED, ONE, DONE_1PC)


def _ended_unknown(p: Process) -> None:
    _one_phase(p)
    p.local(In.ONE_PHASE_ENDED, ONE, (Outcome.UNKNOWN, FAILED))


STORIES: dict[str, Story] = {
    "absent": lambda p: None,
    "active": _active,
    "active, in use": _in_use,
    "active, doomed": _doomed,
    "voting": _voting,
    "voting in vain": _voting_in_vain,
    "voting early": _voting_early,
    "voting early in vain": _voting_early_in_vain,
    "prepared": _prepared,
    "one phase": _one_phase,
    "one phase, local": _one_phase_here,
    "committing": _committing,
    "committing, waits": _committing_waits,
    "undoing": _undoing,
    "undoing, waits": _undoing_waits,
    "rolling back": _rolling_back,
    "rolling back, interrupted": _rolling_back_in_use,
    "resolving": _resolving,
    "resolving, waits": _resolving_waits,
    "ended: committed": _ended_committed,
    "ended: undone": _ended_undone,
    "ended: rolled back": _ended_rolled_back,
    "ended: read-only": _ended_read_only,
    "ended: one phase": _ended_one_phase,
    "ended: unknown": _ended_unknown,
}

# --------------------------------------------------------------------------------------------------- what comes in


INPUTS: dict[str, Callable[[Process], Effects]] = {
    "prepare": lambda p: p.hear(prepare(ONE)),
    "prepare, other count": lambda p: p.hear(prepare(ONE, calls=2)),
    "vote early": lambda p: p.local(In.VOTE_EARLY, ONE),
    "commit one phase": lambda p: p.hear(one_phase(ONE)),
    "commit one phase, other count": lambda p: p.hear(one_phase(ONE, calls=0)),
    "decide": lambda p: p.hear(decide(ONE)),
    "decide, other count": lambda p: p.hear(decide(ONE, calls=0)),
    "commit": lambda p: p.hear(commit(ONE)),
    "rollback": lambda p: p.hear(rollback(ONE)),
    "resolve": lambda p: p.hear(resolve(ONE)),
    "resolve foreign": lambda p: p.table.resolve_foreign(ONE, "t1", p.now_ms),
    "in doubt": lambda p: p.table.in_doubt(ONE, 10, p.now_ms),
    "connected": lambda p: p.table.connected("c1", p.now_ms),
    "local commit": lambda p: p.local(In.LOCAL_COMMIT, ONE, 1),
    "local rollback": lambda p: p.local(In.LOCAL_ROLLBACK, ONE, ENOUGH),
    "released": lambda p: p.local(In.RELEASED, ONE),
    "time up": lambda p: p.sleep(DEADLINE_MS - T0),
    "much later": lambda p: p.sleep(DEADLINE_MS - T0 + 60_000),
    "prepared": lambda p: p.local(In.PREPARED, ONE, "t1"),
    "read only": lambda p: p.local(In.READ_ONLY, ONE),
    "kept open": lambda p: p.local(In.KEPT_OPEN, ONE),
    "prepare failed": lambda p: p.local(In.PREPARE_FAILED, ONE, FAILED),
    "one phase ended": lambda p: p.local(In.ONE_PHASE_ENDED, ONE, DONE_1PC),
    "one phase unknown": lambda p: p.local(In.ONE_PHASE_ENDED, ONE, (Outcome.UNKNOWN, FAILED)),
    "finished": lambda p: p.local(In.FINISHED, ONE, FinishResult.DONE),
    "finished, by hand": lambda p: p.local(In.FINISHED, ONE, FinishResult.HEURISTIC),
    "finish failed": lambda p: p.local(In.FINISH_FAILED, ONE, FAILED),
    "rolled back": lambda p: p.local(In.ROLLED_BACK, ONE),
}


def arrived(process: Process, arrive: Callable[[Process], Effects]) -> str:
    """What one input does, in words; "nothing" if it leaves no trace, "noted" if it only matters later."""
    before = copy.deepcopy(process.table.rows)
    effects = arrive(process)
    rows = process.table.rows
    if not (effects.do or effects.send or effects.settle or effects.votes) and process.state(ONE) is _state(before):
        return "nothing" if rows == before else "noted"
    return described(process, effects)


def _state(rows: dict[BranchId, ParticipantBranch]) -> BranchState:
    return rows[ONE.branch].state if ONE.branch in rows else BranchState.ABSENT


def described(process: Process, effects: Effects) -> str:
    parts = [process.state(ONE).value]
    if effects.do:
        parts.append("do " + ", ".join(do.operation.value for do in effects.do))
    if effects.send:
        parts.append("send " + ", ".join(answers(effects.send)))
    if effects.votes:
        parts.append("vote " + ", ".join(vote.name if vote else "nothing yet" for _, vote, _ in effects.votes))
    if effects.settle:
        parts.append("tell " + ", ".join(result.name for _, result, _ in effects.settle))
    return "; ".join(parts)


def told(story: Story) -> Process:
    process = Process()
    story(process)
    return process


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_what_each_input_does_in_each_state(name: str, word: str) -> None:
    assert arrived(told(STORIES[name]), INPUTS[word]) == EXPECTED[name].get(word, "nothing")


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_an_input_that_comes_twice_starts_nothing_twice(name: str, word: str) -> None:
    """Whatever the first one started is still at work when the second one comes."""
    process = told(STORIES[name])
    INPUTS[word](process)
    at_work = process.table.rows[ONE.branch].at_work if ONE.branch in process.table.rows else False
    again = INPUTS[word](process)
    assert not (at_work and [do for do in again.do if do.operation is not Operation.INTERRUPT])


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_a_message_about_another_branch_leaves_this_one_alone(name: str, word: str) -> None:
    process = told(STORIES[name])
    before = copy.deepcopy(process.table.rows.get(ONE.branch))
    for message in (prepare(FOREIGN), one_phase(FOREIGN), resolve(FOREIGN), commit(FOREIGN), rollback(FOREIGN)):
        process.hear(message)
    assert process.table.rows.get(ONE.branch) == before


def test_every_entry_of_the_table_is_visited() -> None:
    """The production table has no entry for a state that no story here reaches, and the stories reach every state."""
    reached = {told(story).state(ONE) for story in STORIES.values()}
    assert reached == set(BranchState)
    assert {state for state, _ in TABLE} <= reached
    assert {kind for _, kind in TABLE} == set(In)


def test_the_table_has_exactly_these_entries() -> None:
    """As a grid, one row a state; inputs in the order of `BranchInput`.  A dot is an input that nobody should send there."""
    grid = {state.value: "".join("x" if (state, kind) in TABLE else "." for kind in In) for state in BranchState}
    assert grid == GRID
