"""How a new group begins, and how a disk that was lost is told from a new one.

How to think of it
    An acceptor with an empty disk must not vote: it may have voted before, and lost what it has promised.  Only when a group begins
    are all disks empty by right.  So a group begins once, with all its members:

    1. The first member (in the order of names) asks all others, again and again, until each of them has *founding* on its disk,
       with the group's number, as it has itself.
    2. Then it writes *member*, and tells the others, who do the same.  None has voted before that.

    A disk that is empty, or still founding a group that goes on without it, when others are members already, was lost or is older
    than what its owner has answered.  It becomes a member as well, but as a new incarnation, which votes only once it has been
    admitted.  So does one that is added to a group, as soon as the members say that it belongs to them; until then it waits.
"""

from __future__ import annotations

import functools
import logging
import queue
import secrets
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.disk import EMPTY, FOUNDING, MEMBER, Stage, Standing
from txrpc._group.peers import Peers
from txrpc._protocol.quorum.views import View
from txrpc._wire.commands import view_from
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import BadMessage, ConfigurationError

__all__ = ["answer", "conclude", "found"]

logger = logging.getLogger("txrpc.decision_log")

_AGAIN_S: Final = 0.25

_Replies: TypeAlias = dict[str, peer_pb2.FoundReply]


def answer(standing: Standing, wanted: Stage.ValueType, group_id: int) -> Standing:
    """Return what a disk becomes when the group's first member *wants* it to, in the founding of that group.  Pure."""
    if wanted == FOUNDING and standing.stage != MEMBER:
        return Standing(FOUNDING, group_id)
    if wanted == MEMBER and standing == Standing(FOUNDING, group_id):
        return Standing(MEMBER, group_id)
    return standing


def conclude(standing: Standing, replies: _Replies, peers: int, *, first: bool) -> Standing:
    """Return what a disk that is no member yet becomes, after what its *peers* have said.  Pure but for chance.

    Raises `ConfigurationError` if they are members of different groups.
    """
    if standing.stage == MEMBER:  # since the peers were asked
        return standing
    groups = {each.id for each in replies.values() if each.stage == MEMBER}
    if len(groups) > 1:
        raise ConfigurationError(
            "the other members belong to different groups: one of them has the disk of another one"
        )
    for group_id in groups:
        # The first member is one before all others: if it is not, it has been.
        if standing == Standing(FOUNDING, group_id) and not first:
            return Standing(MEMBER, group_id)
        return Standing(MEMBER, group_id, incarnation=2 + secrets.randbits(62))
    if first and standing.stage == EMPTY:
        return Standing(FOUNDING, 1 + secrets.randbits(62)) if len(replies) == peers else standing
    agreed = [each for each in replies.values() if (each.stage, each.id) == (FOUNDING, standing.group_id)]
    if first and len(agreed) == peers:
        return Standing(MEMBER, standing.group_id)
    return standing


def found(acceptor: LocalAcceptor, peers: Peers, timeout_s: float, say: Callable[[int, str, str], None]) -> bool:
    """Make this disk a member of the group; False if that was not possible within the time.  Blocks.

    *say* is told again and again what it waits for: a level for the log, words, and a hint.
    Raises `ConfigurationError` if the members' disks do not belong together, and `DiskTrouble`.
    """
    first = acceptor.name == peers.view.names[0]
    until = time.monotonic() + timeout_s
    while acceptor.standing.stage != MEMBER or not peers.is_member:
        now = acceptor.standing
        wanted = FOUNDING if first and now.stage == FOUNDING else EMPTY
        replies = _ask_all(peers, wanted, now.group_id)
        if _belongs(acceptor, peers, replies):
            decide = functools.partial(conclude, replies=replies, peers=len(peers.names), first=first)
            became = acceptor.stand(decide).result()
            if became.stage == MEMBER:
                how = (
                    "founded"
                    if became.incarnation == 1
                    else "joined with an empty or older disk: it is given the logs now"
                )
                logger.warning("member of the group", extra={"members": ",".join(peers.view.names), "how": how})
                continue
            missing = ", ".join(name for name in peers.names if name not in replies) or "their agreement"
            say(logging.INFO, "a new group begins when all members are there", f"missing: {missing}")
        else:
            say(
                logging.WARNING,
                "this node is no member of the group: it waits until it is added",
                f"txrpc group add {acceptor.name}=HOST:PORT",
            )
        if time.monotonic() > until:
            return False
    peers.group_id = acceptor.standing.group_id
    if first and acceptor.standing.incarnation == 1:
        _ask_all(peers, MEMBER, peers.group_id)  # whom this does not reach asks
    return True


def _belongs(acceptor: LocalAcceptor, peers: Peers, replies: _Replies) -> bool:
    """Take in who the members are, as they say; whether this node is one of them, as far as is known."""
    now = acceptor.standing
    told = [_view_of(each) for each in replies.values() if each.stage == MEMBER and now.group_id in (0, each.id)]
    latest = max((view for view in told if view), key=lambda view: view.number, default=peers.view)
    if latest.number < peers.view.number:
        return peers.is_member
    returns = now.stage == MEMBER and not peers.is_member and acceptor.name in latest.addresses
    peers.adopt(latest)
    if returns:
        # It was removed, and is added again: what it has missed meanwhile it cannot know.
        acceptor.distrust().result()
    return acceptor.name in latest.addresses


def _view_of(reply: peer_pb2.FoundReply) -> View | None:
    try:
        return view_from(reply.view)
    except BadMessage:
        return None


def _put(inbox: queue.SimpleQueue[tuple[str, peer_pb2.FoundReply]], name: str, reply: peer_pb2.FoundReply) -> None:
    inbox.put((name, reply))


def _ask_all(peers: Peers, wanted: Stage.ValueType, group_id: int) -> _Replies:
    """Ask all peers, and wait a little."""
    inbox: queue.SimpleQueue[tuple[str, peer_pb2.FoundReply]] = queue.SimpleQueue()
    peers.group_id = group_id if wanted != EMPTY else 0
    for name in peers.names:
        peers.found(name, wanted, functools.partial(_put, inbox, name))
    replies: _Replies = {}
    until = time.monotonic() + _AGAIN_S
    while (left := until - time.monotonic()) > 0:
        try:
            name, reply = inbox.get(timeout=left)
        except queue.Empty:
            break
        replies[name] = reply
        if len(replies) == len(peers.names):
            time.sleep(min(left, 0.05))
            break
    return replies
