"""Failpoints: their names are all there is, they do what they say, and mistakes in arming them are told."""

from __future__ import annotations

import ast
import re
import signal
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from tests.waiting import eventually
from txrpc import _failpoints as failpoints
from txrpc._failpoints import MESSAGES, POINTS, STEPS, FailpointError, Point, parse
from txrpc._protocol.messages import FromCoordinator, ToCoordinator
from txrpc._protocol.participant.branch import Operation
from txrpc.errors import ConfigurationError
from txrpc.testing import failpoint
from txrpc.testing.processes import Child

SOURCES = sorted((Path(__file__).resolve().parents[2] / "txrpc").rglob("*.py"))
WALKER = """
import sys, time
from txrpc._failpoints import failpoint
print("ready", flush=True)
for _ in range(400):
    failpoint("participant.before_prepare")
    time.sleep(0.05)
"""


def test_every_message_has_its_points() -> None:
    assert {name for names in MESSAGES.values() for name in names} == {
        kind.__name__ for kind in (*get_args(ToCoordinator), *get_args(FromCoordinator))
    }
    assert set(MESSAGES["coordinator"]) == {kind.__name__ for kind in get_args(FromCoordinator)}


def test_every_point_of_a_step_is_in_the_code_and_the_other_way_round() -> None:
    written = {name for path in SOURCES for name in _points_in(path)}
    steps = {f"{role}.{when}_{step}" for role in STEPS for when in ("before", "after") for step in STEPS[role]}
    # Breaking off brings no result, and asking how one has ended goes on with another operation.
    others = {Operation.INTERRUPT, Operation.ASK_AGAIN}
    operations = {operation.value for operation in Operation if operation not in others} | {"decide"}
    made = {f"participant.{when}_{name}" for when in ("before", "after") for name in operations}
    assert written | made == steps
    assert steps < POINTS


def _points_in(path: Path) -> set[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    ours = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "failpoint" and call.args]
    return {call.args[0].value for call in ours if isinstance(call.args[0], ast.Constant)}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("coordinator.after_recrd=kill", "did you mean coordinator.after_record?"),
        ("nonsense=kill", "the names are in docs/testing-your-services.md"),
        ("coordinator.after_record", "NAME=ACTION"),
        ("coordinator.after_record=explode", "an action is kill, stop, error or sleep:SECONDS"),
        ("coordinator.after_record=sleep", "sleep:SECONDS"),
        ("coordinator.after_record=sleep:soon", "sleep:SECONDS"),
        ("coordinator.after_record=kill:3", "sleep:SECONDS"),
        ("coordinator.after_record=kill@0", "@N"),
        ("coordinator.after_record=kill@-1", "@N"),
    ],
)
def test_a_mistake_in_a_point_is_told(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse(text)


def test_a_process_does_not_start_with_a_mistake_in_its_points() -> None:
    child = Child([sys.executable, "-c", "import txrpc"], name="child")
    child.environment["TXRPC_FAILPOINTS"] = "coordinator.after_recrd=kill"
    with child:
        assert child.wait() != 0
        assert "did you mean coordinator.after_record?" in child.text()


def test_a_point_acts_once_the_nth_time() -> None:
    point = Point("coordinator.after_record", "error@3")
    point.hit()
    point.hit()
    assert not point.done
    with pytest.raises(FailpointError, match=r"failpoint coordinator\.after_record"):
        point.hit()
    point.hit()
    assert point.done


def test_in_the_tests_own_process_a_point_raises_or_sleeps_until_the_end_of_the_block() -> None:
    with failpoint("client.before_call", "error") as armed:
        with pytest.raises(TimeoutError):
            armed.wait(0)
        with pytest.raises(FailpointError):
            failpoints.failpoint("client.before_call")
        assert armed.hit
        with failpoint("client.after_call", "sleep:0.2") as slow:
            began = time.monotonic()
            failpoints.failpoint("client.after_call")
            assert time.monotonic() - began >= 0.2
            slow.wait(0)
    failpoints.failpoint("client.before_call")
    assert failpoints.program.points == {}


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_in_the_tests_own_process_nothing_is_killed_or_frozen(action: str) -> None:
    with pytest.raises(ConfigurationError, match="give the process"), failpoint("client.before_call", action):
        pass
    assert failpoints.program.points == {}


def test_a_running_process_is_armed_frozen_resumed_and_killed(tmp_path: Path) -> None:
    walker = Child([sys.executable, "-c", WALKER], name="walker", output=tmp_path / "walker.log", ready="ready")
    with walker:
        with failpoint("participant.before_prepare", "sleep:0.01", process=walker) as slow:
            slow.wait()
        with failpoint("participant.before_prepare", "stop", process=walker) as frozen:
            frozen.wait()
        assert walker.running
        walker.resume()
        with failpoint("participant.before_prepare", "kill", process=walker) as crash:
            crash.wait()
        assert walker.wait() == -signal.SIGKILL
        walker.start()
        time.sleep(0.2)
        assert walker.running, "it is not armed any more"


STOPPER = """
import threading, time
from txrpc._failpoints import Point

def work():
    for number in range(20):
        Point("participant.before_prepare", "stop").hit()
        print(f"went on {number}.", flush=True)

threading.Thread(target=work, daemon=True).start()
time.sleep(120)
"""


def test_the_thread_that_comes_to_a_point_is_frozen_at_once_and_with_it_the_process(tmp_path: Path) -> None:
    """A signal to the process went to its first thread, which had to wake up first: the one at the point went on for some time."""
    with Child([sys.executable, "-c", STOPPER], name="stopper", output=tmp_path / "stopper.log") as stopper:
        for number in range(20):
            eventually(lambda: stopper.suspended)
            assert stopper.text().count("failpoint") == number + 1
            assert f"went on {number}." not in stopper.text()
            stopper.resume()


def test_a_point_that_nobody_comes_to_is_waited_for_in_vain(tmp_path: Path) -> None:
    walker = Child([sys.executable, "-c", WALKER], name="walker", output=tmp_path / "walker.log", ready="ready")
    with walker, failpoint("participant.before_rollback", "kill", process=walker) as crash:
        with pytest.raises(TimeoutError, match=r"participant\.before_rollback"):
            crash.wait(0.3)
