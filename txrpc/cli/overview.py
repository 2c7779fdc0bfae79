"""``txrpc status``: ask a coordinator and show what it says."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from txrpc._wire.v1 import admin_pb2, admin_pb2_grpc
from txrpc.cli.reach import Reach
from txrpc.ids import Epoch

__all__ = ["NoAnswer", "Refused", "as_dict", "ask", "call", "close", "rebind", "show"]


# protobuf 5.26 gave the option another name.
_RENAMED = "always_print_fields_with_no_presence" in inspect.signature(MessageToDict).parameters
_WITH_DEFAULTS: dict[str, Any] = {
    "always_print_fields_with_no_presence" if _RENAMED else "including_default_value_fields": True
}


class NoAnswer(Exception):
    """The coordinator did not answer; the message says why."""


class Refused(NoAnswer):
    """It answered that it does not do that; the message says why."""


def call(reach: Reach, verb: str, request: Any, timeout_s: float) -> Any:
    """Return a coordinator's answer to a *request* of the service `Admin`; raises `NoAnswer`, or `Refused`."""
    with reach.channel() as channel:
        try:
            return getattr(admin_pb2_grpc.AdminStub(channel), verb)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise Refused(error.details()) from None
            raise NoAnswer(f"no answer from a coordinator at {reach.address}: {error.details()}") from None


def ask(reach: Reach, limit: int, timeout_s: float) -> admin_pb2.StatusReply:
    """Ask a coordinator for its status; raises `NoAnswer`."""
    reply: admin_pb2.StatusReply = call(reach, "Status", admin_pb2.StatusRequest(limit=limit), timeout_s)
    return reply


def as_dict(reply: admin_pb2.StatusReply) -> dict[str, Any]:
    """*reply* for programs: identifiers in hexadecimal, as everywhere."""
    shown: dict[str, Any] = MessageToDict(reply, preserving_proto_field_name=True, **_WITH_DEFAULTS)
    for key in _NUMBERS:
        shown[key] = int(shown[key])
    for counted in ("messages", "batches"):
        shown[counted] = {kind: int(count) for kind, count in sorted(shown[counted].items())}
    shown["owner"]["epoch"] = str(Epoch(reply.owner.epoch))
    for session, source in zip(shown["sessions"], reply.sessions, strict=True):
        session.update(participant=source.participant.hex(), age_ms=source.age_ms)
    for row, transaction in zip(shown["transactions"], reply.transactions, strict=True):
        row.update(xid=transaction.xid.hex(), age_ms=transaction.age_ms)
        for branch, origin in zip(row["branches"], transaction.branches, strict=True):
            branch.update(branch=origin.branch.hex(), participant=origin.participant.hex())
    for doubt, told in zip(shown["doubts"], reply.doubts, strict=True):
        doubt.update(xid=told.xid.hex(), branch=told.branch.hex(), age_ms=told.age_ms)
    for incident, kept in zip(shown["incidents"], reply.incidents, strict=True):
        incident.update(xid=kept.xid.hex(), branch=kept.branch.hex(), at_ms=kept.at_ms)
    for node, seen in zip(shown["nodes"], reply.nodes, strict=True):
        node["epoch"] = str(Epoch(seen.epoch))
    if reply.HasField("view"):
        shown["view"]["number"] = reply.view.number
    shown["taken_over"] = [as_dict(guest) for guest in reply.taken_over]
    return shown


def rebind(reach: Reach, name: str, identity: str, timeout_s: float) -> str:
    """Let *name* mean the database *identity*, or the next that comes (""); what it meant.  Raises `NoAnswer`."""
    request = admin_pb2.RebindRequest(name=name, identity=identity)
    return str(call(reach, "Rebind", request, timeout_s).before)


_NUMBERS = (
    "uptime_ms",
    "committed",
    "aborted",
    "heuristic",
    "lost",
    "open",
    "in_doubt",
    "log_batches",
    "log_decisions",
    "position",
)


def close(reach: Reach, xid: bytes, branch: bytes, timeout_s: float) -> int:
    """Close incidents of the transaction *xid*, or of one *branch* of it; how many there were.  Raises `NoAnswer`."""
    return int(call(reach, "Close", admin_pb2.CloseRequest(xid=xid, branch=branch), timeout_s).closed)


def show(reply: admin_pb2.StatusReply, address: str) -> None:
    """*reply* for people: the coordinator that was asked, and those of other nodes that it has taken over."""
    console = Console(highlight=False, markup=False, emoji=False)  # names and reasons come from other processes
    _show(console, reply, f"{reply.owner.node} at {address}")
    for guest in reply.taken_over:
        console.print()
        _show(console, guest, f"{guest.owner.node}, taken over by {reply.owner.node}")


def _show(console: Console, reply: admin_pb2.StatusReply, who: str) -> None:
    log = Text("takes decisions", "green") if reply.log_healthy else Text("TAKES NO DECISIONS", "bold red")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("coordinator", f"{who}, group {reply.group}, epoch {Epoch(reply.owner.epoch)}")
    if len(reply.nodes) > 1:
        facts.add_row("nodes on this log", _nodes(reply))
    if reply.HasField("view"):
        view = reply.view
        facts.add_row("group", f"view {view.number}, read quorum {view.reads}, write quorum {view.writes}")
    facts.add_row("version, up for", f"{reply.version}, {_age(reply.uptime_ms)}")
    facts.add_row("decision log", Text.assemble(reply.log, "  ", log, f", at position {reply.position:,}"))
    ended = f"{reply.committed:,} committed, {reply.aborted:,} rolled back, {reply.heuristic:,} heuristic, {reply.lost:,} lost"
    facts.add_row("since it started", ended)
    in_doubt = Text(f"{reply.in_doubt:,} in doubt", "bold yellow" if reply.in_doubt else "green")
    incidents = Text(_many(len(reply.incidents), "incident"), "bold red" if reply.incidents else "green")
    facts.add_row("now", Text.assemble(f"{reply.open:,} open, ", in_doubt, ", ", incidents))
    console.print(facts)
    console.print()
    console.print(_sessions(reply))
    if reply.transactions:
        console.print()
        console.print(_transactions(reply))
    listed = {row.xid for row in reply.transactions}
    others = [doubt for doubt in reply.doubts if doubt.xid not in listed]
    if others:
        console.print()
        console.print(_doubts(others))
    if reply.incidents:
        console.print()
        console.print(_incidents(reply))


def _nodes(reply: admin_pb2.StatusReply) -> Text:
    shown = Text()
    for node in reply.nodes:
        text = f"{node.node} lives" if node.lives else f"{node.node} is away"
        text += f" (epoch {Epoch(node.epoch).number})"
        if node.holder != node.node:
            text += f", run by {node.holder}"
        if node.leads:
            text += ", leads"
        if node.trouble:
            text += f", CANNOT BE RUN HERE: {node.trouble}"
        style = "bold red" if node.trouble else "green" if node.lives else "bold yellow"
        shown.append("; " if shown else "").append(text, style)
    return shown


def _doubts(doubts: list[admin_pb2.InDoubtBranch]) -> Table:
    title = f"in doubt, of transactions that are not open here: {_many(len(doubts), 'branch', 'es')}"
    table = Table("transaction", "age", "resource", "why", title=title, title_justify="left")
    for doubt in doubts:
        table.add_row(doubt.xid.hex(), _age(doubt.age_ms), doubt.resource, doubt.reason)
    return table


def _incidents(reply: admin_pb2.StatusReply) -> Table:
    title = f"{_many(len(reply.incidents), 'incident')}: when you have seen to one, txrpc close TRANSACTION"
    table = Table("transaction", "resource", "what happened, and what to do", title=title, title_justify="left")
    for incident in reply.incidents:
        table.add_row(incident.xid.hex(), incident.resource, incident.text)
    return table


def _sessions(reply: admin_pb2.StatusReply) -> Table:
    table = Table(
        "process",
        "resources",
        "connected for",
        "peer",
        title=_many(len(reply.sessions), "session"),
        title_justify="left",
    )
    for session in reply.sessions:
        names = ", ".join(resource.name for resource in session.resources if not resource.trouble)
        waits = [f"{each.name} is not ready: {each.trouble}" for each in session.resources if each.trouble]
        table.add_row(session.process, "\n".join([names, *waits]).strip() or "none", _age(session.age_ms), session.peer)
    return table


def _transactions(reply: admin_pb2.StatusReply) -> Table:
    title = f"{len(reply.transactions)} of {reply.open} open transactions, the oldest first"
    table = Table("transaction", "state", "age", "resource", "branch", "why", title=title, title_justify="left")
    for row in reply.transactions:
        first = [row.xid.hex(), row.state, _age(row.age_ms)]
        for branch in row.branches:
            table.add_row(*first, branch.resource, branch.state, branch.reason)
            first = ["", "", ""]
    return table


def _many(count: int, what: str, ending: str = "s") -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}{ending}"


def _age(age_ms: int) -> str:
    seconds = age_ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
