"""The synchronous session among threads, in forked children, and at the end of the interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rpc.scripted import Face, Notes, ScriptedCoordinator, Talk, listen, number_of, request, say_and_stay, welcome
from txrpc._protocol import messages as m
from txrpc.errors import CoordinatorUnavailable, ForkedError
from txrpc.testing.processes import free_port


@pytest.fixture
def notes() -> Notes:
    return Notes()


def test_twenty_threads_send_and_each_one_s_order_is_kept(notes: Notes) -> None:
    threads, each = 20, 200

    with ScriptedCoordinator(listen) as coordinator:
        face = Face("sync", coordinator.address, notes)
        face.start()
        face.wait_connected()

        def send_all(thread: int) -> None:
            for number in range(each):
                face.send(request(thread * each + number))

        workers = [threading.Thread(target=send_all, args=(x,)) for x in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        notes.wait(lambda: len(notes.messages) == threads * each, 30)
        numbers = [number_of(x) for x in notes.messages]
        assert sorted(numbers) == list(range(threads * each))
        for thread in range(threads):
            mine = [x for x in numbers if x // each == thread]
            assert mine == sorted(mine)
        face.dispose()


def test_every_send_is_answered_or_followed_by_on_lost(notes: Notes) -> None:
    """What the layer above relies on: it registers, sends, and is told one way or the other, over any number of losses."""
    waiting: dict[int, threading.Event] = {}
    stop = threading.Event()
    outcomes = {"answered or lost": 0, "not sent": 0}

    class Answers(Notes):
        def on_message(self, session: Any, node: str, message: m.FromCoordinator) -> None:
            waiting[number_of(message)].set()

        def on_lost(self, session: Any, text: str) -> None:
            super().on_lost(session, text)
            for event in list(waiting.values()):
                event.set()

    def briefly(talk: Talk) -> Iterator[m.FromCoordinator | bytes]:
        said = listen(talk)
        until = time.monotonic() + 0.02
        while time.monotonic() < until and (more := next(said, None)) is not None:
            yield more

    notes = Answers()
    with ScriptedCoordinator(briefly) as coordinator:
        face = Face("sync", coordinator.address, notes)
        face.start()

        def work(thread: int) -> None:
            number = thread * 1_000_000
            while not stop.is_set():
                number += 1
                event = waiting[number] = threading.Event()
                try:
                    face.send(request(number))
                except CoordinatorUnavailable:
                    outcomes["not sent"] += 1
                    time.sleep(0.001)
                else:
                    assert event.wait(20), "neither answered nor lost"
                    outcomes["answered or lost"] += 1
                del waiting[number]

        failures: list[BaseException] = []

        def guarded(thread: int) -> None:
            try:
                work(thread)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=guarded, args=(x,)) for x in range(1, 7)]
        for worker in workers:
            worker.start()
        notes.wait(lambda: len(notes.losses) >= 25, 60)
        stop.set()
        for worker in workers:
            worker.join(30)
        assert not failures
        assert min(outcomes.values()) > 10, outcomes
        face.dispose()


def test_a_callback_may_close_the_session(notes: Notes) -> None:
    with ScriptedCoordinator(listen) as coordinator:
        face = Face("sync", coordinator.address, notes)
        notes_on_message = notes.on_message

        def close_it(session: Any, node: str, message: m.FromCoordinator) -> None:
            face.session.close()
            notes_on_message(session, node, message)

        notes.on_message = close_it  # type: ignore[method-assign, assignment]
        face.start()
        face.wait_connected()
        face.send(request(1))
        notes.wait(lambda: notes.losses)
        assert len(notes.messages) == 1


def test_lost_sessions_leave_no_threads_behind(notes: Notes) -> None:
    with ScriptedCoordinator(say_and_stay(welcome(), m.GoAway("a", "b", retry=True))) as coordinator:
        threads = threading.active_count()
        face = Face("sync", coordinator.address, notes)
        face.start()
        notes.wait(lambda: len(notes.losses) >= 50)
        # Of the coordinator's pool, in this process: at most 16.
        assert threading.active_count() < threads + 30
        face.dispose()


@pytest.mark.parametrize("how", ["closed", "lost"])
def test_a_call_that_is_over_is_deleted_at_once(notes: Notes, how: str) -> None:
    """One that is left to the interpreter's last collection may wait there for ever: see `Session._forget_call`."""
    calls: list[weakref.ref[Any]] = []

    def keep(session: Any, message: m.Welcome) -> None:
        calls.append(weakref.ref(session._call))
        notes_on_welcome(session, message)

    notes_on_welcome = notes.on_welcome
    gc.collect()
    gc.disable()
    try:
        with ScriptedCoordinator(listen) as coordinator:
            face = Face("sync", coordinator.address, notes)
            notes.on_welcome = keep  # type: ignore[method-assign, assignment]
            face.start()
            face.wait_connected()
            if how == "closed":
                face.close()
        if how == "lost":
            notes.wait(lambda: notes.losses)
            face.close()
        assert [call() for call in calls] == [None]
    finally:
        gc.enable()
        face.dispose()


# ---------------------------------------------------------------------------------------------------------- fork


def in_child(check: object) -> int:
    """Fork, call *check* in the child, and return its exit code: 0 if it returned True."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 2  # type: ignore[operator]
        finally:
            os._exit(code)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def test_a_forked_child_is_told_what_to_do_and_the_parent_s_session_is_unharmed(notes: Notes) -> None:
    def refused(call: object) -> bool:
        try:
            call()  # type: ignore[operator]
        except ForkedError as error:
            return "call txrpc.connect() in the child" in str(error) and "post_fork" in str(error)
        return False

    with ScriptedCoordinator(listen) as coordinator:
        face = Face("sync", coordinator.address, notes)
        face.start()
        face.wait_connected()

        def check() -> bool:
            session = face.session
            refusals = [
                refused(lambda: session.send("c1", request(1))),
                refused(session.start),
            ]
            session.close()
            return all(refusals)

        # The child inherits every lock as it is, held or not, and must not touch one.
        with face.session._changed:  # type: ignore[union-attr]
            assert in_child(check) == 0
        face.send(request(2))
        notes.wait(lambda: notes.messages)
        assert [number_of(x) for x in notes.messages] == [2]
        assert notes.losses == []
        assert coordinator.received == []
        face.dispose()


# ------------------------------------------------------------------------------------------- the interpreter's end

PROGRAM = """
import os, sys, threading, time
from txrpc.ids import ParticipantId
from txrpc._protocol.messages import Hello
from txrpc._grpc.session import Session

class User:
    def hello(self, session):
        return Hello(1, "default", ParticipantId(os.urandom(8)), "p")

    def ignore(self, *_): ...

    on_welcome = on_message = on_lost = on_refused = ignore

session = Session(sys.argv[1], User())
session.start()
if sys.argv[2] == "connected":
    session.wait_answered(10)
else:
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("when", ["connected", "0", "0.3"])
def test_an_interpreter_that_ends_without_close_ends_quietly(when: str) -> None:
    with ScriptedCoordinator(lambda talk: iter([welcome(), *_until_the_end(talk)])) as coordinator:
        address = coordinator.address if when == "connected" else f"127.0.0.1:{free_port()}"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, address, when], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Fatal" not in done.stderr


def _until_the_end(_talk: Talk) -> Iterator[m.FromCoordinator]:
    return iter(())
