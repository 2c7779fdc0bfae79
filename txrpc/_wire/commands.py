"""Commands of a replicated log, and what they make, to protobuf and back: for the wire and for the disk.

Decoding validates everything (`txrpc._wire.checks`) and raises `BadMessage` and nothing else, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from txrpc._protocol.messages import FinishResult
from txrpc._protocol.quorum import commands as q
from txrpc._protocol.quorum.views import View
from txrpc._protocol.records import Decision, Incident
from txrpc._wire import checks as c
from txrpc._wire.v1 import peer_pb2 as pb
from txrpc.errors import BadMessage, ConfigurationError
from txrpc.ids import NODE_MAX, RESOURCE_MAX

__all__ = [
    "command_from",
    "command_to",
    "decision_from",
    "decision_to",
    "incident_from",
    "incident_to",
    "number_from",
    "snapshot_from",
    "snapshot_to",
    "view_from",
    "view_to",
]

# ----------------------------------------------------------------------------------------------------------- commands


def command_to(command: q.Command) -> pb.LogCommand:
    """A command, for the wire and for the disk."""
    match command:
        case q.Record(decisions, done, done_ms):
            record = pb.RecordCommand(decisions=[decision_to(each) for each in decisions], done=done, done_ms=done_ms)
            return pb.LogCommand(record=record)
        case q.Marker(epoch, holder):
            return pb.LogCommand(marker=pb.MarkerCommand(epoch=epoch, holder=holder))
        case q.Forget(xids, before_ms):
            return pb.LogCommand(forget=pb.ForgetCommand(xids=sorted(xids), before_ms=before_ms))
        case q.Report(incidents, closed):
            keys = [pb.BranchKey(xid=xid, branch=branch) for xid, branch in closed]
            return pb.LogCommand(report=pb.ReportCommand(incidents=map(incident_to, incidents), closed=keys))
        case q.Bind(first, rebound):
            return pb.LogCommand(bind=pb.BindCommand(first=first, rebound=rebound))
        case q.Admit(acceptor, incarnation):
            return pb.LogCommand(admit=pb.AdmitCommand(acceptor=acceptor, incarnation=incarnation))
        case q.ChangeView(view):
            return pb.LogCommand(change_view=view_to(view))
        case q.Moved(number):
            return pb.LogCommand(moved=pb.MovedCommand(view=number))
        case q.Filler():
            return pb.LogCommand(filler=pb.FillerCommand())


def command_from(message: pb.LogCommand) -> q.Command:
    """The reverse of `command_to`.

    A kind that is not known is refused, and not skipped: the logs would become different ones.
    """
    field = message.WhichOneof("command")
    told: Any = getattr(message, field) if field else None
    match field:
        case "record":
            done = tuple(c.xid_from(xid) for xid in told.done)
            return q.Record(tuple(decision_from(each) for each in told.decisions), done, told.done_ms)
        case "marker":
            return q.Marker(c.epoch_from(told.epoch), _node_from(told.holder))
        case "forget":
            return q.Forget(frozenset(c.xid_from(xid) for xid in told.xids), told.before_ms)
        case "report":
            closed = tuple((c.xid_from(key.xid), c.branch_id(key.branch)) for key in told.closed)
            return q.Report(tuple(incident_from(each) for each in told.incidents), closed)
        case "bind":
            return q.Bind(_names_from(told.first), _names_from(told.rebound))
        case "admit":
            return q.Admit(_node_from(told.acceptor), told.incarnation)
        case "change_view":
            return q.ChangeView(view_from(told))
        case "moved":
            return q.Moved(number_from(told.view))
        case "filler":
            return q.Filler()
        case _:
            raise BadMessage("a command of an unknown kind: upgrade all coordinators of the group to one version")


def view_to(view: View) -> pb.GroupView:
    """A view of the group."""
    return pb.GroupView(
        number=view.number,
        addresses=view.addresses,
        reads=view.reads,
        writes=view.writes,
        former=sorted(view.former),
        born={log: pb.DiskIncarnations(of=of) for log, of in view.born.items()},
    )


def view_from(message: pb.GroupView) -> View:
    """The reverse of `view_to`; its quorums are possible."""
    addresses = {_node_from(name): c.text_from(address) for name, address in message.addresses.items()}
    former = frozenset(_node_from(name) for name in message.former)
    born = {_node_from(log): {_node_from(name): of.of[name] for name in of.of} for log, of in message.born.items()}
    try:
        return View(number_from(message.number), addresses, message.reads, message.writes, former, born)
    except ConfigurationError as error:
        raise BadMessage(f"not a view of a group: {error}") from None


def number_from(number: int) -> int:
    """The number of a view."""
    if not number:
        raise BadMessage("views are numbered from 1")
    return number


def decision_to(decision: Decision, done_ms: int = 0) -> pb.LogDecision:
    """A decision, for the wire and for the disk."""
    branches = [
        pb.LogBranch(branch=b.branch, participant=b.participant, resource=b.resource, token=b.token)
        for b in decision.branches
    ]
    return pb.LogDecision(
        xid=decision.xid, epoch=decision.epoch, decided_ms=decision.decided_ms, branches=branches, done_ms=done_ms
    )


def decision_from(message: pb.LogDecision) -> Decision:
    """The reverse of `decision_to`."""
    branches = tuple(map(c.prepared_from, message.branches))
    return Decision(c.xid_from(message.xid), c.epoch_from(message.epoch), message.decided_ms, branches)


def incident_to(incident: Incident) -> pb.LogIncident:
    """A branch that did not end as decided, for the wire and for the disk."""
    return pb.LogIncident(
        xid=incident.xid,
        branch=incident.branch,
        resource=incident.resource,
        finish=incident.finish,
        at_ms=incident.at_ms,
    )


def incident_from(message: pb.LogIncident) -> Incident:
    """The reverse of `incident_to`."""
    return Incident(
        c.xid_from(message.xid),
        c.branch_id(message.branch),
        c.name_from("resource", message.resource, RESOURCE_MAX),
        c.member(FinishResult, "finish", message.finish),
        message.at_ms,
    )


def _node_from(name: str) -> str:
    return c.name_from("node", name, NODE_MAX) if name else ""


def _names_from(names: Mapping[str, str]) -> dict[str, str]:
    return {c.name_from("resource", name, RESOURCE_MAX): c.text_from(identity) for name, identity in names.items()}


# ---------------------------------------------------------------------------------------------------------- snapshots


def snapshot_to(state: q.LogState, *, with_decisions: bool = True) -> pb.LogSnapshot:
    """A prefix of a log; without the decisions if they are kept elsewhere."""
    decisions = state.decisions.values() if with_decisions else ()
    return pb.LogSnapshot(
        slot=state.slot,
        position=state.position,
        forgotten_ms=state.forgotten_ms,
        holder=state.holder,
        epochs=[pb.LogEpoch(epoch=epoch, position=position) for epoch, position in state.epochs.items()],
        incarnations=state.incarnations,
        incidents=map(incident_to, state.incidents.values()),
        names=state.names,
        moved=state.moved,
        view=view_to(state.view) if state.view else None,
        decisions=[decision_to(each, state.done_ms.get(each.xid, 0)) for each in decisions],
    )


def snapshot_from(message: pb.LogSnapshot) -> q.LogState:
    """The reverse of `snapshot_to`."""
    decisions = [decision_from(each) for each in message.decisions]
    incidents = [incident_from(each) for each in message.incidents]
    return q.LogState(
        slot=message.slot,
        decisions={each.xid: each for each in decisions},
        done_ms={
            each.xid: told.done_ms for each, told in zip(decisions, message.decisions, strict=True) if told.done_ms
        },
        epochs={c.epoch_from(each.epoch): each.position for each in message.epochs},
        holder=_node_from(message.holder),
        position=message.position,
        forgotten_ms=message.forgotten_ms,
        incidents={(each.xid, each.branch): each for each in incidents},
        names=_names_from(message.names),
        incarnations={_node_from(name): incarnation for name, incarnation in message.incarnations.items()},
        moved=number_from(message.moved),
        view=view_from(message.view) if message.HasField("view") else None,
    )
