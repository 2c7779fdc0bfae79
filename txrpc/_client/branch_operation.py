"""One operation of a participant's table on its resource, and what its result is called in the table."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from txrpc._client.flow import Flow
from txrpc._client.reasons import cannot_tell, reason_of
from txrpc._client.state import Later, OpenBranch
from txrpc._failpoints import failpoint
from txrpc._protocol.messages import Outcome
from txrpc._protocol.participant.branch import BranchInput, Do, Operation
from txrpc._protocol.records import PreparedBranch
from txrpc._wire.deciding import encode_decision
from txrpc.errors import AbortCode, Reason, ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.resource import AsyncResource, Prepared, Resource, Work

__all__ = ["broke", "operate"]

logger = logging.getLogger("txrpc.client")

Result = tuple[BranchInput, Any]

_BROKE = {
    Operation.PREPARE: BranchInput.PREPARE_FAILED,
    Operation.COMMIT_ONE_PHASE: BranchInput.ONE_PHASE_ENDED,
    Operation.ROLLBACK: BranchInput.ROLLED_BACK,
}


def _why(resource: Resource | AsyncResource, error: BaseException) -> Reason:
    """Return why *error*, raised by a verb of *resource*, ends the branch; never what a database says, which may hold data."""
    reason: Reason | None = resource.classify(error)
    if reason is not None:
        return reason
    if isinstance(error, ResourceUnavailable):
        return reason_of(error)
    return Reason(AbortCode.STATEMENT_FAILED, f"{type(error).__name__} in resource {resource.name}")


def operate(
    do: Do, resource: Resource | AsyncResource, branch: OpenBranch | None, committing: Callable[[str], Any]
) -> Flow[Result | Later | None]:
    """Carry out *do* on *branch*, if this process holds it.  Never raises but for cancellation.

    Returns the result, or how to ask for it later; None if *do* asks for it, and the resource cannot tell yet, or if *do* is to
    make another one end sooner.
    """
    work = branch.work if branch is not None else None
    if do.operation is Operation.INTERRUPT:
        yield resource.interrupt, (work,)
        return None
    if do.operation is Operation.ASK_AGAIN and branch is not None and branch.later is not None:
        return (yield from branch.later.ask())
    step = do.operation.value if do.decides is None else "decide"
    failpoint(f"participant.before_{step}")
    result = yield from _operate(do, resource, work, committing)
    failpoint(f"participant.after_{step}")
    return result


def broke(
    do: Do, resource: Resource | AsyncResource, branch: OpenBranch | None, error: BaseException
) -> Flow[Result | Later | None]:
    """Return the result of an operation that raised *error*, which none should: its branch must not wait for ever."""
    fields = {"operation": do.operation.value, "gid": str(do.gid)}
    logger.error("operation failed", extra=fields, exc_info=error)
    if do.operation is Operation.ASK_AGAIN:
        return None
    reason = Reason(AbortCode.UNSPECIFIED, f"{do.operation.value} failed: {type(error).__name__}")
    kind = _BROKE.get(do.operation, BranchInput.FINISH_FAILED)
    result: Result = kind, ((Outcome.UNKNOWN, reason) if kind is BranchInput.ONE_PHASE_ENDED else reason)
    if do.operation in _BROKE and branch is not None and branch.work is not None:
        # It may have left the work open, with its locks and its connection.
        with contextlib.suppress(Exception):
            return (yield from _rollback(resource, branch.work, result))
    return result


def _operate(
    do: Do, resource: Resource | AsyncResource, work: Work, committing: Callable[[str], Any]
) -> Flow[Result | Later]:
    if do.operation is Operation.PREPARE:
        return (yield from _prepare(do, resource, work))
    if do.decides is not None:
        return (yield from _decide(do, resource, work, do.decides))
    if do.operation is Operation.COMMIT_ONE_PHASE:
        return (yield from _commit_one_phase(resource, work, committing))
    if do.operation is Operation.ROLLBACK:
        return (yield from _rollback(resource, work, (BranchInput.ROLLED_BACK, None)))
    return (yield from _after_the_fact(do, resource))


def _rollback(resource: Resource | AsyncResource, work: Work, result: Result) -> Flow[Result | Later]:
    """Roll back; *result* comes when the server's end has gone as well: until then the branch's locks may be held."""
    yield resource.rollback, (work,)
    if not hasattr(resource, "terminate"):
        return result
    ended = yield from _terminate(resource, work, result)
    return ended or Later(functools.partial(_terminate, resource, work, result), result)


def _terminate(resource: Any, work: Work, result: Result) -> Flow[Result | None]:
    try:
        return result if (yield resource.terminate, (work,)) else None
    except Exception:
        return None  # asked again, like one that said no


def _prepare(do: Do, resource: Resource | AsyncResource, work: Work) -> Flow[Result | Later]:
    # Not every resource has reads that must be kept while the transaction goes on elsewhere.
    prepare = getattr(resource, "prepare_early", resource.prepare) if do.early else resource.prepare
    try:
        prepared = yield prepare, (work, do.gid)
    except Exception as error:
        return (yield from _rollback(resource, work, (BranchInput.PREPARE_FAILED, _why(resource, error))))
    if isinstance(prepared, Prepared):
        return BranchInput.PREPARED, prepared.token
    return (BranchInput.KEPT_OPEN if do.early and prepared is None else BranchInput.READ_ONLY), None


def _commit_one_phase(
    resource: Resource | AsyncResource, work: Work, committing: Callable[[str], Any]
) -> Flow[Result | Later]:
    try:
        outcome = yield resource.commit_one_phase, (work, committing)
    except Exception as error:
        aborted = BranchInput.ONE_PHASE_ENDED, (Outcome.ABORTED, _why(resource, error))
        return (yield from _rollback(resource, work, aborted))
    if outcome is None and hasattr(resource, "how_it_ended"):
        return Later(functools.partial(_how_it_ended, resource, work), _ended(resource, Outcome.UNKNOWN))
    return _ended(resource, outcome or Outcome.UNKNOWN)


def _decide(do: Do, resource: Any, work: Work, branches: tuple[PreparedBranch, ...]) -> Flow[Result | Later]:
    """Commit with the decision.  Whatever goes wrong once that has begun, the register is asked, and nothing else."""
    about = do.gid.xid, do.gid.register
    try:
        assert do.gid.register is not None
        outcome = yield resource.decider.decide, (work, *about, encode_decision(do.gid.register, branches))
    except Exception as error:
        aborted = BranchInput.ONE_PHASE_ENDED, (Outcome.ABORTED, _why(resource, error))
        return (yield from _rollback(resource, work, aborted))
    if outcome is None:
        ask = functools.partial(_how_it_was_decided, resource, work, *about)
        return Later(ask, _ended(resource, Outcome.UNKNOWN))
    return _decided(resource, outcome)


def _how_it_was_decided(resource: Any, work: Work, *about: Xid | RegisterId | None) -> Flow[Result | None]:
    outcome: Outcome | None = yield resource.decider.how_it_was_decided, (work, *about)
    return None if outcome is None else _decided(resource, outcome)


def _decided(resource: Any, outcome: Outcome) -> Result:
    if outcome is Outcome.ABORTED:
        text = (
            f"the register of {resource.name} refuses the decision: it came too late, or its database has failed over"
        )
        return BranchInput.ONE_PHASE_ENDED, (outcome, Reason(AbortCode.RESOURCE_UNAVAILABLE, text))
    return _ended(resource, outcome)


def _how_it_ended(resource: Any, work: Work) -> Flow[Result | None]:
    outcome: Outcome | None = yield resource.how_it_ended, (work,)
    return None if outcome is None else _ended(resource, outcome)


def _ended(resource: Resource | AsyncResource, outcome: Outcome) -> Result:
    reason = cannot_tell(resource.name) if outcome is Outcome.UNKNOWN else None
    return BranchInput.ONE_PHASE_ENDED, (outcome, reason)


def _after_the_fact(do: Do, resource: Resource | AsyncResource) -> Flow[Result]:
    """Return what any process can do about a branch that it does not hold: finish it, or ask how it ended."""
    try:
        if do.operation is Operation.COMMIT_PREPARED:
            return BranchInput.FINISHED, (yield resource.commit_prepared, (do.gid, do.token))
        if do.operation is Operation.ROLLBACK_PREPARED:
            return BranchInput.FINISHED, (yield resource.rollback_prepared, (do.gid, do.token))
        result = yield resource.one_phase_result, (do.token,)
        if result is not None:
            return BranchInput.ONE_PHASE_ENDED, (result, None)
        return BranchInput.FINISH_FAILED, Reason(AbortCode.RESOURCE_UNAVAILABLE, "it is still running")
    except Exception as error:
        return BranchInput.FINISH_FAILED, _why(resource, error)
