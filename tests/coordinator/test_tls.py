"""TLS between processes and the coordinator, and for the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

import txrpc
import txrpc.aio
from tests.waiting import eventually
from txrpc._coordinator.config import CoordinatorConfig
from txrpc._wire.v1 import peer_pb2, peer_pb2_grpc
from txrpc.errors import ConfigurationError
from txrpc.testing.processes import CoordinatorProcess, free_port


@dataclass(frozen=True)
class Files:
    """A CA, and two certificates of it, as files and as credentials."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    @property
    def known(self) -> grpc.ChannelCredentials:
        """Of a process that trusts the CA, and has no certificate itself."""
        return grpc.ssl_channel_credentials(self.read("ca.pem"))

    @property
    def mutual(self) -> grpc.ChannelCredentials:
        """Of a process that has one."""
        return grpc.ssl_channel_credentials(self.read("ca.pem"), self.read("client.key"), self.read("client.pem"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("server", "client"):
        certificate = ca.issue_cert("127.0.0.1", "localhost")
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    stranger = trustme.CA().issue_cert("127.0.0.1")
    stranger.private_key_pem.write_to_path(str(folder / "stranger.key"))
    return Files(folder)


Run = Callable[..., CoordinatorProcess]


@pytest.fixture
def run(tmp_path: Path, files: Files) -> Iterator[Run]:
    """``run(client_ca=True)``: a real coordinator with TLS."""
    made: list[CoordinatorProcess] = []

    def one(client_ca: bool = False) -> CoordinatorProcess:
        options = ["--tls-certificate", files.path("server.pem"), "--tls-key", files.path("server.key")]
        options += ["--tls-client-ca", files.path("ca.pem")] if client_ca else []
        made.append(CoordinatorProcess(tmp_path, options=options))
        made[-1].start()
        return made[-1]

    yield one
    for coordinator in made:
        coordinator.kill()


def connect(address: str, credentials: grpc.ChannelCredentials | None) -> txrpc.TransactionManager:
    return txrpc.connect(address, credentials=credentials, options=txrpc.SessionOptions(connect_timeout_s=2))


def status(address: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "txrpc.cli", "status", "--json", "--coordinator", address, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_connects_over_tls_and_one_without_it_does_not(run: Run, files: Files) -> None:
    coordinator = run()
    with connect(coordinator.address, files.known) as manager:
        eventually(lambda: manager.status().coordinator == "c1", 20)
    with connect(coordinator.address, None) as manager:
        assert manager.status().coordinator is None
    with connect(coordinator.address, grpc.ssl_channel_credentials()) as manager:  # trusts others
        assert manager.status().coordinator is None
    assert "no TLS" not in coordinator.text()


async def test_an_asyncio_process_too(run: Run, files: Files) -> None:
    coordinator = run()
    async with await txrpc.aio.connect(coordinator.address, credentials=files.known) as manager:
        assert manager.status().coordinator == "c1"


def test_with_a_client_ca_a_process_without_a_certificate_is_refused(run: Run, files: Files) -> None:
    coordinator = run(client_ca=True)
    with connect(coordinator.address, files.mutual) as manager:
        eventually(lambda: manager.status().coordinator == "c1", 20)
    with connect(coordinator.address, files.known) as manager:
        assert manager.status().coordinator is None


def test_the_members_of_a_group_know_each_other_by_their_certificates(tmp_path: Path, files: Files) -> None:
    ports = {node: free_port() for node in ("c1", "c2")}
    options = ["--members", ",".join(f"{node}=127.0.0.1:{port}" for node, port in ports.items())]
    options += ["--tls-certificate", files.path("server.pem"), "--tls-key", files.path("server.key")]
    options += ["--tls-client-ca", files.path("ca.pem"), "--tls-peer-ca", files.path("ca.pem")]
    members = [
        CoordinatorProcess(tmp_path, node=node, port=port, log=f"sqlite:///{tmp_path / node}.db", options=options)
        for node, port in ports.items()
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(CoordinatorProcess.start, members))
    try:
        for member in members:
            with connect(member.address, files.mutual) as manager:
                eventually(lambda manager=manager: manager.status().coordinator, 20)  # type: ignore[misc]
        with grpc.insecure_channel(members[0].address) as channel, pytest.raises(grpc.RpcError) as raised:
            peer_pb2_grpc.PeerStub(channel).Beat(peer_pb2.PeerBeat(), timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        with grpc.secure_channel(members[0].address, files.known) as channel, pytest.raises(grpc.RpcError) as raised:
            peer_pb2_grpc.PeerStub(channel).Beat(peer_pb2.PeerBeat(), timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        for member in members:
            member.kill()


def test_the_command_line_over_tls(run: Run, files: Files) -> None:
    coordinator = run(client_ca=True)
    ca = ["--tls-ca", files.path("ca.pem")]
    own = ["--tls-certificate", files.path("client.pem"), "--tls-key", files.path("client.key")]
    answer = status(coordinator.address, *ca, *own)
    assert json.loads(answer.stdout)["owner"]["node"] == "c1", answer.stderr
    for wrong in ([], ca):
        answer = status(coordinator.address, *wrong, "--timeout", "3")
        assert answer.returncode == 1
        assert "no answer from a coordinator" in answer.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-certificate", "server.pem"], "--tls-certificate and --tls-key belong together"),
        (["--tls-certificate", "server.pem", "--tls-key", "server.key"], "--tls-certificate needs --tls-ca"),
        (["--tls-ca", "/not/there.pem"], "cannot read /not/there.pem: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(options: list[str], words: str) -> None:
    answer = status("127.0.0.1:1", *options)
    assert answer.returncode != 0
    assert words in " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tls_certificate": "x"}, "tls_certificate and tls_key belong together"),
        ({"tls_key": "x"}, "tls_certificate and tls_key belong together"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs tls_certificate and tls_key"),
    ],
)
def test_options_that_belong_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        CoordinatorConfig(**given)


@pytest.mark.parametrize(
    ("certificate", "key", "ca", "words"),
    [
        ("not there.pem", "server.key", None, "tls_certificate: cannot read"),
        ("server.pem", "not there.key", None, "tls_key: cannot read"),
        ("server.pem", "stranger.key", None, "are not a certificate with its key"),
        ("server.key", "server.key", None, "are not a certificate with its key"),
        ("server.pem", "server.key", "not there.pem", "tls_client_ca: cannot read"),
        ("server.pem", "server.key", "server.key", "is not a certificate"),
    ],
)
def test_files_that_cannot_work_are_named(
    files: Files, tmp_path: Path, certificate: str, key: str, ca: str | None, words: str
) -> None:
    options = ["--tls-certificate", files.path(certificate), "--tls-key", files.path(key)]
    options += ["--tls-client-ca", files.path(ca)] if ca else []
    command = [sys.executable, "-m", "txrpc.cli", "coordinator", "--listen", "127.0.0.1:0", *options]
    log = ["--log", f"sqlite:///{tmp_path / 'log.db'}"]
    answer = subprocess.run([*command, *log], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert words in answer.stderr + answer.stdout


def test_a_coordinator_inside_a_program_serves_with_tls(tmp_path: Path, files: Files) -> None:
    keys = grpc.ssl_server_credentials([(files.read("server.key"), files.read("server.pem"))])
    address = f"127.0.0.1:{free_port()}"
    with txrpc.embedded(f"sqlite:///{tmp_path / 'log.db'}", listen=address, credentials=keys):
        with txrpc.connect(address, credentials=files.known) as other:
            assert other.status().coordinator == "embedded"
        quick = txrpc.SessionOptions(connect_timeout_s=0.5)
        with txrpc.connect(address, options=quick) as stranger:
            assert stranger.status().coordinator is None
