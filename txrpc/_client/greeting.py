"""Beginning and losing sessions with coordinators: Hello, Welcome, and what a process does about them.

All functions are called under the client's lock.
"""

from __future__ import annotations

import logging

from txrpc._client import effects, requests
from txrpc._client.coordinators import KnownCoordinator, Outbox, choose
from txrpc._client.state import ClientState
from txrpc._protocol.messages import PROTOCOL_VERSION, Hello, Welcome
from txrpc.errors import BadMessage

__all__ = ["announce", "greet", "hello", "lost", "welcomed"]

logger = logging.getLogger("txrpc.client")


def hello(client: ClientState, session: Outbox) -> Hello:
    """Return what this process says first on *session*."""
    client.greeted[session, ""] = client.starting.version
    return _hello(client, client.homes.get(session, ""))


def greet(client: ClientState, session: Outbox, node: str) -> None:
    """Say Hello to *node*, which another coordinator has taken over, on that one's session."""
    client.greeted[session, node] = client.starting.version
    effects.greet(session, node, _hello(client, node))


def announce(client: ClientState) -> None:
    """Say Hello again to the coordinators that do not know yet what has become of the resources."""
    for node, known in client.coordinators.items():
        if known.session is None:
            continue
        told = (known.session, "" if client.homes.get(known.session) == node else node)
        if client.greeted.get(told) != client.starting.version:
            client.greeted[told] = client.starting.version
            effects.greet(known.session, node, _hello(client, node))


def _hello(client: ClientState, node: str) -> Hello:
    me, infos, known = client.participant_id, client.starting.infos, client.coordinators.get(node)
    seen, position = (known.owner, known.position) if known is not None else (None, 0)
    version = client.starting.version
    return Hello(PROTOCOL_VERSION, client.group, me, client.process, infos, seen, position, version)


def welcomed(client: ClientState, session: Outbox, welcome: Welcome, home: bool) -> None:
    """Reach a coordinator over *session* from now on; *home*: it is the one whose address that is.

    Raises `BadMessage` if a later epoch of it has been heard of, or if it has not been told what is known of its log.
    """
    owner, now_ms = welcome.owner, client.now_ms()
    known = client.coordinators.get(owner.node)
    if home:
        told = client.homes.get(session) == owner.node
        client.homes[session] = owner.node
        if known is not None and not told:
            # Rule 18: it must hear what is known of its log.  On the next attempt it will.
            raise BadMessage(f"coordinator {owner.node} is at this address, which was not known when it was greeted")
    if known is not None and owner.epoch.number < known.owner.epoch.number:
        raise BadMessage(f"epoch {owner.epoch} of coordinator {owner.node} is over: {known.owner.epoch} was here")
    if known is not None and known.owner != owner:
        event = "the coordinator has restarted" if home else "another coordinator has taken over"
        logger.info(event, extra={"node": owner.node, "epoch": str(owner.epoch)})
    if known is not None and known.session not in (None, session):
        requests.fail_all(client, owner.node, "it is elsewhere now")
    position = max(welcome.position, known.position if known is not None else 0)
    client.coordinators[owner.node] = KnownCoordinator(welcome, position, welcome.tick, welcome.heard, session)
    client.chosen = choose(client)
    announce(client)
    effects.apply(client, client.participant.connected(owner.node, now_ms))
    effects.apply(client, client.participant.coordinator_is(owner, now_ms))
    client.sweep_at = {name: now_ms for name in client.resources if not client.starting.trouble(name)}
    client.runtime.sessions_changed()
    client.runtime.wake()


def lost(client: ClientState, known: KnownCoordinator, text: str) -> None:
    """Note that a coordinator cannot be reached: nothing on its way will be answered."""
    known.session = None
    client.chosen = choose(client)
    requests.fail_all(client, known.owner.node, text)
