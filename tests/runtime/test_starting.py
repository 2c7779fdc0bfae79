"""A process serves with the databases that are healthy, names all that are not, and takes them in when they come (G7)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.runtime.conftest import AsyncNoSession, NoSession
from tests.runtime.memory_resource import AsyncMemoryResource, MemoryResource
from tests.runtime.test_ending import WELCOME
from tests.waiting import aeventually, eventually
from txrpc._client import core
from txrpc._client.client import Client
from txrpc._client.client_async import AsyncClient
from txrpc._client.manager import TransactionManager
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc._client.starting import Starting
from txrpc._client.transactional import transaction
from txrpc._client.transactional_async import transaction as atransaction
from txrpc._protocol.messages import Hello, ResourceInfo, Tick, TransactionContext
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.ids import Xid

GONE = ResourceUnavailable("the database of resource 'second' is out of reach: connection refused")
UNFIT = ConfigurationError("resource 'second' cannot prepare transactions")


class Late(MemoryResource):
    """Its start raises what is in `errors`, one after the other, and then works."""

    def __init__(self, name: str, *errors: Exception | None) -> None:
        super().__init__(name)
        self.errors = list(errors)
        self.identity = ""

    def start(self) -> ResourceInfo:
        if self.errors:
            if (error := self.errors.pop(0)) is None:
                return None  # type: ignore[return-value]
            raise error
        return ResourceInfo(self.name, self.kind, self.identity)


class AsyncLate(AsyncMemoryResource):
    """The same for asyncio."""

    def __init__(self, name: str, *errors: Exception) -> None:
        super().__init__(name)
        self.errors = list(errors)

    def start(self) -> ResourceInfo:
        if self.errors:
            raise self.errors.pop(0)
        return ResourceInfo(self.name, self.kind)


class Recorded(NoSession):
    """A session that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, node: str, *messages: Any) -> None:
        self.sent += messages

    def hellos(self) -> list[dict[str, str]]:
        """The troubles that each Hello since the first has named."""
        return [{r.name: r.trouble for r in each.resources} for each in self.sent if isinstance(each, Hello)]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_START_RETRY_MS", 100)


def test_a_database_that_is_away_does_not_keep_the_others_and_is_taken_in_when_it_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = Late("first"), Late("second", GONE, ResourceUnavailable("still starting up"))
    second_may_come = threading.Event()
    start = second.start

    def held() -> ResourceInfo:
        if len(second.errors) < 2:
            second_may_come.wait(30)
        return start()

    second.start = held  # type: ignore[method-assign]
    session = Recorded()
    with Client("default", [first, second]) as manager:
        manager.start(session)
        assert str(GONE) in caplog.text
        assert [(r.name, r.trouble) for r in manager.core.hello(session).resources] == [
            ("first", ""),
            ("second", str(GONE)),
        ]
        manager.core.on_welcome(session, WELCOME)
        with transaction(manager=TransactionManager(manager)):
            first.write("one")
        with pytest.raises(ResourceUnavailable, match=r"'second' of this process is not ready: .*connection refused"):
            with transaction(manager=TransactionManager(manager)):
                second.write("two")
        second_may_come.set()
        eventually(lambda: len(session.hellos()) == 2, evidence=lambda: str(session.sent))
        assert session.hellos() == [
            {"first": "", "second": "still starting up"},
            {"first": "", "second": ""},
        ]
        with transaction(manager=TransactionManager(manager)):
            second.write("two")
    assert (first.lines, second.lines) == (["one"], ["two"])


def test_rule_17_no_call_uses_a_database_that_no_coordinator_has_accepted_yet() -> None:
    """Its vote would travel with the reply, and count, before the coordinator could refuse the database."""
    second, session = Late("second", GONE), Recorded()
    context = TransactionContext("default", Xid(bytes(16)), WELCOME.owner, 60_000)
    second.identity = "db-2"
    with Client("default", [second]) as manager:
        manager.start(session)
        manager.core.on_welcome(session, WELCOME)
        eventually(lambda: not manager.state.starting.trouble("second"))
        call = manager.join(context)
        with pytest.raises(ResourceUnavailable, match="has not accepted it yet"), call.use(second):
            pass
        hello = [each for each in session.sent if isinstance(each, Hello)][-1]
        manager.core.on_message(session, WELCOME.owner.node, Tick(1, 0, hello.version - 1))
        with pytest.raises(ResourceUnavailable, match="has not accepted it yet"), call.use(second):
            pass
        manager.core.on_message(session, WELCOME.owner.node, Tick(1, 0, hello.version))
        with call.use(second):
            pass


async def test_the_same_in_asyncio() -> None:
    first, second = AsyncLate("first"), AsyncLate("second", GONE, GONE)
    resources: list[Any] = [first, second]
    async with AsyncClient("default", resources) as manager:
        await manager.start(AsyncNoSession())
        async with atransaction(manager=AsyncTransactionManager(manager)):
            await first.note("one")
        await aeventually(lambda: not manager.state.starting.trouble("second"))
        async with atransaction(manager=AsyncTransactionManager(manager)):
            await second.note("two")
    assert (first.lines, second.lines) == (["one"], ["two"])


def test_who_says_hello_while_a_resource_comes_up_says_it_again() -> None:
    """The session's thread asks for the Hello; what happens before the Welcome is not on it."""
    session = Recorded()
    late = Late("second", GONE)
    with Client("default", [late]) as manager:
        manager.start(session)
        manager.core.hello(session)
        eventually(lambda: not manager.state.starting.trouble("second"))
        manager.core.on_welcome(session, WELCOME)
        assert session.hellos() == [{"second": ""}]
        manager.core.on_welcome(session, WELCOME)
        assert len(session.hellos()) == 1


def test_a_database_that_does_not_answer_at_all_is_waited_for_in_the_background() -> None:
    answers, second = threading.Event(), Late("second")
    start = second.start
    second.start = lambda: (answers.wait(30), start())[1]  # type: ignore[method-assign]
    with Client("default", [Late("first"), second]) as manager:
        manager.state.start_patience_s = 0.05
        session = NoSession()
        manager.start(session)
        assert manager.core.hello(session).resources[1].trouble == "its database has not answered yet"
        answers.set()
        eventually(lambda: not manager.state.starting.trouble("second"))


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        ([UNFIT], "resource 'second' cannot prepare transactions"),
        ([UNFIT, GONE], "resource 'second' cannot prepare transactions; the database of .* is out of reach"),
        ([ValueError("a bug")], "a bug"),
        ([None], "start.. returns a ResourceInfo, not NoneType"),
    ],
)
def test_what_waiting_does_not_mend_is_raised_and_every_trouble_named(
    errors: list[Exception | None], says: str
) -> None:
    resources = [Late(f"r{number}", error) for number, error in enumerate(errors)]
    with Client("default", [Late("healthy"), *resources]) as manager:
        with pytest.raises((ConfigurationError, ValueError), match=says):
            manager.start(NoSession())


def test_rule_17_two_names_of_one_database_are_seen_whenever_the_second_comes() -> None:
    resources: dict[str, Any] = {"first": Late("first"), "second": Late("second")}
    starting = Starting(resources)
    info: Callable[[str], ResourceInfo] = lambda name: ResourceInfo(name, "notebook", "db-1")  # noqa: E731
    assert starting.took("second", info("second"))
    assert starting.took("first", info("first"))
    assert "resources 'first' and 'second' are one database (db-1)" in starting.trouble("first")
    assert not starting.trouble("second")
    with pytest.raises(ConfigurationError, match="one database"):
        starting.check()
    version = starting.version
    assert not starting.took("second", info("second"))
    assert starting.version == version, "no news, nothing to say"
