"""A process and several coordinators: which one begins what, and who is listened to after a takeover."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

import txrpc
from tests.runtime.conftest import NoSession
from tests.runtime.memory_resource import MemoryResource
from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager
from txrpc._environment import coordinator_addresses
from txrpc._protocol.messages import (
    GoAway,
    Hello,
    Inquiry,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    Takeover,
    Tick,
    TransactionContext,
    Welcome,
)
from txrpc.errors import BadMessage, ConfigurationError, CoordinatorUnavailable, TransactionAborted
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid

C1, C2 = Owner("c1", Epoch.make(1, 1)), Owner("c2", Epoch.make(1, 7))
TAKEN = Owner("c1", Epoch.make(2, 2))


def welcome(owner: Owner, position: int = 0) -> Welcome:
    return Welcome(owner, 5, 60_000, 100, 100_000, position)


class Wire(NoSession):
    """A session that keeps what it is given, and answers what is asked about a transaction if a test says how."""

    def __init__(self, number: int) -> None:
        self.address = f"host-{number}:1"
        self.trouble = "away"
        self.said: list[tuple[str, Any]] = []
        self.answer: Outcome | None = None
        self.client: Client | None = None

    def send(self, node: str, *messages: Any) -> None:
        self.said += [(node, message) for message in messages]
        for message in messages:
            if isinstance(message, OutcomeRequest) and self.answer is not None and self.client is not None:
                reply = OutcomeReply(message.xid, self.answer)
                threading.Thread(target=self.client.core.on_message, args=(self, node, reply)).start()

    def hellos(self) -> list[tuple[str, Hello]]:
        return [(node, message) for node, message in self.said if isinstance(message, Hello)]


@pytest.fixture
def wires() -> tuple[Wire, Wire]:
    return Wire(1), Wire(2)


@pytest.fixture
def client(wires: tuple[Wire, Wire]) -> Iterator[Client]:
    client = Client("default", [cast("Any", MemoryResource())])
    for wire in wires:
        wire.client = client
    client.start(*wires)
    yield client
    for wire in wires:
        client.core.on_lost(cast("Any", wire), "the test is over")
    client.close()


def opens(client: Client, wire: Any, owner: Owner, position: int = 0) -> Hello:
    """Its session begins; returns what the process said first."""
    hello = client.core.hello(wire)
    client.core.on_welcome(wire, welcome(owner, position))
    return hello


def begins_with(client: Client) -> str | None:
    part = client.core.begin_part(5, False)
    return part.owner.node if part.owner is not None else None


def test_a_transaction_begins_with_the_first_address_that_is_there(client: Client, wires: tuple[Any, Any]) -> None:
    assert begins_with(client) is None
    opens(client, wires[1], C2)
    assert begins_with(client) == "c2"
    opens(client, wires[0], C1)
    assert begins_with(client) == "c1"
    client.core.on_lost(wires[0], "gone")
    assert begins_with(client) == "c2"
    opens(client, wires[0], C1)
    assert begins_with(client) == "c1"


def taken_over(client: Client, wires: tuple[Any, Any]) -> None:
    """C1 dies, and the coordinator at the second address takes it over."""
    opens(client, wires[0], C1, position=41)
    opens(client, wires[1], C2)
    client.core.on_lost(wires[0], "gone")
    client.core.on_message(wires[1], "c1", Takeover())
    client.core.on_message(wires[1], "c1", welcome(TAKEN, 41))


def test_a_node_that_was_taken_over_is_greeted_and_asked_there_and_begins_nothing(
    client: Client, wires: tuple[Any, Any]
) -> None:
    taken_over(client, wires)
    ((node, hello),) = [said for said in wires[1].hellos() if said[0] == "c1"]
    assert (node, hello.seen, hello.position) == ("c1", C1, 41)
    assert client.reconnect("c1", 0) == TAKEN
    assert begins_with(client) == "c2"
    client.core.on_lost(wires[1], "gone too")
    with pytest.raises(CoordinatorUnavailable, match="no session with coordinator 'c1': away; away"):
        client.reconnect("c1", 0)


def test_prepared_branches_ask_the_node_that_they_belong_to_where_it_is_now(
    client: Client, wires: tuple[Any, Any]
) -> None:
    opens(client, wires[0], C1)
    opens(client, wires[1], C2)
    found = []
    for number, owner in enumerate((C1, C2)):
        gid = Gid("default", owner.node, owner.epoch, Xid(bytes(16)), BranchId(bytes(7) + bytes([number])),
                  ParticipantId(bytes(8)), "notebook")  # fmt: skip
        found.append((gid, 0))
    wires[0].said.clear()
    client.core.swept("notebook", client.state.now_ms(), found)
    asked = [(wire.address, node) for wire in wires for node, x in wire.said if isinstance(x, Inquiry)]
    assert asked == [("host-1:1", "c1"), ("host-2:1", "c2")]
    taken_over(client, wires)
    wires[1].said.clear()
    client.core.swept("notebook", client.state.now_ms(), found)
    assert [node for node, x in wires[1].said if isinstance(x, Inquiry)] == ["c1", "c2"]


def test_rule_7_an_epoch_that_is_over_is_not_listened_to(client: Client, wires: tuple[Any, Any]) -> None:
    taken_over(client, wires)
    with pytest.raises(BadMessage, match=r"epoch 1\.\w+ of coordinator c1 is over"):
        opens(client, wires[0], C1)
    assert client.reconnect("c1", 0) == TAKEN
    client.core.on_message(wires[0], "c1", Tick(99, 1_000))
    known = client.state.coordinators["c1"]
    assert (known.tick, known.position) == (5, 41)
    client.core.on_message(wires[1], "c1", GoAway("fenced", "it is back", retry=True))
    with pytest.raises(CoordinatorUnavailable):
        client.reconnect("c1", 0)


def test_a_takeover_by_an_epoch_that_is_over_is_not_believed(client: Client, wires: tuple[Any, Any]) -> None:
    opens(client, wires[0], TAKEN)
    opens(client, wires[1], C2)
    client.core.on_message(wires[1], "c1", Takeover())
    client.core.on_message(wires[1], "c1", welcome(C1))
    assert client.reconnect("c1", 0) == TAKEN
    assert begins_with(client) == "c1"


def test_a_node_that_is_back_is_asked_at_its_own_address_again(client: Client, wires: tuple[Any, Any]) -> None:
    taken_over(client, wires)
    back = Owner("c1", Epoch.make(3, 3))
    hello = opens(client, wires[0], back)
    assert (hello.seen, hello.position) == (TAKEN, 41)
    assert client.reconnect("c1", 0) == back
    client.core.on_message(wires[1], "c1", GoAway("fenced", "it is back", retry=True))
    assert client.reconnect("c1", 0) == back
    assert begins_with(client) == "c1"


def test_rule_18_a_node_met_at_an_unknown_address_is_greeted_again_with_what_is_known_of_it(
    client: Client, wires: tuple[Any, Any]
) -> None:
    """The process has met c1 as a guest at the second address, and does not know yet that it lives at the first."""
    opens(client, wires[1], C2)
    client.core.on_message(wires[1], "c1", Takeover())
    client.core.on_message(wires[1], "c1", welcome(C1, 41))
    with pytest.raises(BadMessage, match="was not known when it was greeted"):
        assert opens(client, wires[0], TAKEN).seen is None
    hello = opens(client, wires[0], TAKEN)
    assert (hello.seen, hello.position) == (C1, 41)


def test_a_request_to_a_coordinator_that_is_elsewhere_now_is_lost(client: Client, wires: tuple[Any, Any]) -> None:
    from txrpc._client import requests

    opens(client, wires[0], C1)
    opens(client, wires[1], C2)
    future = requests.post(client.state, "c1", OutcomeRequest(Xid(bytes(16)), C1.epoch, 1))
    client.core.on_message(wires[1], "c1", Takeover())
    client.core.on_message(wires[1], "c1", welcome(TAKEN))
    with pytest.raises(CoordinatorUnavailable, match="it is elsewhere now"):
        future.result(0)


def test_a_call_of_a_transaction_joins_only_with_a_session_of_its_own_coordinator(
    client: Client, wires: tuple[Any, Any]
) -> None:
    context = TransactionContext("default", Xid(bytes(16)), C2, 5_000)
    opens(client, wires[0], C1)
    with pytest.raises(CoordinatorUnavailable, match="no session with coordinator 'c2', which owns the transaction"):
        client.core.join_part(context)
    opens(client, wires[1], C2)
    assert client.core.join_part(context).owner == C2
    taken_over(client, wires)
    with pytest.raises(TransactionAborted, match=r"began under epoch 1\.\w+ of a coordinator that is in 2\."):
        client.core.join_part(TransactionContext("default", Xid(bytes(16)), C1, 5_000))


@pytest.mark.parametrize("answers", [(Outcome.UNKNOWN, Outcome.COMMITTED), (Outcome.COMMITTED, Outcome.UNKNOWN)])
def test_all_coordinators_are_asked_about_a_transaction_that_is_not_known_here(
    client: Client, wires: tuple[Any, Any], answers: tuple[Outcome, Outcome]
) -> None:
    opens(client, wires[0], C1)
    opens(client, wires[1], C2)
    wires[0].answer, wires[1].answer = answers
    assert TransactionManager(client).outcome(Xid(bytes(16))) is Outcome.COMMITTED


def test_the_status_says_of_each_address_what_is_wrong(client: Client, wires: tuple[Any, Any]) -> None:
    wires[0].trouble = ""
    opens(client, wires[0], C1)
    status = client.core.status()
    assert (status.coordinator, status.coordinators) == ("c1", {"host-1:1": "", "host-2:1": "away"})


def test_the_addresses_of_a_group_are_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coordinator_addresses("a:1, b:2") == ["a:1", "b:2"]
    monkeypatch.setenv("TXRPC_COORDINATOR", "c:3,d:4")
    assert coordinator_addresses(None) == ["c:3", "d:4"]
    for wrong, says in (("a:1,", "'host:port', not ''"), ("a:1,a:1", "named twice"), ("a:1;b:2", "not 'a:1;b:2'")):
        with pytest.raises(ConfigurationError, match=says):
            txrpc.connect(wrong)
