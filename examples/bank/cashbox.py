"""A resource of one's own: a box of cash, kept as files in a folder, that takes part in transactions like a database.

Each amount that is put in or taken out is a file, written once.  What a branch has written is prepared under the branch's name, and
renamed when the transaction ends: ``.prepared`` becomes ``.committed`` or ``.undone``.  A file of that name is proof of what has
happened, at any time and to any process.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import txrpc
from txrpc.resource import FinishResult, Gid, Outcome, Prepared, ReadOnly, Reason, ResourceInfo

PREPARED, COMMITTED, UNDONE = ".prepared", ".committed", ".undone"


@dataclass
class Slip:
    """The work of one branch: what is to be put in, in cents."""

    xid: str = ""
    amounts: list[int] = field(default_factory=list)


class CashBox:
    """See the module's docstring.  It implements `txrpc.resource.Resource`."""

    kind = "cashbox"

    def __init__(self, name: str, folder: Path, opening: int = 0) -> None:
        """*opening*: what is in a new box, in cents."""
        self.name = name
        self._folder, self._opening = folder, opening

    def add(self, cents: int) -> None:
        """Put *cents* in, or take them out, as part of the current transaction."""
        transaction: Any = txrpc.current_transaction()
        with transaction.use(self) as slip:
            slip.xid = str(transaction.xid)
            slip.amounts.append(cents)

    # What txrpc calls: see `txrpc.resource.Resource` for what each must do.

    def start(self) -> ResourceInfo:
        self._folder.mkdir(exist_ok=True)
        name = self._folder / "identity"
        if not name.exists():
            self._write(self._path("opening", COMMITTED), self._content(Slip(amounts=[self._opening]), ""))
            self._write(name, secrets.token_hex(8))
        return ResourceInfo(self.name, self.kind, name.read_text(encoding="utf-8"))

    def close(self) -> None:
        pass

    def begin(self, read_only: bool, within_s: float | None = None) -> Slip:
        return Slip()

    def prepare(self, work: Slip, gid: Gid) -> Prepared | ReadOnly:
        if not work.amounts:
            return ReadOnly()
        self._write(self._path(str(gid.branch), PREPARED), self._content(work, str(gid)))
        return Prepared()

    def commit_one_phase(self, work: Slip, committing: Callable[[str], None]) -> Outcome:
        number = secrets.token_hex(8)
        committing(number)
        self._write(self._path(number, COMMITTED), self._content(work, ""))
        return Outcome.COMMITTED

    def rollback(self, work: Slip) -> None:
        work.amounts.clear()

    def interrupt(self, work: Slip) -> None:
        pass  # nothing here waits

    def commit_prepared(self, gid: Gid, token: str) -> FinishResult:
        return self._finish(gid, COMMITTED, UNDONE)

    def rollback_prepared(self, gid: Gid, token: str) -> FinishResult:
        return self._finish(gid, UNDONE, COMMITTED)

    def in_doubt(self, group: str) -> Sequence[tuple[Gid, int]]:
        found = []
        for path in self._folder.glob(f"*{PREPARED}"):
            try:
                age_s = time.time() - path.stat().st_mtime
                gid = Gid.parse(json.loads(path.read_text(encoding="utf-8"))["gid"])
            except FileNotFoundError:
                continue  # it has ended meanwhile
            if gid is not None and gid.group == group and gid.resource == self.name:
                found.append((gid, max(0, int(age_s * 1000))))
        return found

    def one_phase_result(self, token: str) -> Outcome | None:
        return Outcome.COMMITTED if self._path(token, COMMITTED).exists() else Outcome.UNKNOWN

    def classify(self, error: BaseException) -> Reason | None:
        if not isinstance(error, OSError):
            return None
        return Reason(txrpc.AbortCode.RESOURCE_UNAVAILABLE, f"the folder of {self.name}: {error.strerror}")

    # Files.

    def _path(self, number: str, state: str) -> Path:
        return self._folder / f"{number}{state}"

    @staticmethod
    def _content(work: Slip, gid: str) -> str:
        return json.dumps({"gid": gid, "xid": work.xid, "cents": sum(work.amounts)})

    def _finish(self, gid: Gid, wanted: str, other: str) -> FinishResult:
        number = str(gid.branch)
        try:
            self._path(number, PREPARED).rename(self._path(number, wanted))
        except FileNotFoundError:
            if self._path(number, wanted).exists():
                return FinishResult.ALREADY
            return FinishResult.HEURISTIC if self._path(number, other).exists() else FinishResult.NOT_HERE
        self._sync_folder()
        return FinishResult.DONE

    def _write(self, path: Path, text: str) -> None:
        """Write a whole file, or none: what is there under its name survives a crash of the machine."""
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def amounts(folder: Path, state: str) -> list[tuple[str, int]]:
    """What is in the box in that *state*: transactions ("" for what was there at first), and cents."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*{state}"))
    return [(each["xid"], each["cents"]) for each in found]
