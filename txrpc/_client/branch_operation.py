"""One operation of a participant's table on its resource, and what its result is called in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txrpc._client.flow import Flow
from txrpc._client.reasons import cannot_tell, reason_of
from txrpc._failpoints import failpoint
from txrpc._protocol.messages import Outcome
from txrpc._protocol.participant.branch import BranchInput, Do, Operation
from txrpc.errors import AbortCode, Reason, ResourceUnavailable
from txrpc.resource import AsyncResource, Prepared, Resource, Work

__all__ = ["operate"]

Result = tuple[BranchInput, Any]


def _why(resource: Resource | AsyncResource, error: BaseException) -> Reason:
    """Return why *error*, raised by a verb of *resource*, ends the branch; never what a database says, which may hold data."""
    reason: Reason | None = resource.classify(error)
    if reason is not None:
        return reason
    if isinstance(error, ResourceUnavailable):
        return reason_of(error)
    return Reason(AbortCode.STATEMENT_FAILED, f"{type(error).__name__} in resource {resource.name}")


def operate(
    do: Do, resource: Resource | AsyncResource, work: Work, committing: Callable[[str], Any]
) -> Flow[Result | None]:
    """Carry out *do*; None if how a commit in one phase has ended must be asked later.  Never raises but for cancellation."""
    if do.operation is Operation.HOW_IT_ENDED:
        outcome: Outcome | None = yield resource.how_it_ended, (work,)  # type: ignore[union-attr]
        return None if outcome is None else _ended(resource, outcome)
    failpoint(f"participant.before_{do.operation.value}")
    result = yield from _operate(do, resource, work, committing)
    failpoint(f"participant.after_{do.operation.value}")
    return result


def _operate(
    do: Do, resource: Resource | AsyncResource, work: Work, committing: Callable[[str], Any]
) -> Flow[Result | None]:
    if do.operation is Operation.PREPARE:
        return (yield from _prepare(do, resource, work))
    if do.operation is Operation.COMMIT_ONE_PHASE:
        return (yield from _commit_one_phase(resource, work, committing))
    if do.operation is Operation.ROLLBACK:
        yield resource.rollback, (work,)
        return BranchInput.ROLLED_BACK, None
    return (yield from _after_the_fact(do, resource))


def _prepare(do: Do, resource: Resource | AsyncResource, work: Work) -> Flow[Result]:
    # Not every resource has reads that must be kept while the transaction goes on elsewhere.
    prepare = getattr(resource, "prepare_early", resource.prepare) if do.early else resource.prepare
    try:
        prepared = yield prepare, (work, do.gid)
    except Exception as error:
        yield resource.rollback, (work,)
        return BranchInput.PREPARE_FAILED, _why(resource, error)
    if isinstance(prepared, Prepared):
        return BranchInput.PREPARED, prepared.token
    return (BranchInput.KEPT_OPEN if do.early and prepared is None else BranchInput.READ_ONLY), None


def _commit_one_phase(
    resource: Resource | AsyncResource, work: Work, committing: Callable[[str], Any]
) -> Flow[Result | None]:
    try:
        outcome = yield resource.commit_one_phase, (work, committing)
    except Exception as error:
        yield resource.rollback, (work,)
        return BranchInput.ONE_PHASE_ENDED, (Outcome.ABORTED, _why(resource, error))
    if outcome is None and hasattr(resource, "how_it_ended"):
        return None
    return _ended(resource, outcome or Outcome.UNKNOWN)


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
