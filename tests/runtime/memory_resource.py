"""A resource of the user's own, small and honest: a notebook in memory that can prepare, commit and roll back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from txrpc._context import current
from txrpc._protocol.messages import FinishResult, Outcome, ResourceInfo
from txrpc.errors import AbortCode, Reason
from txrpc.ids import Gid
from txrpc.resource import Prepared, ReadOnly


class NotebookError(Exception):
    """A statement failed."""


class Page:
    """The work of one branch."""

    def __init__(self, read_only: bool) -> None:
        self.read_only = read_only
        self.lines: list[str] = []
        self.interrupted = False

    def write(self, line: str) -> None:
        if self.interrupted or self.read_only or line == "bad":
            raise NotebookError(line)
        self.lines.append(line)


class MemoryResource:
    """See the module's docstring."""

    kind = "notebook"

    def __init__(self, name: str = "notebook") -> None:
        self.name = name
        self.lines: list[str] = []
        self.prepared: dict[Gid, Page] = {}
        self.verbs: list[str] = []
        self.rolled_back = threading.Event()
        self.fail_begin: Exception | None = None
        self.refuses = False
        """Whether it cannot prepare."""

    def start(self) -> ResourceInfo:
        return ResourceInfo(self.name, self.kind)

    def close(self) -> None:
        self.verbs.append("close")

    def begin(self, read_only: bool, within_s: float | None = None) -> Page:
        if self.fail_begin is not None:
            raise self.fail_begin
        self.verbs.append("begin")
        return Page(read_only)

    def prepare(self, work: Page, gid: Gid) -> Prepared | ReadOnly:
        self.verbs.append("prepare")
        if self.refuses:
            raise NotebookError("anything more")
        if not work.lines:
            return ReadOnly()
        self.prepared[gid] = work
        return Prepared("1")

    def commit_one_phase(self, work: Page, committing: Callable[[str], None]) -> Outcome:
        committing("1")
        self.verbs.append("commit_one_phase")
        self.lines += work.lines
        return Outcome.COMMITTED

    def rollback(self, work: Page) -> None:
        self.verbs.append("rollback")
        self.rolled_back.set()

    def interrupt(self, work: Page) -> None:
        self.verbs.append("interrupt")
        work.interrupted = True

    def commit_prepared(self, gid: Gid, token: str) -> FinishResult:
        self.verbs.append("commit_prepared")
        page = self.prepared.pop(gid, None)
        self.lines += page.lines if page else []
        return FinishResult.DONE if page else FinishResult.NOT_HERE

    def rollback_prepared(self, gid: Gid, token: str) -> FinishResult:
        self.verbs.append("rollback_prepared")
        return FinishResult.DONE if self.prepared.pop(gid, None) else FinishResult.NOT_HERE

    def in_doubt(self, group: str) -> Sequence[tuple[Gid, int]]:
        return [(gid, 0) for gid in self.prepared if gid.group == group]

    def one_phase_result(self, token: str) -> Outcome | None:
        return Outcome.UNKNOWN

    def classify(self, error: BaseException) -> Reason | None:
        if isinstance(error, NotebookError):
            return Reason(AbortCode.STATEMENT_FAILED, f"cannot write {error}")
        return None

    def write(self, line: str) -> None:
        """What a user calls."""
        handle: Any = current()
        with handle.use(self) as page:
            page.write(line)


class AsyncMemoryResource(MemoryResource):
    """The same for asyncio: every verb as a coroutine."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in _VERBS:
            return value
        if name == "commit_one_phase":
            return super().__getattribute__("_commit_one_phase")

        async def verb(*arguments: Any) -> Any:
            return value(*arguments)

        return verb

    async def _commit_one_phase(self, work: Page, committing: Any) -> Outcome:
        await committing("1")
        return MemoryResource.commit_one_phase(self, work, lambda _token: None)

    async def note(self, line: str) -> None:
        """What a user calls."""
        handle: Any = current()
        async with handle.use(self) as page:
            page.write(line)


_VERBS = frozenset(
    [
        "start",
        "close",
        "begin",
        "prepare",
        "commit_one_phase",
        "rollback",
        "interrupt",
        "commit_prepared",
        "rollback_prepared",
        "in_doubt",
        "one_phase_result",
    ]
)
