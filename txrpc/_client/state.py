"""What one process's side of its transactions holds, and the ports through which it blocks or awaits.

How to think of it
    `ClientState` is data.  What happens to it are functions in modules of their own: `effects` applies what the participant's
    table returns, `branches` opens and uses branches, `requests` asks the coordinator, `completion` ends transactions.  What
    must block or be awaited is the `Runtime`'s: there is one for threads, one for tasks, and one for the simulator.

Everything here is changed under `ClientState.lock`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from txrpc._client.coordinators import KnownCoordinator, Outbox
from txrpc._client.flow import Flow
from txrpc._client.starting import Starting
from txrpc._protocol.messages import Outcome, OutcomeRequest
from txrpc._protocol.participant.branch import BranchInput, Do, ParticipantBranch
from txrpc._protocol.participant.machine import Participant
from txrpc.errors import ConfigurationError
from txrpc.ids import GROUP_MAX, RESOURCE_MAX, BranchId, ParticipantId, RegisterId, Xid, check_name
from txrpc.resource import AsyncResource, Resource, Work

__all__ = ["ClientState", "Later", "LocalCommit", "ManagerStatus", "OpenBranch", "Runtime"]


@dataclass(frozen=True, slots=True)
class ManagerStatus:
    """What a manager knows without asking anyone.

    coordinator: the node that new transactions begin with, or None while there is no session.
    resources: by name, what keeps the resource from being used; "" if it is ready.
    coordinators: by address, what keeps the session with that coordinator from being open; "" if it is.
    """

    coordinator: str | None
    resources: Mapping[str, str]
    coordinators: Mapping[str, str]

    @property
    def ready(self) -> bool:
        """True if there is a session and every resource is ready."""
        return self.coordinator is not None and not any(self.resources.values())


class OpenBranch:
    """What a process holds of one branch beside its row: the work, and the lock that its users take."""

    __slots__ = ("gone", "later", "lock", "questions", "resource", "row", "work")

    def __init__(self, row: ParticipantBranch, resource: Resource | AsyncResource, lock: Any) -> None:
        self.row = row
        self.resource = resource
        self.lock = lock
        """``acquire(timeout_s)``, which blocks or is awaited, and ``release()``; re-entered by the thread or task that has it."""
        self.work: Work = None
        self.gone = False
        """The resource could not begin: a user that waited for the lock starts again."""
        self.later: Later | None = None
        """The end of the work, while the resource cannot tell yet."""
        self.questions = 0
        """How often the resource was to be asked for it."""


@dataclass(frozen=True, slots=True)
class Later:
    """An operation whose result is not known yet."""

    ask: Callable[[], Flow[tuple[BranchInput, Any] | None]]
    """Ask once; None: not yet."""
    otherwise: tuple[BranchInput, Any]
    """The result if the last question brings none."""


@dataclass(slots=True)
class LocalCommit:
    """A commit of one branch of the root's own process, whose end the root has not learnt."""

    resource: Resource | AsyncResource
    branch: BranchId
    token: str = ""
    """Which transaction of the database it is, as soon as that is known."""
    result: Outcome | None = None
    """None until its operation has ended."""


class Runtime(Protocol):
    """What blocks or is awaited.

    `operate` and `wake` return at once; `operate_here`, `wait`, `pause` and `reconnect` are called by flows.
    """

    def operate(self, do: Do, branch: OpenBranch | None) -> None:
        """Carry out an operation on a resource in the background, and call `effects.operated` with its result."""

    def operate_here(self, do: Do, branch: OpenBranch | None) -> Any:
        """Carry out a commit in one phase or a PREPARE, in the caller's own thread if that is possible."""

    def aside(
        self, name: str, verb: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[Any], None]
    ) -> None:
        """Call a verb of resource *name* in the background, and then *then* with what it returned or raised."""

    def wake(self) -> None:
        """Notice that `ClientCore.next_wakeup_ms` may have moved forward."""

    def future(self) -> Any:
        """Return a new future, of the kind that `wait` takes."""

    def settle(self, future: Any, result: object) -> None:
        """Set the result or the exception of a future; its waiter may have given up."""

    def branch_lock(self) -> Any:
        """Return a new lock for `OpenBranch.lock`."""

    def ask(self, resource: Any, token: str) -> Any:
        """Ask *resource* in the background how the transaction *token* of its database ended; return a future of the answer."""

    def wait(self, future: Any, timeout_s: float) -> Any:
        """Return the result of *future*; raises `TimeoutError`."""

    def pause(self, seconds: float) -> Any:
        """Sleep."""

    def sessions_changed(self) -> None:
        """Let those who wait in `reconnect` look again: a session has begun, or there will be none."""

    def reconnect(self, node: str, timeout_s: float) -> Any:
        """Return the owner of the live session with coordinator *node* ("": any); wait for one if there is none.

        Raises `CoordinatorUnavailable`, also at once when there will be none; `ConfigurationError` if it was refused for good.
        """


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True, eq=False)
class ClientState:
    """See the module's docstring."""

    group: str
    process: str
    """How this process is called in the coordinator's status, for people."""
    resources: Mapping[str, Any]
    participant_id: ParticipantId
    runtime: Runtime
    participant: Participant
    starting: Starting
    now_ms: Callable[[], int]
    """Monotonic time."""
    unix_ms: Callable[[], int]
    """The machine's clock, in milliseconds since 1970: for people, no rule depends on it."""
    entropy: Callable[[int], bytes]
    """As many random bytes: what identifiers are made of."""
    jitter: Callable[[], float]
    """From 0 to 1: what spreads questions and repetitions."""
    pid: int = field(default_factory=os.getpid)
    lock: threading.RLock = field(default_factory=threading.RLock)
    start_patience_s: float = 10.0
    """For how long a start waits for the databases; those that have not answered by then are started in the background."""
    commit_timeout_ms: int = 10_000
    """For how long `commit` waits for its answer after the transaction's deadline."""
    decide_in: str = ""
    """The resource that decides transactions that do not say which; "": the coordinator."""
    serves: bool = False
    """Whether calls join transactions through this client: then its resources are not used outside of them (rule 19)."""

    sessions: tuple[Outbox, ...] = ()
    """One for each coordinator's address, in the order of preference."""
    coordinators: dict[str, KnownCoordinator] = field(default_factory=dict)
    """By node, all that this process has ever had a session with."""
    homes: dict[Outbox, str] = field(default_factory=dict)
    """Which node each session's address is, as far as it has ever said."""
    greeted: dict[tuple[Outbox, str], int] = field(default_factory=dict)
    """Which version of the resources the last Hello on a session told which node; "": the one that is there."""
    chosen: KnownCoordinator | None = None
    """The one that new transactions begin with; None while there is no session."""
    asker: str = ""
    """The coordinator whose message about a branch is being handled."""
    start_at: dict[str, int] = field(default_factory=dict)
    sweep_at: dict[str, int] = field(default_factory=dict)
    ask_at: dict[BranchId, tuple[int, Do]] = field(default_factory=dict)
    """When to ask for the end of the branches whose connection broke at it (`OpenBranch.later`)."""

    branches: dict[BranchId, OpenBranch] = field(default_factory=dict)
    requests: dict[tuple[str, Xid], list[Any]] = field(default_factory=dict)
    """Futures of the roots that have asked a coordinator, by its node, about a transaction."""
    registers: dict[str, RegisterId] = field(default_factory=dict)
    """Of all resources that decide, by their names, as coordinators have told."""
    polling: set[Xid] = field(default_factory=set)
    """The transactions whose root waits for its branches' votes, which it has asked a coordinator for."""
    committing: set[Xid] = field(default_factory=set)
    """The transactions of this process whose root waits for the coordinator, or is about to."""
    local_ends: dict[BranchId, Any] = field(default_factory=dict)
    """Futures of the roots that end a branch of this process themselves."""
    early_votes: dict[BranchId, Any] = field(default_factory=dict)
    """Futures of the final calls that wait for the vote of a branch of this process."""
    unknown: dict[Xid, tuple[str, OutcomeRequest]] = field(default_factory=dict)
    """What to ask about transactions whose outcome is not known, and which coordinator."""
    tokens: dict[Xid, str] = field(default_factory=dict)
    """How the ends can be learnt of those commits in one phase whose process was lost."""
    local_commits: dict[Xid, LocalCommit] = field(default_factory=dict)
    ordered_by: dict[BranchId, dict[str, None]] = field(default_factory=dict)
    """The coordinators that have told a branch to commit whose decision is in a register: each may, and all wait for the answer."""
    to_mark: dict[str, list[Xid]] = field(default_factory=dict)
    """Decisions to be marked as done in the register of each resource."""
    mark_at: dict[str, int] = field(default_factory=dict)
    """When; each has an entry in both, or in neither."""

    @classmethod
    def make(
        cls,
        group: str,
        resources: Iterable[Any],
        process: str,
        runtime: Runtime,
        *,
        now_ms: Callable[[], int] = _now_ms,
        unix_ms: Callable[[], int] = _unix_ms,
        entropy: Callable[[int], bytes] = os.urandom,
        jitter: Callable[[], float] = random.random,
    ) -> ClientState:
        """Build the state of a new client; raises `InvalidName`, or `ConfigurationError` for two resources of one name."""
        named: dict[str, Any] = {}
        for resource in resources:
            check_name("resource", resource.name, RESOURCE_MAX)
            if resource.name in named:
                raise ConfigurationError(f"two resources are named {resource.name!r}: each needs a name of its own")
            named[resource.name] = resource
        state = cls(
            group=check_name("group", group, GROUP_MAX),
            process=process or f"pid {os.getpid()}",
            resources=named,
            participant_id=ParticipantId(entropy(8)),
            runtime=runtime,
            participant=Participant(jitter),
            starting=Starting(named),
            now_ms=now_ms,
            unix_ms=unix_ms,
            entropy=entropy,
            jitter=jitter,
        )
        for resource in named.values():
            if hasattr(resource, "user"):
                resource.user = state
        return state
