"""The participant's table: what each input does to a branch in each state, and which states it may lead to.

A missing entry is a mistake of the sender, or of this program: it is reported, and changes nothing.  An action that leads to a
state that its entry does not name is a mistake of this program, and raises.  The diagrams in docs/protocol.md are made from
this table (`scripts/diagrams.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from txrpc._protocol.messages import Trouble
from txrpc._protocol.participant import phase_one, phase_two
from txrpc._protocol.participant.branch import BranchInput, BranchState
from txrpc._protocol.participant.state import ParticipantState
from txrpc.ids import BranchId

__all__ = ["TABLE", "Entry", "enter"]

Action = Callable[[ParticipantState, Any, Any], None]
"""Takes the state, the branch's row if there is one, and what came with the input."""


class Entry(NamedTuple):
    """What an input does in a state, and the states in which the branch may be after that."""

    action: Action
    next_states: frozenset[BranchState]


def enter(state: ParticipantState, kind: BranchInput, branch: BranchId, detail: object) -> None:
    """Give *branch* an input; raises `AssertionError` if the entry leads where the table does not allow."""
    row = state.rows.get(branch)
    before = BranchState.ABSENT if row is None else row.state
    entry = TABLE.get((before, kind))
    if entry is None:
        state.out.mistakes.append(f"{kind.value} of branch {branch} in state {before.value}")
        return
    if row is not None and kind in _RESULTS:
        row.at_work = False
        if row.trouble is not None and kind is not BranchInput.FINISH_FAILED:
            row.trouble = None
            state.out.send.append(Trouble(row.gid, None))
    entry.action(state, row, detail)
    now = state.rows.get(branch)
    after = BranchState.ABSENT if now is None else now.state
    if after not in entry.next_states:
        raise AssertionError(f"{kind.value} took branch {branch} from {before.value} to {after.value}")


def _ignore(state: ParticipantState, row: object, detail: object) -> None:
    """Late, repeated, or answered when the work under way ends."""


def _to(action: Action, *next_states: BranchState) -> Entry:
    return Entry(action, frozenset(next_states))


_S, _I = BranchState, BranchInput

TABLE: Final[dict[tuple[BranchState, BranchInput], Entry]] = {
    (_S.ABSENT, _I.PREPARE): _to(phase_one.prepare_unknown, _S.ABSENT),
    (_S.ABSENT, _I.COMMIT_ONE_PHASE): _to(phase_one.one_phase_unknown, _S.ABSENT),
    (_S.ABSENT, _I.DECIDE): _to(phase_one.one_phase_unknown, _S.ABSENT),
    (_S.ABSENT, _I.COMMIT): _to(phase_two.commit_foreign, _S.COMMITTING),
    (_S.ABSENT, _I.ROLLBACK): _to(phase_two.rollback_foreign, _S.ABORTING),
    (_S.ABSENT, _I.RESOLVE): _to(phase_two.resolve_absent, _S.ABSENT),
    (_S.ACTIVE, _I.PREPARE): _to(phase_one.prepare, _S.ROLLING_BACK, _S.VOTING),
    (_S.ACTIVE, _I.VOTE_EARLY): _to(phase_one.vote_early, _S.ROLLING_BACK, _S.VOTING),
    (_S.ACTIVE, _I.COMMIT_ONE_PHASE): _to(phase_one.one_phase, _S.ONE_PHASE, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.DECIDE): _to(phase_one.decide, _S.ONE_PHASE, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.ROLLBACK): _to(phase_two.rollback_active, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.RESOLVE): _to(phase_two.resolve_active, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.LOCAL_COMMIT): _to(phase_one.local_commit, _S.ONE_PHASE, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.LOCAL_ROLLBACK): _to(phase_two.local_rollback, _S.ROLLING_BACK),
    (_S.ACTIVE, _I.TIME_UP): _to(phase_two.deadline, _S.ROLLING_BACK),
    (_S.VOTING, _I.PREPARE): _to(_ignore, _S.VOTING),
    (_S.VOTING, _I.ROLLBACK): _to(phase_two.rollback_voting, _S.VOTING),
    (_S.VOTING, _I.LOCAL_ROLLBACK): _to(phase_two.give_up_voting, _S.VOTING),
    (_S.VOTING, _I.TIME_UP): _to(phase_two.overdue, _S.VOTING),
    (_S.VOTING, _I.PREPARED): _to(phase_one.did_prepare, _S.ABORTING, _S.PREPARED),
    (_S.VOTING, _I.READ_ONLY): _to(phase_one.was_read_only, _S.ENDED),
    (_S.VOTING, _I.KEPT_OPEN): _to(phase_one.kept_open, _S.ACTIVE, _S.ROLLING_BACK, _S.ENDED),
    (_S.VOTING, _I.PREPARE_FAILED): _to(phase_one.prepare_failed, _S.ABORTING),
    (_S.PREPARED, _I.PREPARE): _to(phase_one.prepare_again, _S.PREPARED),
    (_S.PREPARED, _I.COMMIT): _to(phase_two.commit, _S.COMMITTING),
    (_S.PREPARED, _I.ROLLBACK): _to(phase_two.rollback_prepared, _S.ABORTING),
    (_S.PREPARED, _I.LOCAL_ROLLBACK): _to(phase_two.give_up_prepared, _S.PREPARED),
    (_S.PREPARED, _I.TIME_UP): _to(phase_two.ask_again, _S.PREPARED),
    (_S.ONE_PHASE, _I.COMMIT_ONE_PHASE): _to(_ignore, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.DECIDE): _to(_ignore, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.ROLLBACK): _to(_ignore, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.RESOLVE): _to(_ignore, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.TIME_UP): _to(phase_two.overdue, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.ONE_PHASE_ENDED): _to(phase_one.one_phase_ended, _S.ENDED),
    (_S.COMMITTING, _I.COMMIT): _to(_ignore, _S.COMMITTING),
    (_S.COMMITTING, _I.TIME_UP): _to(phase_two.try_commit_again, _S.COMMITTING),
    (_S.COMMITTING, _I.FINISHED): _to(phase_two.finished_commit, _S.ENDED, _S.PREPARED),
    (_S.COMMITTING, _I.FINISH_FAILED): _to(phase_two.finish_failed, _S.COMMITTING),
    (_S.ABORTING, _I.PREPARE): _to(phase_one.prepare_late, _S.ABORTING),
    (_S.ABORTING, _I.ROLLBACK): _to(_ignore, _S.ABORTING),
    (_S.ABORTING, _I.LOCAL_ROLLBACK): _to(phase_two.settle_later, _S.ABORTING),
    (_S.ABORTING, _I.TIME_UP): _to(phase_two.try_undo_again, _S.ABORTING),
    (_S.ABORTING, _I.FINISHED): _to(phase_two.finished_undo, _S.ENDED),
    (_S.ABORTING, _I.FINISH_FAILED): _to(phase_two.finish_failed, _S.ABORTING),
    (_S.ROLLING_BACK, _I.PREPARE): _to(phase_one.prepare_late, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.COMMIT_ONE_PHASE): _to(phase_one.one_phase_undone, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.DECIDE): _to(phase_one.one_phase_undone, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.ROLLBACK): _to(_ignore, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.RESOLVE): _to(phase_two.resolve_later, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.LOCAL_COMMIT): _to(phase_two.settle_later, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.LOCAL_ROLLBACK): _to(phase_two.settle_later, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.RELEASED): _to(phase_two.released, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.TIME_UP): _to(phase_two.break_off, _S.ROLLING_BACK),
    (_S.ROLLING_BACK, _I.ROLLED_BACK): _to(phase_two.rolled_back, _S.ENDED),
    (_S.RESOLVING, _I.RESOLVE): _to(_ignore, _S.RESOLVING),
    (_S.RESOLVING, _I.TIME_UP): _to(phase_two.try_resolve_again, _S.RESOLVING),
    (_S.RESOLVING, _I.ONE_PHASE_ENDED): _to(phase_two.resolved, _S.ABSENT, _S.ENDED),
    (_S.RESOLVING, _I.FINISH_FAILED): _to(phase_two.finish_failed, _S.RESOLVING),
    (_S.ENDED, _I.PREPARE): _to(phase_one.prepare_late, _S.ENDED),
    (_S.ENDED, _I.COMMIT_ONE_PHASE): _to(phase_one.one_phase_again, _S.ENDED),
    (_S.ENDED, _I.DECIDE): _to(phase_one.decide_again, _S.ENDED),
    (_S.ENDED, _I.COMMIT): _to(phase_two.commit_again, _S.ENDED),
    (_S.ENDED, _I.ROLLBACK): _to(_ignore, _S.ENDED),
    (_S.ENDED, _I.RESOLVE): _to(phase_two.resolve_ended, _S.ENDED, _S.RESOLVING),
    (_S.ENDED, _I.LOCAL_COMMIT): _to(phase_two.settle_now, _S.ENDED),
    (_S.ENDED, _I.LOCAL_ROLLBACK): _to(phase_two.settle_now, _S.ENDED),
    (_S.ENDED, _I.RELEASED): _to(_ignore, _S.ENDED),
    (_S.ENDED, _I.TIME_UP): _to(phase_two.expire, _S.ABSENT),
}

_RESULTS: Final = frozenset(
    {
        _I.PREPARED,
        _I.READ_ONLY,
        _I.KEPT_OPEN,
        _I.PREPARE_FAILED,
        _I.ONE_PHASE_ENDED,
        _I.FINISHED,
        _I.FINISH_FAILED,
        _I.ROLLED_BACK,
    }
)
"""What ends an operation's work."""
