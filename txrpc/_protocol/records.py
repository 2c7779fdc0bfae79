"""What a decision log keeps for a coordinator, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from txrpc._protocol.outcomes import FinishResult
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid

__all__ = ["Decision", "Incident", "Opened", "PreparedBranch", "lineage", "overflow_ms"]


@dataclass(frozen=True, slots=True)
class PreparedBranch:
    """A branch that must be told of the commit before the record may go."""

    branch: BranchId
    participant: ParticipantId
    resource: str
    token: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The record of one commit decision.  `epoch` is the owner epoch of the transaction, which names its prepared branches."""

    xid: Xid
    epoch: Epoch
    decided_ms: int
    branches: tuple[PreparedBranch, ...]


@dataclass(frozen=True, slots=True)
class Incident:
    """A branch of a decided transaction that did not end as decided, kept until an operator closes it (rules 1 and 16).

    `at_ms`: when the coordinator heard of it, in milliseconds since 1970 by its own clock.
    """

    xid: Xid
    branch: BranchId
    resource: str
    finish: FinishResult
    at_ms: int


@dataclass(frozen=True, slots=True)
class Opened:
    """What `open` found: the new epoch, all epochs of this node before it, and the decisions that are not done.

    `forgotten_ms`: every record that `forget` has deleted was decided before this time, so that the absence of a later one
    proves an abort.  `clock_ms`: the latest time that this log has seen (the greatest `decided_ms`, or `forgotten_ms`);
    the coordinator's clock never runs behind it.  `lineage`: for every earlier epoch the greatest position that it reached.
    `position`: that of this log (see `DecisionLog.record`).  `incidents`: those that are not closed.  `identities`: which
    database each resource name means.
    """

    epoch: Epoch
    lineage: Mapping[Epoch, int]
    pending: tuple[Decision, ...]
    forgotten_ms: int = 0
    clock_ms: int = 0
    position: int = 0
    incidents: tuple[Incident, ...] = ()
    identities: Mapping[str, str] = field(default_factory=dict)


def lineage(opened: Mapping[Epoch, int], position: int) -> dict[Epoch, int]:
    """Return for each epoch the greatest position that it reached: that at which the next one was opened.

    *opened*: at which position each of them was opened.  *position*: the last one's.
    """
    in_order = sorted(opened.items())
    ends = [*(at for _, at in in_order[1:]), position]
    return {epoch: end for (epoch, _), end in zip(in_order, ends, strict=False)}


def overflow_ms(done_ms: Iterable[int], keeps: int) -> int:
    """Return the time before which what was done at *done_ms* must go, so that no more than *keeps* are left; or 0."""
    in_order = sorted(done_ms)
    return in_order[-keeps - 1] + 1 if len(in_order) > keeps else 0
