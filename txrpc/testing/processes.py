"""Real processes for tests and demonstrations: started, killed, frozen and started again, always by their own process id."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from txrpc._failpoints import parse

__all__ = ["Child", "CoordinatorProcess", "free_port"]

_PORTS_FROM = 10_240
_GIVEN_MAX = 1_000
_STOPS_WITHIN_S = 10.0
_WATCHDOG = """
while read -r what pid; do
    case $what in
        started) alive="$alive $pid" ;;
        ended) left=; for each in $alive; do [ "$each" = "$pid" ] || left="$left $each"; done; alive=$left ;;
    esac
done
for each in $alive; do kill -9 "$each"; done
"""
"""Reads what becomes of children, and kills those that are left when their parent is gone, however that came."""
_giving = threading.Lock()
_given: deque[int] = deque()
"""The ports that were given last, newest at the end: what was given may be bound only later."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, and none of the last thousand that were given to any living process.

    It is none that the system gives to outgoing connections, where it can tell: a process that is killed and started again finds
    its port still free.  Safe in threads, and in processes of one user.
    """
    for _ in range(100):
        port = random.randrange(_PORTS_FROM, _first_outgoing_port())
        with _giving, socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port not in _given:
                    _reserve(port)
                    return port
    raise RuntimeError("100 ports in a row are taken")


def _reserve(port: int) -> None:
    """Keep *port* from other processes, as a locked byte of a file that all share; `OSError` if another one has it."""
    file = _reservations()
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    _given.append(port)
    if len(_given) > _GIVEN_MAX:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, _given.popleft())


@functools.cache
def _reservations() -> int:
    """Open for as long as this process lives: the system drops its locks when it ends, however that comes."""
    path = Path(tempfile.gettempdir(), f"txrpc-ports-{os.getuid()}")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@functools.cache
def _first_outgoing_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        first = 0
    return first if first > _PORTS_FROM else 32_768


@functools.cache
def _watchdog() -> subprocess.Popen[bytes]:
    """Return what watches over this process's children.  In a session of its own it hears no Ctrl-C."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(_dismiss, process)
    return process


def _dismiss(watchdog: subprocess.Popen[bytes]) -> None:
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a fork of this process has its end of the pipe
        watchdog.wait(2)


def _tell_watchdog(what: str, pid: int) -> None:
    told = _watchdog().stdin
    assert told is not None
    with contextlib.suppress(OSError):  # it was ended from outside: then children are not watched
        os.write(told.fileno(), f"{what} {pid}\n".encode())


class Child:
    """One program that can be started again and again with the same arguments; its output goes to one file.

    Not thread-safe.  As a context manager it is killed at the end; and when this process dies, whatever it dies of.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        ready: str = "",
    ) -> None:
        """*arguments* as for `subprocess`; *env* is added to this process's own environment; *ready*: what it writes once it is."""
        self.name = name
        self._ready = ready
        self._arguments = list(arguments)
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        """Of its next start."""
        if output is None:
            handle, path = tempfile.mkstemp(prefix=f"txrpc-{name}-", suffix=".log")
            os.close(handle)
            output = Path(path)
        self.output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._read_from = 0
        self._armed = output.with_name(f"{output.name}.failpoints")
        self.environment["TXRPC_FAILPOINTS"] = f"@{self._armed}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the running process."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Return whether it has been started and has not ended."""
        if self._process is None or self._process.returncode is not None:
            return False
        if self._process.poll() is None:
            return True
        _tell_watchdog("ended", self._process.pid)
        return False

    @property
    def suspended(self) -> bool:
        """Return whether it stands still, after `suspend` or a failpoint's "stop"."""
        if not self.running:
            return False
        if hasattr(os, "waitid"):
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        # macOS, before Python 3.13.
        state = subprocess.run(["ps", "-o", "state=", "-p", str(self.pid)], capture_output=True, text=True, check=False)
        return state.stdout.strip().startswith("T")

    def start(self) -> None:
        """Start it, which must not be running, and wait until it is ready, if it says when; raises `RuntimeError`."""
        self.launch()
        if self._ready:
            try:
                self.wait_for(self._ready)
            except BaseException:
                self.kill()
                raise

    def launch(self) -> None:
        """Start it, which must not be running, and do not wait; raises `RuntimeError`."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self._read_from = self.output.stat().st_size if self.output.exists() else 0
        with self.output.open("ab") as out:
            self._process = subprocess.Popen(
                self._arguments, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment
            )
        _tell_watchdog("started", self._process.pid)

    def kill(self) -> None:
        """SIGKILL, as a power cut would; fine if it is not running."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self.wait(30)

    def terminate(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and wait for its exit code."""
        self._signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Wait for its end and return its exit code."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        had_ended = self._process.returncode is not None
        code = self._process.wait(timeout_s)
        if not had_ended:
            _tell_watchdog("ended", self._process.pid)
        return code

    def suspend(self) -> None:
        """SIGSTOP, and wait until it stands still: it stays connected and does nothing."""
        self._signal(signal.SIGSTOP)
        until = time.monotonic() + _STOPS_WITHIN_S
        while self.running and not self.suspended and time.monotonic() < until:
            time.sleep(0.001)  # its threads run on until the signal has reached each

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def arm(self, failpoints: str) -> None:
        """Arm these failpoints and no others, at once if it runs: ``"NAME=ACTION,..."`` as in `txrpc._failpoints`; "" for none.

        Raises `ConfigurationError` for a name or action that there is not.
        """
        parse(failpoints)
        written = self._armed.with_name(f"{self._armed.name}.new")
        written.write_text(failpoints, encoding="utf-8")
        written.replace(self._armed)

    def text(self) -> str:
        """Return what it has written since it was last started."""
        with self.output.open("rb") as file:
            file.seek(self._read_from)
            return file.read().decode(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 20.0) -> None:
        """Wait until it has written *text*; raises `RuntimeError` with its output if it ends or takes too long."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if text in self.text():
                return
            if not self.running:
                break
            time.sleep(0.02)
        state = (
            "is running" if self.running else f"ended with code {self._process.returncode if self._process else None}"
        )
        raise RuntimeError(f"{self.name} did not write {text!r} ({state}):\n{self.text()[-4000:]}")

    def _signal(self, number: int) -> None:
        if self.running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class CoordinatorProcess(Child):
    """A real coordinator server on 127.0.0.1 (or *host*), with its log in a file (or wherever *log* says)."""

    def __init__(
        self,
        folder: Path,
        *,
        log: str = "",
        node: str = "c1",
        group: str = "default",
        options: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        launch: Sequence[str] = (),
    ) -> None:
        """*port*: 0 takes a free one.  *options* of ``txrpc coordinator``.

        *launch*: what goes before the command, such as ``["ip", "netns", "exec", ...]``.
        """
        self.host = host
        self.port = port or free_port()
        self.log = log or f"sqlite:///{folder / 'coordinator.db'}"
        arguments = ["--listen", self.address, "--log", self.log, "--node", node, "--group", group, *options]
        super().__init__(
            [*launch, sys.executable, "-m", "txrpc.cli", "coordinator", *arguments],
            name=node,
            output=folder / f"{node}.log",
            ready="listening",
        )

    @property
    def address(self) -> str:
        """``host:port``, the same after every restart."""
        return f"{self.host}:{self.port}"
