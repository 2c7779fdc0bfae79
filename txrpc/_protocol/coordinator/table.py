"""The coordinator's table: what each input does to a transaction in each state, and which states it may lead to.

A missing entry is a mistake of the sender, or of this program: it is reported, and changes nothing.  An action that leads to a
state that its entry does not name is a mistake of this program, and raises.  The diagrams in docs/protocol.md are made from
this table (`scripts/diagrams.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from txrpc._protocol.coordinator import one_phase, phases, registers, requests
from txrpc._protocol.coordinator.rows import Input, State
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc.ids import Xid

__all__ = ["TABLE", "Entry", "enter"]

Action = Callable[[CoordinatorState, Any, Any, Any], None]
"""Takes the state, the transaction's row if there is one, the session that spoke if one did, and what it said."""


class Entry(NamedTuple):
    """What an input does in a state, and the states in which the transaction may be after that."""

    action: Action
    next_states: frozenset[State]


def enter(state: CoordinatorState, xid: Xid, kind: Input, session: int | None, message: object) -> None:
    """Give the transaction *xid* an input; raises `AssertionError` if the entry leads where the table does not allow."""
    before = state.state_of(xid)
    entry = TABLE.get((before, kind))
    if entry is None:
        state.violation(session, message, f"{kind.value} in state {before.value}")
        return
    entry.action(state, state.transactions.get(xid), session, message)
    after = state.state_of(xid)
    if after not in entry.next_states:
        raise AssertionError(f"{kind.value} took transaction {xid} from {before.value} to {after.value}")


def _ignore(state: CoordinatorState, row: object, session: object, message: object) -> None:
    """Late, repeated, or overtaken: legal, and nothing to do."""


def _to(action: Action, *next_states: State) -> Entry:
    return Entry(action, frozenset(next_states))


_S, _I = State, Input

TABLE: Final[dict[tuple[State, Input], Entry]] = {
    (_S.ABSENT, _I.COMMIT_REQUEST): _to(
        requests.begin_commit,
        _S.ABORTED,
        _S.ABSENT,
        _S.COMMITTED,
        _S.DECIDING,
        _S.ONE_PHASE,
        _S.POLLED,
        _S.PREPARING,
        _S.RECORDING,
    ),
    (_S.ABSENT, _I.ROLLBACK_REQUEST): _to(requests.give_up, _S.ABORTED, _S.ABSENT),
    (_S.ABSENT, _I.OUTCOME_REQUEST): _to(requests.presume, _S.ABORTED, _S.ABSENT, _S.ONE_PHASE),
    (_S.ABSENT, _I.VOTED): _to(_ignore, _S.ABSENT),
    (_S.ABSENT, _I.ONE_PHASE_DONE): _to(_ignore, _S.ABSENT),
    (_S.ABSENT, _I.RESOLVED): _to(_ignore, _S.ABSENT),
    (_S.ABSENT, _I.COMMITTING): _to(_ignore, _S.ABSENT),
    (_S.ABSENT, _I.ACKED): _to(phases.late_ack, _S.ABSENT),
    (_S.ABSENT, _I.SESSION_FOUND): _to(_ignore, _S.ABSENT),
    (_S.ABSENT, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.ABSENT, _I.CLAIMED): _to(registers.claimed, _S.ABORTED),
    (_S.PREPARING, _I.COMMIT_REQUEST): _to(requests.join_waiters, _S.PREPARING),
    (_S.PREPARING, _I.ROLLBACK_REQUEST): _to(requests.give_up_early, _S.ABORTED),
    (_S.PREPARING, _I.OUTCOME_REQUEST): _to(requests.join_waiters, _S.PREPARING),
    (_S.PREPARING, _I.VOTED): _to(
        phases.voted, _S.ABSENT, _S.ABORTED, _S.COMMITTED, _S.DECIDING, _S.POLLED, _S.PREPARING, _S.RECORDING
    ),
    (_S.PREPARING, _I.SESSION_LOST): _to(phases.voter_lost, _S.ABORTED, _S.ABSENT),
    (_S.PREPARING, _I.TIME_UP): _to(phases.time_up, _S.ABORTED, _S.ABSENT),
    (_S.PREPARING, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.PREPARING, _I.CLAIMED): _to(registers.claimed, _S.ABORTED),
    (_S.POLLED, _I.COMMIT_REQUEST): _to(registers.votes, _S.POLLED),
    (_S.POLLED, _I.ROLLBACK_REQUEST): _to(requests.give_up_early, _S.ABORTED),
    (_S.POLLED, _I.OUTCOME_REQUEST): _to(registers.outcome, _S.POLLED),
    (_S.POLLED, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.POLLED, _I.CLAIMED): _to(registers.claimed, _S.ABORTED),
    (_S.POLLED, _I.TIME_UP): _to(registers.leave, _S.ABSENT),
    (_S.DECIDING, _I.COMMIT_REQUEST): _to(requests.join_waiters, _S.DECIDING),
    (_S.DECIDING, _I.ROLLBACK_REQUEST): _to(requests.join_waiters, _S.DECIDING),
    (_S.DECIDING, _I.OUTCOME_REQUEST): _to(requests.join_waiters, _S.DECIDING),
    (_S.DECIDING, _I.ONE_PHASE_DONE): _to(registers.decider_done, _S.ABORTED, _S.COMMITTED, _S.COMMITTING, _S.LEFT),
    (_S.DECIDING, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.DECIDING, _I.CLAIMED): _to(registers.claimed, _S.ABORTED),
    (_S.DECIDING, _I.UNDECIDED): _to(registers.undecided, _S.LEFT),
    (_S.DECIDING, _I.SESSION_LOST): _to(registers.undecided, _S.LEFT),
    (_S.DECIDING, _I.TIME_UP): _to(registers.undecided, _S.LEFT),
    (_S.LEFT, _I.COMMIT_REQUEST): _to(registers.still_undecided, _S.LEFT),
    (_S.LEFT, _I.ROLLBACK_REQUEST): _to(requests.give_up_early, _S.ABORTED),
    (_S.LEFT, _I.OUTCOME_REQUEST): _to(registers.outcome, _S.LEFT),
    (_S.LEFT, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.LEFT, _I.CLAIMED): _to(registers.claimed, _S.ABORTED),
    (_S.LEFT, _I.TIME_UP): _to(registers.leave, _S.ABSENT),
    (_S.ONE_PHASE, _I.COMMIT_REQUEST): _to(requests.join_waiters, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.ROLLBACK_REQUEST): _to(requests.join_waiters, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.OUTCOME_REQUEST): _to(requests.join_waiters, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.COMMITTING): _to(one_phase.token, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.ONE_PHASE_DONE): _to(one_phase.done, _S.ABORTED, _S.COMMITTED, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.RESOLVED): _to(one_phase.done, _S.ABORTED, _S.COMMITTED, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.SESSION_LOST): _to(one_phase.committer_lost, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.SESSION_FOUND): _to(one_phase.resume, _S.ONE_PHASE),
    (_S.ONE_PHASE, _I.TIME_UP): _to(one_phase.time_up, _S.ABSENT, _S.ONE_PHASE),
    (_S.RECORDING, _I.COMMIT_REQUEST): _to(requests.join_waiters, _S.RECORDING),
    (_S.RECORDING, _I.ROLLBACK_REQUEST): _to(requests.join_waiters, _S.RECORDING),
    (_S.RECORDING, _I.OUTCOME_REQUEST): _to(requests.join_waiters, _S.RECORDING),
    (_S.RECORDING, _I.LOGGED): _to(phases.recorded, _S.COMMITTING),
    (_S.RECORDING, _I.NOT_LOGGED): _to(phases.not_recorded, _S.ABORTED),
    (_S.RECORDING, _I.TIME_UP): _to(_ignore, _S.RECORDING),
    (_S.COMMITTING, _I.COMMIT_REQUEST): _to(requests.join_waiters, _S.COMMITTING),
    (_S.COMMITTING, _I.ROLLBACK_REQUEST): _to(requests.join_waiters, _S.COMMITTING),
    (_S.COMMITTING, _I.OUTCOME_REQUEST): _to(requests.join_waiters, _S.COMMITTING),
    (_S.COMMITTING, _I.ACKED): _to(phases.acked, _S.COMMITTED, _S.COMMITTING),
    (_S.COMMITTING, _I.SESSION_LOST): _to(phases.finisher_lost, _S.COMMITTING),
    (_S.COMMITTING, _I.SESSION_FOUND): _to(phases.resume_commit, _S.COMMITTING),
    (_S.COMMITTING, _I.TIME_UP): _to(phases.ack_time_up, _S.COMMITTING),
    (_S.COMMITTING, _I.DECIDED): _to(_ignore, _S.COMMITTING),
    (_S.COMMITTED, _I.COMMIT_REQUEST): _to(requests.reply_ended, _S.COMMITTED),
    (_S.COMMITTED, _I.ROLLBACK_REQUEST): _to(requests.reply_ended, _S.COMMITTED),
    (_S.COMMITTED, _I.OUTCOME_REQUEST): _to(requests.reply_ended, _S.COMMITTED),
    (_S.COMMITTED, _I.VOTED): _to(_ignore, _S.COMMITTED),
    (_S.COMMITTED, _I.ONE_PHASE_DONE): _to(_ignore, _S.COMMITTED),
    (_S.COMMITTED, _I.RESOLVED): _to(_ignore, _S.COMMITTED),
    (_S.COMMITTED, _I.COMMITTING): _to(_ignore, _S.COMMITTED),
    (_S.COMMITTED, _I.ACKED): _to(phases.late_ack, _S.COMMITTED),
    (_S.COMMITTED, _I.SESSION_FOUND): _to(_ignore, _S.COMMITTED),
    (_S.COMMITTED, _I.DECIDED): _to(registers.say_done, _S.COMMITTED),
    (_S.ABORTED, _I.COMMIT_REQUEST): _to(requests.reply_ended, _S.ABORTED),
    (_S.ABORTED, _I.ROLLBACK_REQUEST): _to(requests.reply_ended, _S.ABORTED),
    (_S.ABORTED, _I.OUTCOME_REQUEST): _to(requests.reply_ended, _S.ABORTED),
    (_S.ABORTED, _I.VOTED): _to(_ignore, _S.ABORTED),
    (_S.ABORTED, _I.ONE_PHASE_DONE): _to(_ignore, _S.ABORTED),
    (_S.ABORTED, _I.RESOLVED): _to(_ignore, _S.ABORTED),
    (_S.ABORTED, _I.COMMITTING): _to(_ignore, _S.ABORTED),
    (_S.ABORTED, _I.ACKED): _to(phases.late_ack, _S.ABORTED),
    (_S.ABORTED, _I.SESSION_LOST): _to(_ignore, _S.ABORTED),  # by the loss of another branch of the same session
    (_S.ABSENT, _I.SESSION_LOST): _to(_ignore, _S.ABSENT),  # likewise, where only votes were collected
    (_S.ABORTED, _I.SESSION_FOUND): _to(_ignore, _S.ABORTED),
    (_S.ABORTED, _I.DECIDED): _to(registers.decided, _S.COMMITTED, _S.COMMITTING),
    (_S.ABORTED, _I.CLAIMED): _to(_ignore, _S.ABORTED),
}
