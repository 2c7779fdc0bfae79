"""The session, in both colours, against a coordinator that behaves and coordinators that do not."""

from __future__ import annotations

import inspect
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tests.rpc import scripted
from tests.rpc.scripted import (
    QUICK,
    Face,
    Notes,
    Script,
    ScriptedCoordinator,
    Talk,
    listen,
    number_of,
    request,
    say,
    say_and_stay,
    welcome,
)
from txrpc._grpc import batches, link
from txrpc._grpc.session import Session
from txrpc._grpc.session_async import AsyncSession
from txrpc._protocol import messages as m
from txrpc._wire.codec import encode_from_coordinator
from txrpc._wire.v1 import session_pb2 as pb
from txrpc.errors import AbortCode as Code
from txrpc.errors import ConfigurationError, CoordinatorUnavailable, LimitExceeded, Reason
from txrpc.ids import BranchId, ParticipantId
from txrpc.options import SessionOptions
from txrpc.testing.processes import free_port

Make = Callable[..., Face]


@pytest.fixture(params=["sync", "aio"])
def colour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def connect(colour: str, notes: Notes) -> Iterator[Make]:
    """Make a session with *notes* and start it; closed at the end."""
    faces: list[Face] = []

    def make(address: str, *, start: bool = True, **more: Any) -> Face:
        face = Face(colour, address, notes, **more)
        faces.append(face)
        if start:
            face.start()
        return face

    yield make
    for face in faces:
        face.dispose()


# ------------------------------------------------------------------------------------------------- what it is for


def test_hello_is_first_and_a_welcome_answers_it(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        assert face.wait_connected() == welcome()
        assert face.session._welcome == welcome()
        assert face.session.last_error == ""
        assert notes.welcomes == [welcome()]
        [hello] = coordinator.hellos
        assert isinstance(hello, m.Hello)
        assert hello.process == "hello 1"


def test_messages_arrive_in_order_both_ways(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        for start in range(0, 5_000, 50):
            face.send(*map(request, range(start, start + 50)))
        notes.wait(lambda: len(notes.messages) == 5_000)
        assert [number_of(x) for x in notes.messages] == list(range(5_000))


def test_what_is_waiting_goes_out_together_within_both_limits(connect: Make, notes: Notes) -> None:
    options = SessionOptions(max_batch=40)

    def slowly(talk: Talk) -> Iterator[scripted.Said]:
        yield welcome(max_message_bytes=5_000)
        for _batch in talk.batches():
            time.sleep(0.002)
            yield m.Tick(len(talk.counts))

    with ScriptedCoordinator(slowly) as coordinator:
        face = connect(coordinator.address, options=options)
        face.wait_connected()
        face.send(*map(request, range(1_000)))
        face.send(*[long_request(x) for x in range(40)])
        [talk] = coordinator.talks
        notes.wait(lambda: sum(talk.counts) == 1_041)
        assert max(talk.counts) == 40
        assert max(talk.sizes) <= 5_000
        assert max(talk.sizes) > 2 * len_of(long_request(0)), "long messages went out one by one"
        assert len(talk.counts) < 100


def long_request(number: int, branches: int = 40) -> m.OutcomeRequest:
    refs = [
        m.BranchRef(BranchId(x.to_bytes(8, "big")), "accounts", ParticipantId(bytes(8)), 1) for x in range(branches)
    ]
    return m.OutcomeRequest(request(number).xid, scripted.OWNER.epoch, 1, tuple(refs))


def len_of(message: m.ToCoordinator) -> int:
    return len(batches.Waiting(QUICK).encode("c1", (message,))[0])


def test_tick_is_a_message_like_any_other(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(say_and_stay(welcome(), m.Tick(2), m.Tick(3))) as coordinator:
        connect(coordinator.address).wait_connected()
        notes.wait(lambda: len(notes.messages) == 2)
        assert notes.messages == [m.Tick(2), m.Tick(3)]
        assert notes.order == ["welcome", "message", "message"]


def test_messages_in_the_batch_of_the_welcome_are_taken(connect: Make, notes: Notes) -> None:
    both = b"".join(
        encode_from_coordinator(scripted.OWNER.node, (x,)).SerializeToString() for x in (welcome(), m.Tick(2))
    )
    with ScriptedCoordinator(say_and_stay(both)) as coordinator:
        connect(coordinator.address)
        notes.wait(lambda: notes.messages == [m.Tick(2)])
        assert notes.order == ["welcome", "message"]


def test_what_comes_with_the_welcome_is_known_to_the_thread_that_waited_for_it(notes: Notes) -> None:
    """A transaction that begins at once may name a register: which there are is told behind the welcome."""
    both = b"".join(
        encode_from_coordinator(scripted.OWNER.node, (x,)).SerializeToString() for x in (welcome(), m.Tick(2))
    )
    with ScriptedCoordinator(say_and_stay(both)) as coordinator:
        face = Face("sync", coordinator.address, notes)
        open_before: list[bool] = []
        notes.at_message = lambda: open_before.append(face.session._welcome is not None)
        face.start()
        face.wait_connected()
        assert (notes.messages, open_before) == ([m.Tick(2)], [False])
        face.dispose()


def test_encrypted_with_channel_credentials(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(listen, secure=True) as coordinator:
        face = connect(coordinator.address, channel_credentials=grpc.local_channel_credentials())
        face.wait_connected()
        face.send(request(7))
        notes.wait(lambda: notes.messages)


# --------------------------------------------------------------------------------------------------- no session


def test_nothing_is_sent_before_the_welcome(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(say_and_stay()) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: coordinator.hellos)
        with pytest.raises(CoordinatorUnavailable, match="has not answered yet"):
            face.send(request())
        assert coordinator.received == []


def test_a_session_that_was_not_started(connect: Make) -> None:
    face = connect("127.0.0.1:1", start=False)
    with pytest.raises(CoordinatorUnavailable, match="has not been started"):
        face.send(request())
    with pytest.raises(CoordinatorUnavailable, match="has not been started"):
        face.wait_connected(0.05)
    face.close()


def test_a_refused_port_is_told_with_its_address(connect: Make, notes: Notes) -> None:
    port = free_port()
    face = connect(f"127.0.0.1:{port}")
    notes.wait(lambda: "refused" in face.session.last_error)
    with pytest.raises(CoordinatorUnavailable, match=rf"127\.0\.0\.1:{port}"):
        face.wait_connected(0.1)
    assert notes.hellos >= 1
    assert notes.order == []


def test_who_accepts_and_says_nothing_is_given_up(connect: Make, notes: Notes) -> None:
    options = SessionOptions(connect_timeout_s=0.3, backoff_initial_s=0.02, backoff_max_s=0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        face = connect(f"127.0.0.1:{silent.getsockname()[1]}", options=options)
        notes.wait(lambda: notes.hellos >= 3)
        with pytest.raises(CoordinatorUnavailable, match=r"no answer within 0\.3 s"):
            face.wait_connected(0.05)


def test_who_never_says_welcome_is_given_up(connect: Make, notes: Notes) -> None:
    options = SessionOptions(connect_timeout_s=0.3, backoff_initial_s=0.02, backoff_max_s=0.1)
    with ScriptedCoordinator(say_and_stay(), listen) as coordinator:
        face = connect(coordinator.address, options=options)
        face.wait_connected()
        assert notes.hellos >= 2
        assert notes.losses == [], "there was no session to lose"


def test_another_grpc_server_is_called_so(connect: Make, notes: Notes) -> None:
    with ScriptedCoordinator(listen, service="some.Other") as coordinator:
        face = connect(coordinator.address)
        # Not in every attempt: grpc.aio may find its own write failed before it looks at the status.
        notes.wait(lambda: "is a gRPC server, but no coordinator" in face.session.last_error)
        with pytest.raises(CoordinatorUnavailable, match=coordinator.address):
            face.wait_connected(0.05)


def test_something_that_is_not_grpc(connect: Make, notes: Notes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        face = connect(f"127.0.0.1:{server.getsockname()[1]}")
        for _ in range(2):
            accepted, _peer = server.accept()
            with accepted:
                accepted.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        notes.wait(lambda: notes.hellos >= 2)
        with pytest.raises(CoordinatorUnavailable):
            face.wait_connected(0.05)


# ------------------------------------------------------------------------------------------------ the stream ends


def abort(talk: Talk) -> Iterator[scripted.Said]:
    yield welcome()
    talk.context.abort(grpc.StatusCode.UNAVAILABLE, "somebody pulled the plug")


@pytest.mark.parametrize(
    ("ending", "told"),
    [(say(welcome()), "ended the stream"), (abort, r"somebody pulled the plug \(UNAVAILABLE\)")],
)
def test_a_loss_is_told_once_and_a_new_session_says_hello_anew(
    connect: Make, notes: Notes, ending: Script, told: str
) -> None:
    with ScriptedCoordinator(ending, listen) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: len(notes.welcomes) == 2)
        assert notes.order == ["welcome", "lost", "welcome"]
        assert [x.process for x in coordinator.hellos if isinstance(x, m.Hello)] == ["hello 1", "hello 2"]
        [loss] = notes.losses
        notes.wait(lambda: face.session._welcome is not None)
        assert face.session.last_error == ""
        assert re.search(told, loss)


@pytest.mark.parametrize("goodbye", [False, True])
def test_after_a_healthy_session_the_first_attempt_is_made_at_once_unless_asked_to_leave(
    connect: Make, notes: Notes, monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    waits_s: list[float] = []
    next_s = link.Backoff.next_s

    def note(backoff: link.Backoff, lived_s: float, *, at_once: bool = True) -> float:
        waits_s.append(next_s(backoff, lived_s, at_once=at_once))
        return waits_s[-1]

    monkeypatch.setattr(link.Backoff, "next_s", note)
    monkeypatch.setattr(random, "random", lambda: 1.0)

    def for_a_while(_talk: Talk) -> Iterator[scripted.Said]:
        yield welcome()
        time.sleep(2 * QUICK.backoff_max_s)
        if goodbye:
            yield m.GoAway("shutdown", "the coordinator is shutting down", retry=True)

    with ScriptedCoordinator(for_a_while, for_a_while, listen) as coordinator:
        connect(coordinator.address)
        notes.wait(lambda: len(notes.welcomes) == 3)
        assert waits_s == [QUICK.backoff_initial_s if goodbye else 0.0] * 2


def test_a_stream_that_is_over_takes_nothing_once_its_loss_is_told(colour: str) -> None:
    """Else what is sent after `on_lost` would be waited for in vain."""
    streams: list[Any] = []
    taken = []

    class Late(Notes):
        def on_welcome(self, session: Any, said: m.Welcome) -> None:
            streams.append(face.session._outgoing)
            super().on_welcome(session, said)

        def on_lost(self, session: Any, text: str) -> None:
            taken.append(streams[-1].put([b""]))
            super().on_lost(session, text)

    late = Late()
    with ScriptedCoordinator(say_and_stay(welcome(), m.GoAway("a", "b", retry=True))) as coordinator:
        face = Face(colour, coordinator.address, late)
        face.start()
        late.wait(lambda: len(late.losses) >= 3)
        face.dispose()
    assert taken
    assert not any(taken)


GARBAGE = b"\xff\xff\xff\xff"
BAD_XID = pb.CoordinatorBatch(items=[pb.CoordinatorItem(prepare=pb.Prepare(xid=b"abc"))]).SerializeToString()


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param([GARBAGE], id="garbage"),
        pytest.param([m.Tick(1)], id="Tick before Welcome"),
        pytest.param([b""], id="empty batch"),
        pytest.param([BAD_XID], id="bad xid"),
        pytest.param([welcome(), GARBAGE], id="garbage later"),
        pytest.param([welcome(), BAD_XID], id="bad xid later"),
    ],
)
def test_nonsense_drops_the_session_and_not_the_process(
    connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture, nonsense: list[Any]
) -> None:
    with ScriptedCoordinator(say_and_stay(*nonsense), listen) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: len(notes.welcomes) == len(nonsense))
        face.wait_connected()
        assert len(notes.losses) == len(nonsense) - 1
        assert notes.messages == []
        face.send(request(1))
        notes.wait(lambda: len(notes.messages) == 1)
    assert "made no sense" in caplog.text


def test_too_large_a_batch_drops_the_session(connect: Make, notes: Notes) -> None:
    options = SessionOptions(backoff_initial_s=0.02, backoff_max_s=0.1, max_message_bytes=4096)
    large = b"".join(
        encode_from_coordinator(scripted.OWNER.node, (m.Tick(1000),)).SerializeToString() for _ in range(2_000)
    )
    with ScriptedCoordinator(say_and_stay(welcome(), large), listen) as coordinator:
        connect(coordinator.address, options=options)
        notes.wait(lambda: len(notes.welcomes) == 2)
        assert "RESOURCE_EXHAUSTED" in notes.losses[0]
        assert notes.messages == []


def test_a_message_too_large_to_send_fails_its_sender_only(connect: Make, notes: Notes) -> None:
    def modest(talk: Talk) -> Iterator[scripted.Said]:
        yield welcome(max_message_bytes=4_000)
        for batch in talk.batches():
            for message in batch:
                yield m.Tick(number_of(message))

    with ScriptedCoordinator(modest) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        with pytest.raises(LimitExceeded, match=r"OutcomeRequest takes \d+ bytes; max_message_bytes allows 4000"):
            face.send(request(1), long_request(2, branches=400))
        face.send(request(3))
        notes.wait(lambda: notes.messages)
        assert notes.messages == [m.Tick(3)], "of the failed send nothing was queued"
        assert notes.losses == []


def test_a_coordinator_that_does_not_read_is_given_up_and_send_does_not_block(
    connect: Make, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WAITING_MAX", 2_000)
    stuck = []

    def deaf(talk: Talk) -> Iterator[scripted.Said]:
        yield welcome()
        stuck.append(talk)
        while talk.context.is_active():
            time.sleep(0.01)

    with ScriptedCoordinator(deaf, listen) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        with pytest.raises(CoordinatorUnavailable):
            for number in range(40_000):
                face.send(long_request(number))
        notes.wait(lambda: len(notes.welcomes) == 2)
        assert "does not read" in notes.losses[0]
        face.wait_connected()
        face.send(request(5))
        notes.wait(lambda: notes.messages)
        assert [number_of(x) for x in notes.messages] == [5], "what waited for the dead stream was dropped"


# --------------------------------------------------------------------------------------------------------- GoAway


@pytest.mark.parametrize("before", [(), (welcome(),)], ids=["instead of Welcome", "later"])
def test_a_final_goodbye_stops_it_for_good(
    connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture, before: tuple[Any, ...]
) -> None:
    farewell = m.GoAway("group", "this coordinator serves group 'other'", retry=False)
    with ScriptedCoordinator(say_and_stay(*before, farewell), listen) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: "other" in face.session.last_error)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"serves group 'other' \(group\)"):
                face.wait_connected(1)
        with pytest.raises(CoordinatorUnavailable, match="serves group 'other'"):
            face.send(request())
        time.sleep(0.3)
        assert len(coordinator.talks) == 1
        assert len(notes.losses) == len(before)
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("before", [(), (welcome(),)], ids=["instead of Welcome", "later"])
def test_another_goodbye_is_only_a_wait(connect: Make, notes: Notes, before: tuple[Any, ...]) -> None:
    farewell = m.GoAway("shutdown", "the coordinator is shutting down", retry=True)
    with ScriptedCoordinator(say_and_stay(*before, farewell), listen) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: len(notes.welcomes) == len(before) + 1)
        assert face.wait_connected() == welcome()
        assert notes.losses == [
            "the coordinator ended the session: the coordinator is shutting down (shutdown)" for _ in before
        ]


def test_who_waits_is_told_at_once_that_it_is_in_vain(connect: Make) -> None:
    def later(_talk: Talk) -> Iterator[scripted.Said]:
        time.sleep(0.3)
        yield m.GoAway("group", "not here", retry=False)

    with ScriptedCoordinator(later) as coordinator:
        face = connect(coordinator.address)
        before = time.monotonic()
        with pytest.raises(ConfigurationError, match="not here"):
            face.wait_connected(20)
        assert time.monotonic() - before < 5


def test_a_coordinator_that_names_no_limit_has_none_of_its_own(connect: Make, notes: Notes) -> None:
    def unlimited(talk: Talk) -> Iterator[scripted.Said]:
        yield welcome(max_message_bytes=0)
        for _batch in talk.batches():
            yield m.Tick(1)

    with ScriptedCoordinator(unlimited) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        face.send(long_request(1))
        notes.wait(lambda: notes.messages)


# ------------------------------------------------------------------------------------------------------ callbacks


def test_on_message_that_fails_is_logged_and_the_next_message_comes(
    connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    notes.fail_in = {"message"}
    with ScriptedCoordinator(say_and_stay(welcome(), m.Tick(2), m.Tick(3))) as coordinator:
        connect(coordinator.address)
        notes.wait(lambda: caplog.text.count("RuntimeError: message fails on purpose") == 2)
        assert notes.messages == [m.Tick(2), m.Tick(3)]
        assert notes.losses == []


def test_on_lost_that_fails_does_not_end_the_session_for_good(
    connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    notes.fail_in = {"lost"}
    with ScriptedCoordinator(say(welcome()), listen) as coordinator:
        connect(coordinator.address)
        notes.wait(lambda: len(notes.welcomes) == 2)
    assert "lost fails on purpose" in caplog.text


@pytest.mark.parametrize("callback", ["hello", "welcome"])
def test_a_hello_or_on_welcome_that_fails_costs_one_attempt(
    connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture, callback: str
) -> None:
    notes.fail_in = {callback}
    with ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        notes.wait(lambda: notes.hellos >= 3)
        with pytest.raises(CoordinatorUnavailable, match=f"{callback} fails on purpose"):
            face.wait_connected(0.05)
        notes.fail_in = set()
        face.wait_connected()
        assert len(notes.losses) == len(notes.welcomes) - 1
    assert f"{callback} fails on purpose" in caplog.text


def test_the_same_trouble_is_logged_once(connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "txrpc.session"):
        connect(f"127.0.0.1:{free_port()}")
        notes.wait(lambda: notes.hellos >= 6)
        assert len([r for r in caplog.records if r.name == "txrpc.session"]) == 1


# ---------------------------------------------------------------------------------------------------------- close


def test_close_sends_what_is_waiting(connect: Make, notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "txrpc.session"), ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        face.send(*map(request, range(3_000)))
        before = time.monotonic()
        face.close(grace_s=20)
        assert time.monotonic() - before < 10, "it ends when everything has gone, not when the grace is over"
        notes.wait(lambda: len(notes.messages) == 3_000)
        assert notes.losses == ["this process has closed its session"]
        ours = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("txrpc")]
        assert ours == [], "closing is not a trouble"


def test_after_close_everything_says_so_at_once(connect: Make) -> None:
    with ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        face.close()
        face.close()
        before = time.monotonic()
        with pytest.raises(CoordinatorUnavailable, match="closed"):
            face.send(request())
        with pytest.raises(CoordinatorUnavailable, match="closed"):
            face.wait_connected(60)
        assert time.monotonic() - before < 30, "it does not wait"
        assert face.session._welcome is None


def test_close_does_not_wait_for_who_does_not_answer(connect: Make, notes: Notes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        face = connect(f"127.0.0.1:{silent.getsockname()[1]}")
        notes.wait(lambda: notes.hellos == 1)
        before = time.monotonic()
        face.close(grace_s=60)
        assert time.monotonic() - before < 30, "it does not wait for its grace"


def test_close_gives_an_established_session_its_grace_and_no_more(connect: Make) -> None:
    def stubborn(talk: Talk) -> Iterator[scripted.Said]:
        yield welcome()
        while talk.context.is_active():
            time.sleep(0.01)

    with ScriptedCoordinator(stubborn) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        before = time.monotonic()
        face.close(grace_s=0.3)
        assert 0.25 < time.monotonic() - before < 20, "for ever, if it waited for the other end"


def test_close_during_a_long_wait_between_attempts(connect: Make, notes: Notes) -> None:
    options = SessionOptions(backoff_initial_s=60, backoff_max_s=60)
    face = connect(f"127.0.0.1:{free_port()}", options=options)
    notes.wait(lambda: "refused" in face.session.last_error)
    before = time.monotonic()
    face.close(grace_s=60)
    assert time.monotonic() - before < 30, "it does not wait for the next attempt"


# --------------------------------------------------------------------------------------------------------- colours


def test_both_colours_have_the_same_names_parameters_and_defaults() -> None:
    def public(kind: type) -> dict[str, str]:
        names = [name for name in dir(kind) if not name.startswith("_") or name == "__init__"]
        return {x: str(inspect.signature(f)) for x in names if callable(f := getattr(kind, x))}

    assert public(Session) == public(AsyncSession)
    assert {"start", "close", "send", "wait_answered"} < set(public(Session))


def test_reasons_of_any_length_can_be_sent(connect: Make, notes: Notes) -> None:
    long = m.RollbackRequest(request(1).xid, scripted.OWNER.epoch, 1, (), Reason(Code.REQUESTED, "x" * 100_000))
    with ScriptedCoordinator(listen) as coordinator:
        face = connect(coordinator.address)
        face.wait_connected()
        face.send(long, request(2))
        notes.wait(lambda: notes.messages)
        assert notes.losses == []
