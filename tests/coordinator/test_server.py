"""The coordinator as a process: what it answers, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from txrpc._protocol.messages import (
    BranchRef,
    CommitRequest,
    GoAway,
    Hello,
    Owner,
    ResourceInfo,
    Tick,
    ToCoordinator,
    Vote,
    Welcome,
)
from txrpc._wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2, session_pb2_grpc
from txrpc.ids import BranchId, Epoch, ParticipantId, Xid
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

NODE = "c1"


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    options = ["--max-sessions", "3", "--max-message-bytes", "20000"]
    with CoordinatorProcess(tmp_path, options=options) as process:
        yield process


def hello(number: int = 1, **changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "protocol": 1,
        "group": "default",
        "participant": ParticipantId(bytes([number] * 8)),
        "process": "t",
    }
    return Hello(**{**fields, **changes})


class Talk:
    """A raw session."""

    def __init__(self, address: str, *batches: session_pb2.ProcessBatch) -> None:
        self.channel = grpc.insecure_channel(address)
        self._stop = False
        self._batches = list(batches)
        self.call: Any = session_pb2_grpc.CoordinatorStub(self.channel).Session(self._requests(), timeout=20)

    def _requests(self) -> Iterator[session_pb2.ProcessBatch]:
        while not self._stop:
            while self._batches:
                yield self._batches.pop(0)
            time.sleep(0.02)

    def say(self, message: ToCoordinator) -> None:
        self._batches.append(encode_to_coordinator(NODE, [message]))

    def read(self) -> Any:
        """The next message that is no tick."""
        for batch in self.call:
            for _, message in decode_coordinator_batch(batch):
                if not isinstance(message, Tick):
                    return message
        return None

    def close(self) -> None:
        self._stop = True
        self.call.cancel()
        self.channel.close()


@pytest.fixture
def talk(coordinator: CoordinatorProcess) -> Iterator[Any]:
    talks: list[Talk] = []

    def begin(*batches: Any) -> Talk:
        encoded = [b if isinstance(b, session_pb2.ProcessBatch) else encode_to_coordinator(NODE, [b]) for b in batches]
        talks.append(Talk(coordinator.address, *encoded))
        return talks[-1]

    yield begin
    for one in talks:
        one.close()


def test_hello_is_answered_with_welcome(talk: Any) -> None:
    welcome = talk(hello()).read()
    assert isinstance(welcome, Welcome)
    assert welcome.owner.node == "c1"
    assert welcome.owner.epoch.number == 1


@pytest.mark.parametrize(
    ("first", "retry", "says"),
    [
        (hello(group="other"), False, "group"),
        (hello(protocol=99), False, "99"),
        (hello(seen=Owner("c1", Epoch.make(7, 7))), True, "restored"),
        (encode_to_coordinator(NODE, []), True, "Hello"),
        (
            session_pb2.ProcessBatch(items=[session_pb2.ProcessItem(hello=session_pb2.Hello(group="a'b"))]),
            True,
            "group",
        ),
    ],
)
def test_who_does_not_belong_here_is_sent_away_with_a_sentence(talk: Any, first: Any, retry: bool, says: str) -> None:
    answer = talk(first).read()
    assert isinstance(answer, GoAway)
    assert answer.retry is retry
    assert says in answer.text


def test_rule_15_garbage_ends_its_own_session_and_no_other(talk: Any, coordinator: CoordinatorProcess) -> None:
    good = talk(hello(1))
    assert isinstance(good.read(), Welcome)
    bad = session_pb2.ProcessItem(voted=session_pb2.Voted(xid=b"x"))
    rude = talk(hello(2), session_pb2.ProcessBatch(items=[bad]))
    assert isinstance(rude.read(), Welcome)
    answer = rude.read()
    assert isinstance(answer, GoAway)
    assert "vote" in answer.text
    with grpc.insecure_channel(coordinator.address) as channel:
        method: Any = channel.stream_stream("/txrpc.v1.Coordinator/Session", None, None)
        (batch,) = method(iter([b"\xff\xff\xff\xff"]), timeout=10)
        ((_, farewell),) = decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(batch))
        assert isinstance(farewell, GoAway)
        assert farewell.code == "protocol"
    big = talk(hello(3, process="x" * 400, resources=tuple(ResourceInfo(f"r{i}", "t", "i" * 90) for i in range(300))))
    with pytest.raises(grpc.RpcError) as caught:
        big.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert good.call.is_active()
    assert coordinator.running
    assert "Traceback" not in coordinator.text()


def test_a_member_of_a_group_takes_no_longer_messages_of_a_session_though_it_does_of_its_peers(tmp_path: Path) -> None:
    port = free_port()
    options = ["--max-message-bytes", "20000", "--members", f"c1=127.0.0.1:{port}"]
    with CoordinatorProcess(tmp_path, port=port, options=options) as member:
        resources = tuple(ResourceInfo(f"bank-{number}", "postgresql", "x" * 400) for number in range(100))
        talk = Talk(member.address, encode_to_coordinator("", [hello(resources=resources)]))
        try:
            farewell = talk.read()
            assert isinstance(farewell, GoAway)
            assert farewell.code == "protocol"
            assert "max_message_bytes is 20,000" in farewell.text
        finally:
            talk.close()


def test_at_the_limit_of_sessions_a_further_one_is_refused(talk: Any) -> None:
    for number in range(3):
        assert isinstance(talk(hello(number)).read(), Welcome)
    with pytest.raises(grpc.RpcError) as caught:
        talk(hello(9)).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_sessions is 3" in (caught.value.details() or "")


def test_health_reflection_and_status(coordinator: CoordinatorProcess, talk: Any) -> None:
    assert isinstance(talk(hello(resources=(ResourceInfo("bank", "postgresql"),))).read(), Welcome)
    with grpc.insecure_channel(coordinator.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
        names = {service.name for service in answer.list_services_response.service}
        assert {"txrpc.v1.Coordinator", "txrpc.v1.Admin", "grpc.health.v1.Health"} <= names
    status = run("status", "--json", "--coordinator", coordinator.address)
    shown = json.loads(status.stdout)
    assert shown["owner"]["node"] == "c1"
    assert re.fullmatch(r"1\.[0-9a-f]{8}", shown["owner"]["epoch"])
    assert [r["name"] for s in shown["sessions"] for r in s["resources"]] == ["bank"]
    assert shown["log_healthy"] is True
    people = run("status", "--coordinator", coordinator.address)
    assert "takes decisions" in people.stdout
    assert "bank" in people.stdout


def run(*arguments: str, expect: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "txrpc.cli", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=40, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_status_of_nobody_is_one_sentence() -> None:
    done = run("status", "--coordinator", "127.0.0.1:1", "--timeout", "2", expect=1)
    assert done.stderr.startswith("txrpc: no answer from a coordinator at 127.0.0.1:1")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_says_goodbye_and_ends_with_zero(
    coordinator: CoordinatorProcess, talk: Any, number: int
) -> None:
    session = talk(hello())
    assert isinstance(session.read(), Welcome)
    os.kill(coordinator.pid, number)
    farewell = session.read()
    assert isinstance(farewell, GoAway)
    assert (farewell.code, farewell.retry) == ("shutdown", True)
    assert coordinator.wait(20) == 0
    assert "event=stopped" in coordinator.text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--log", "sqlite:////nowhere/x.db"], 3, "check that the folder exists"),
        (["--log", "postgresql+psycopg://u:secret@127.0.0.1:1/x"], 3, "start the database"),
        (["--node", "it's"], 2, "node name"),
        (["--max-branches", "x"], 2, "--max-branches"),
        (["--config", "/nowhere.toml"], 2, "cannot read"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = run("coordinator", "--listen", "127.0.0.1:0", "--log", f"sqlite:///{tmp_path}/x.db", *arguments, expect=code)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_port_that_is_taken(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    done = run("coordinator", "--listen", coordinator.address, "--log", f"sqlite:///{tmp_path}/y.db", expect=5)
    assert "the port is taken" in done.stderr


def test_one_that_cannot_listen_does_not_fence_the_one_that_does(coordinator: CoordinatorProcess, talk: Any) -> None:
    arguments = ["--listen", coordinator.address, "--log", coordinator.log]
    run("coordinator", *arguments, expect=5)
    welcome = talk(hello()).read()
    assert isinstance(welcome, Welcome)
    assert coordinator.terminate() == 0
    with coordinator:
        again = talk(hello()).read()
    assert isinstance(again, Welcome)
    assert again.owner.epoch.number == welcome.owner.epoch.number + 1


def test_rule_7_a_second_one_on_the_log_ends_the_first_with_a_sentence(
    coordinator: CoordinatorProcess, talk: Any, tmp_path: Path
) -> None:
    session = talk(hello())
    welcome = session.read()
    (tmp_path / "second").mkdir()
    with CoordinatorProcess(tmp_path / "second", log=coordinator.log) as second:
        process = ParticipantId(bytes([1] * 8))
        refs = tuple(BranchRef(BranchId(bytes([n] * 8)), "r", process, 1, Vote.PREPARED) for n in (1, 2))
        session.say(CommitRequest(Xid.make(1, bytes(10)), welcome.owner.epoch, welcome.tick, refs, 10_000))
        farewell = session.read()
        assert isinstance(farewell, GoAway)
        assert (farewell.code, farewell.retry) == ("fenced", True)
        assert coordinator.wait(20) == 4
        (line,) = [line for line in coordinator.text().splitlines() if "event=fenced" in line]
        assert "epoch 1." in line
        assert "is over" in line
        assert second.running


def test_a_log_of_a_newer_version_is_refused(coordinator: CoordinatorProcess) -> None:
    assert coordinator.terminate() == 0
    file = coordinator.log.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE txrpc_schema SET version = 99")
    done = run("coordinator", "--listen", "127.0.0.1:0", "--log", coordinator.log, expect=3)
    assert "99" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_other_processes_are_called_is_shown_as_it_is(coordinator: CoordinatorProcess, talk: Any) -> None:
    assert isinstance(talk(hello(process="[/x] [bold]web :1st_place_medal:")).read(), Welcome)
    shown = run("status", "--coordinator", coordinator.address, env={"COLUMNS": "200"}).stdout
    assert "[/x] [bold]web :1st_place_medal:" in shown


@pytest.mark.parametrize("option", [["--limit", "-1"], ["--limit", "0"], ["--timeout", "0"]])
def test_status_options_out_of_range_are_one_sentence(option: list[str]) -> None:
    done = run("status", *option, expect=2)
    assert option[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_configures_it_and_json_logs_are_json(tmp_path: Path) -> None:
    env = {
        "TXRPC_LISTEN": "127.0.0.1:0",
        "TXRPC_LOG": f"sqlite:///{tmp_path}/z.db",
        "TXRPC_LOG_FORMAT": "json",
        "TXRPC_NODE": "by-env",
    }
    child = Child([sys.executable, "-m", "txrpc.cli", "coordinator"], name="json", env=env, output=tmp_path / "out.log")
    with child:
        child.wait_for('"listening"')
        lines = [json.loads(line) for line in child.text().splitlines()]
        listening = next(line for line in lines if line["event"] == "listening")
        assert listening["node"] == "by-env"
        assert int(listening["address"].rpartition(":")[2]) > 0
        assert child.terminate() == 0


def test_help_and_version_are_quick_and_load_no_database_library() -> None:
    code = "import sys, txrpc.cli; print(sorted(m for m in ('sqlalchemy', 'structlog', 'rich') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
    shown = run("coordinator", "--help").stdout
    assert "--max-branches" in shown
    assert "\n    2  bad configuration   5  cannot listen\n" in shown  # a table, not a paragraph
    assert run("version").stdout.startswith("txrpc ")
