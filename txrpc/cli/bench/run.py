"""The customers of a benchmark, and the processes that they use."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

import txrpc
from txrpc.cli.bench.service import DECIDES, METHOD
from txrpc.cli.bench.work import ACCOUNTS, GROUP, prepared_databases
from txrpc.errors import ConfigurationError

__all__ = ["FORMS", "Measured", "measure"]

FORMS = ("alone", "two-phase", "final calls", "a database decides")
_START_S = 30.0
_END_S = 20.0
_WARM_S = 0.5

Transfer = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one form did in one round."""

    form: str
    customers: int
    seconds: float
    took_s: list[float]
    """Of each transfer, in order."""

    @property
    def rate(self) -> float:
        """Transfers a second."""
        return len(self.took_s) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Milliseconds that so many percent of the transfers took at most."""
        return self.took_s[min(len(self.took_s) - 1, int(len(self.took_s) * percent / 100))] * 1000


def measure(urls: tuple[str, str], customers: Sequence[int], seconds: float, rounds: int) -> Iterator[Measured]:
    """Measure each of `FORMS` with each number of *customers* in turns, *rounds* times; what was made is gone at the end.

    Raises `ConfigurationError` or `ResourceUnavailable` before anything is measured, and what a transfer raises.
    """
    most = max(customers)
    with prepared_databases(urls, most), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(_coordinator(Path(folder)))
        banks = [
            stack.enter_context(_bank(Path(folder), f"bank-{number}", url, most, coordinator))
            for number, url in enumerate(urls)
        ]
        transfers = dict(zip(FORMS, stack.enter_context(_transfers(coordinator, banks)), strict=True))
        for _, number, form in itertools.product(range(rounds), customers, FORMS):
            yield _run(form, transfers[form], number, seconds)


@contextlib.contextmanager
def _transfers(coordinator: str, banks: list[list[str]]) -> Iterator[tuple[Transfer, ...]]:
    with txrpc.connect(coordinator, group=GROUP, process="customers"), contextlib.ExitStack() as stack:
        plain = [stack.enter_context(grpc.insecure_channel(alone)) for alone, _ in banks]
        joined = [stack.enter_context(grpc.insecure_channel(together)) for _, together in banks]
        first, second = map(_method, plain)
        third, fourth = (_method(grpc.intercept_channel(channel, *txrpc.client_interceptors())) for channel in joined)

        def alone(account: int) -> None:
            first(json.dumps([account, -1]).encode())
            second(json.dumps([account, 1]).encode())

        def together(account: int) -> None:
            with txrpc.transaction():
                third(json.dumps([account, -1]).encode())
                fourth(json.dumps([account, 1]).encode())

        def final(account: int) -> None:
            with txrpc.transaction(), txrpc.final_call():
                third(json.dumps([account, -1]).encode())
                fourth(json.dumps([account, 1]).encode())

        def decided(account: int) -> None:
            with txrpc.transaction(decide_in=DECIDES):
                with txrpc.final_call():
                    third(json.dumps([account, -1]).encode())
                with txrpc.final_call(decides=True):
                    fourth(json.dumps([account, 1]).encode())

        yield alone, together, final, decided


def _method(channel: grpc.Channel) -> Any:
    return channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)


def _run(form: str, transfer: Transfer, customers: int, seconds: float) -> Measured:
    from_s = time.monotonic() + _WARM_S
    until_s = from_s + seconds
    took_s: list[list[float]] = [[] for _ in range(customers)]
    failures: list[BaseException] = []

    def customer(mine: list[float]) -> None:
        try:
            # One at least, however slow the databases are.
            while ((began_s := time.monotonic()) < until_s or not mine) and not failures:
                transfer(random.randrange(ACCOUNTS))
                if began_s >= from_s:
                    mine.append(time.monotonic() - began_s)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=customer, args=(mine,)) for mine in took_s]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Measured(form, customers, time.monotonic() - from_s, sorted(itertools.chain(*took_s)))


# ------------------------------------------------------------------------------------------------------- the processes


@contextlib.contextmanager
def _coordinator(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = f"sqlite:///{folder / 'log.db'}"
    arguments = ["txrpc.cli", "coordinator", "--group", GROUP, "--listen", address, "--log", log]
    with _process(folder, "coordinator", arguments) as process:
        until_s = time.monotonic() + _START_S
        while not _listens(address):
            if process.poll() is not None or time.monotonic() > until_s:
                raise ConfigurationError(f"the coordinator did not start:\n{_written(folder, 'coordinator')}")
            time.sleep(0.05)
        yield address
        process.terminate()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def _written(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")[-2_000:]


@contextlib.contextmanager
def _bank(folder: Path, name: str, url: str, customers: int, coordinator: str) -> Iterator[list[str]]:
    with _process(folder, name, ["txrpc.cli.bench.service"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {"name": name, "url": url, "customers": customers, "coordinator": coordinator}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ConfigurationError(f"{name} did not start:\n{_written(folder, name)}")
        addresses: list[str] = json.loads(line)
        yield addresses
        process.stdin.close()


@contextlib.contextmanager
def _process(folder: Path, name: str, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of ours, which is not left behind; what it says of itself goes into a file."""
    with (folder / name).open("w", encoding="utf-8") as errors:
        output = subprocess.PIPE if name != "coordinator" else errors
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=errors, text=True)
        try:
            yield process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        finally:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):
                    pipe.close()
