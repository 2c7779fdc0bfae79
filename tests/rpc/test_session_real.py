"""Both sessions and the real coordinator, which is killed, frozen, restarted and disagreed with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.scripted import Face, Notes, number_of, request
from txrpc._protocol import messages as m
from txrpc.errors import ConfigurationError, CoordinatorUnavailable
from txrpc.ids import ParticipantId
from txrpc.options import SessionOptions
from txrpc.testing.processes import CoordinatorProcess

Make = Callable[..., Face]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(Path(tmp_path_factory.mktemp("coordinator"))) as process:
        yield process


@pytest.fixture(autouse=True)
def _running(coordinator: CoordinatorProcess) -> None:
    if not coordinator.running:
        coordinator.start()


@pytest.fixture(params=["sync", "aio"])
def connect(request: pytest.FixtureRequest, coordinator: CoordinatorProcess) -> Iterator[Make]:
    faces: list[Face] = []

    def make(notes: Notes, **more: Any) -> Face:
        more.setdefault("options", SessionOptions())
        face = Face(request.param, coordinator.address, notes, **more)
        faces.append(face)
        face.start()
        return face

    yield make
    for face in faces:
        face.dispose()


def asks(face: Face, notes: Notes, number: int) -> None:
    """Make sure that the session carries a question there and an answer back."""
    said = len(notes.messages)
    face.send(request(number))
    notes.wait(lambda: any(number_of(x) == number for x in notes.messages[said:] if isinstance(x, m.OutcomeReply)))


def test_a_killed_coordinator_is_noticed_and_found_again(connect: Make, coordinator: CoordinatorProcess) -> None:
    notes = Notes()
    face = connect(notes)
    first = face.wait_connected()
    asks(face, notes, 1)
    coordinator.kill()
    notes.wait(lambda: notes.losses, 10)
    with pytest.raises(CoordinatorUnavailable):
        face.send(request(2))
    notes.wait(lambda: notes.hellos >= 3)  # it tries again and again
    coordinator.start()
    second = face.wait_connected(10)
    assert second.owner.epoch.number == first.owner.epoch.number + 1
    asks(face, notes, 3)
    assert len(notes.losses) == 1
    assert notes.hellos >= 3


def test_a_frozen_coordinator_is_noticed_within_the_keepalive(connect: Make, coordinator: CoordinatorProcess) -> None:
    notes = Notes()
    face = connect(notes, options=SessionOptions(connect_timeout_s=1.0, keepalive_s=1.0, keepalive_timeout_s=1.0))
    face.wait_connected()
    asks(face, notes, 1)
    coordinator.suspend()
    try:
        notes.wait(lambda: notes.losses, 15)  # gRPC's own keepalive would take minutes
        with pytest.raises(CoordinatorUnavailable):
            face.wait_connected(0.5)
    finally:
        coordinator.resume()
    face.wait_connected(10)
    asks(face, notes, 2)


def test_probes_do_not_annoy_the_coordinator(connect: Make) -> None:
    """A gRPC server ends connections that probe more often than it allows."""
    notes = Notes()
    face = connect(notes, options=SessionOptions(keepalive_s=1.1, keepalive_timeout_s=1.0))
    face.wait_connected()
    time.sleep(5)
    asks(face, notes, 1)
    assert notes.losses == []


def test_a_coordinator_that_restarts_quickly_again_and_again(connect: Make, coordinator: CoordinatorProcess) -> None:
    notes = Notes()
    face = connect(notes)
    epochs = [face.wait_connected().owner.epoch.number]
    for number in range(1, 4):
        coordinator.kill()
        coordinator.start()
        notes.wait(lambda number=number: len(notes.welcomes) == number + 1, 15)  # type: ignore[misc]
        epochs.append(face.wait_connected().owner.epoch.number)
        asks(face, notes, number)
    assert epochs == list(range(epochs[0], epochs[0] + 4))
    assert len(notes.losses) == 3


@pytest.mark.parametrize(("field", "value"), [("protocol", 999), ("group", "elsewhere")])
def test_who_does_not_belong_here_is_told_for_good(connect: Make, field: str, value: Any) -> None:
    class Stranger(Notes):
        def hello(self, _session: Any) -> m.Hello:
            said: dict[str, Any] = {"protocol": m.PROTOCOL_VERSION, "group": "default", field: value}
            return m.Hello(participant=ParticipantId(bytes(8)), process="stranger", **said)

    notes = Stranger()
    face = connect(notes)
    with pytest.raises(ConfigurationError, match=str(value)):
        face.wait_connected(10)
    assert notes.order == []
