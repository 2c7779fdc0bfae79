"""One program with two stores and a coordinator inside it: the program is killed, and has only its log when it starts again."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from examples.bank import cashbox
from examples.bank.demo.progress import Progress
from txrpc.testing.processes import Child

__all__ = ["OneProgram", "files"]

ACCOUNTS, CENTS = 100, 1_000_000


class Store(Protocol):
    """One of the two, looked at from outside."""

    url: str

    def prepared(self) -> int: ...
    def journal(self) -> dict[str, int]: ...
    def total(self) -> int: ...


class _File:
    """A bank in a SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = f"sqlite:///{path}"

    def prepared(self) -> int:
        return 0  # SQLite cannot

    def journal(self) -> dict[str, int]:
        return dict(self._ask("SELECT xid, sum(cents) FROM journal GROUP BY xid"))

    def total(self) -> int:
        return int(self._ask("SELECT sum(cents) FROM account")[0][0])

    def _ask(self, query: str) -> list[tuple[str, int]]:
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as connection:
            return connection.execute(query).fetchall()


class _Box:
    """A box of cash in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = str(folder)

    def prepared(self) -> int:
        return len(cashbox.amounts(self._folder, cashbox.PREPARED))

    def journal(self) -> dict[str, int]:
        return {xid: cents for xid, cents in self._amounts() if xid}

    def total(self) -> int:
        return sum(cents for _, cents in self._amounts())

    def _amounts(self) -> list[tuple[str, int]]:
        return cashbox.amounts(self._folder, cashbox.COMMITTED)


def files(folder: Path) -> dict[str, Store]:
    """A box of cash, and a bank in a file, which decides."""
    return {"the box": _Box(folder / "box"), "the file": _File(folder / "bank.db")}


class OneProgram:
    """The program, and what it writes of itself."""

    def __init__(self, folder: Path, stores: Mapping[str, Store], stop: Callable[[], None]) -> None:
        """*stop*: called at the end, for what belongs to the stores."""
        self._stores, self._stop = stores, stop
        arguments = [sys.executable, "-m", "examples.bank.program", "--log", f"sqlite:///{folder / 'log.db'}"]
        arguments += ["--accounts", str(ACCOUNTS), "--cents", str(CENTS)]
        arguments += ["--stores", *(store.url for store in stores.values())]
        self.program = Child(
            [*arguments, "--threads", "8"], name="program", output=folder / "program.log", ready="serving"
        )
        self._idle = Child([*arguments, "--threads", "0"], name="idle", output=folder / "idle.log", ready="serving")
        self._read = 0

    def start(self) -> None:
        """Let the stores be made; no money moves yet."""
        self._idle.start()

    def stop(self) -> None:
        """Stop everything."""
        self.program.kill()
        self._idle.kill()
        self._stop()

    def prepared(self) -> dict[str, int]:
        """See `Stores`."""
        return {name: store.prepared() for name, store in self._stores.items()}

    def journals(self) -> list[dict[str, int]]:
        """See `Stores`."""
        return [store.journal() for store in self._stores.values()]

    def total(self) -> int:
        """See `Stores`."""
        return sum(store.total() for store in self._stores.values())

    def work(self, progress: Progress, console: Console, _threads: int) -> None:
        """Follow what the program says of its transfers, and kill it on the way."""
        self._idle.terminate()
        self.program.start()
        for share in (0.20, 0.45, 0.70):
            self._follow(progress, share)
            what = f"the program (pid {self.program.pid})"
            self.program.kill()
            progress.killed(console, what, self)
            self.program.start()
            progress.say(console, "started again: the program")
        self._follow(progress, 1.0)
        self.program.terminate()
        self._hear(progress)
        # What it had not finished when it was told to stop is finished by the next one.
        self._idle.start()

    def _follow(self, progress: Progress, share: float) -> None:
        while progress.done < share * progress.transfers:
            if not self.program.running:
                raise RuntimeError(f"the program has ended:\n{self.program.text()[-4000:]}")
            self._hear(progress)
            time.sleep(0.02)

    def _hear(self, progress: Progress) -> None:
        """Take what it has written since then; a line that the kill cut off is none."""
        with self.program.output.open("rb") as file:
            file.seek(self._read)
            said = file.read()
        whole = said[: said.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            match line.split():
                case ["try", xid]:
                    progress.tried(xid)
                case ["again", xid]:
                    progress.again(xid)
                case ["told", xid, *result]:
                    progress.finished(" ".join(result), xid)
