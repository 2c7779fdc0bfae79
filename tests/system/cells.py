"""Every failpoint and what must be under way for somebody to come to it: the rows of `test_every_failpoint`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from txrpc._failpoints import POINTS

BANKS = ("bank-a", "bank-b")

_TAKEOVER = {"coordinator.takeover"}
REGISTER = {
    "coordinator.votes",
    "coordinator.decide",
    "coordinator.register_question",
    "coordinator.registers",
    "coordinator.decision_done",
    "participant.decided",
    "participant.decide",
    "participant.insert_decision",
    "participant.register_answer",
}
HERE = frozenset(point for point in POINTS if re.sub(r"\.(before|after)_", ".", point) not in _TAKEOVER | REGISTER)
"""The points of this matrix.  The others need a second coordinator (`test_takeover`), or a register (`test_last_resource`,
`test_decided_elsewhere`)."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What goes on around a point."""

    name: str
    before: tuple[tuple[str, str], ...] = ()
    """Points that crash first: (process, point); {victim} is the process of the cell."""
    fails: str = ""
    """A point of the process of the cell that raises first."""
    armed_when: str = "runs"
    """"runs", or "starts": the process is armed while it is down, and started again with the point."""


TRANSFER = Scenario("transfer")
GIVE_UP = Scenario("give up")
FINAL = Scenario("final calls")
STRAY = Scenario("ends with a call in flight")
REFUSED = Scenario("refused elsewhere")
ONE = Scenario("one branch")
CONNECT = Scenario("a client connects")
SHUTDOWN = Scenario("the coordinator shuts down")
RESTART = Scenario("transfer", armed_when="starts")
LOST_ANSWER = Scenario("transfer", before=(("c1", "coordinator.before_outcome_reply"),))
LOST_VOTE = Scenario("transfer", before=(("{victim}", "participant.after_prepare"),), armed_when="starts")
LOST_ONE = Scenario(
    "one slow branch", before=(("{victim}", "participant.after_commit_one_phase"),), armed_when="starts"
)
CANNOT_COMMIT = Scenario("transfer", fails="participant.before_commit_prepared")
LOST_ONE_THERE = Scenario("one slow branch", before=(("bank-a", "participant.after_commit_one_phase"),))

SCENARIOS = {
    "coordinator": {
        "welcome": CONNECT,
        "tick": TRANSFER,
        "prepare": TRANSFER,
        "commit_one_phase": ONE,
        "commit": TRANSFER,
        "rollback": GIVE_UP,
        "abandon": STRAY,
        "resolve": LOST_ONE_THERE,
        "one_phase_token": LOST_ONE_THERE,
        "outcome_reply": TRANSFER,
        "go_away": SHUTDOWN,
        "open": RESTART,
        "record": TRANSFER,
        "done": TRANSFER,
    },
    "participant": {
        "hello": RESTART,
        "voted": TRANSFER,
        "committing": ONE,
        "one_phase_done": ONE,
        "acked": TRANSFER,
        "inquiry": LOST_VOTE,
        "resolved": LOST_ONE,
        "trouble": CANNOT_COMMIT,
        "reply": TRANSFER,
        "prepare": TRANSFER,
        "commit_one_phase": ONE,
        "rollback": GIVE_UP,
        "commit_prepared": TRANSFER,
        "rollback_prepared": REFUSED,
        "one_phase_result": LOST_ONE,
    },
    "client": {
        "call": TRANSFER,
        "commit_request": TRANSFER,
        "rollback_request": GIVE_UP,
        "outcome_request": LOST_ANSWER,
    },
}
PROCESSES = {"coordinator": ("c1",), "participant": BANKS, "client": ("client",)}


@dataclass(frozen=True, slots=True)
class Cell:
    """One process comes to one point and does *action* there."""

    process: str
    point: str
    action: str
    given: Scenario | None = None
    """What goes on, if it is not what goes on around that point otherwise."""

    @property
    def scenario(self) -> Scenario:
        """What goes on."""
        if self.given is not None:
            return self.given
        role, _, step = self.point.partition(".")
        return SCENARIOS[role][step.partition("_")[2]]

    def __str__(self) -> str:
        name = f"{self.process}-{self.point.partition('.')[2]}-{self.action.partition(':')[0]}"
        return f"{name}-{self.given.name.replace(' ', '_')}" if self.given is not None else name


def cells(actions: tuple[str, ...], processes: tuple[str, ...]) -> list[Cell]:
    """Every point of those processes with each of *actions*."""
    return [
        Cell(process, point, action)
        for action in actions
        for point in sorted(HERE)
        for process in PROCESSES[point.partition(".")[0]]
        if process in processes
    ]


DELAYS = (
    ("c1", "coordinator.before_record"),
    ("c1", "coordinator.before_commit"),
    ("c1", "coordinator.before_outcome_reply"),
    ("bank-a", "participant.before_prepare"),
    ("bank-a", "participant.after_prepare"),
    ("bank-a", "participant.before_commit_prepared"),
    ("bank-a", "participant.before_reply"),
    ("client", "client.before_commit_request"),
)
"""A frozen process (stop) is a slow one as well; these are enough to see that one that is only slow is not different."""
ALL_DAY = {
    ("bank-a", "participant.after_prepare"),
    ("bank-a", "participant.after_commit_prepared"),
    ("bank-b", "participant.before_acked"),
    ("c1", "coordinator.after_record"),
    ("c1", "coordinator.before_done"),
    ("client", "client.after_commit_request"),
}
"""Where `make test` kills; the rest of the matrix is for `make deep`."""
EARLY = (
    ("bank-a", "participant.before_prepare"),
    ("bank-a", "participant.after_prepare"),
    ("bank-b", "participant.before_reply"),
    ("bank-b", "participant.after_reply"),
    ("bank-b", "participant.after_commit_prepared"),
    ("c1", "coordinator.before_record"),
    ("c1", "coordinator.after_record"),
    ("c1", "coordinator.before_commit"),
    ("client", "client.after_call"),
    ("client", "client.before_commit_request"),
    ("client", "client.after_commit_request"),
)
"""Where a transaction of final calls can stand that no other one can, and what comes after."""
CELLS = [
    *cells(("kill",), ("c1", *BANKS, "client")),
    *cells(("stop", "error"), ("c1", "bank-a")),
    *cells(("error",), ("client",)),
    *[Cell(process, point, "sleep:1") for process, point in DELAYS],
    *[Cell(process, point, "kill", FINAL) for process, point in EARLY],
    *[Cell(process, point, "stop", FINAL) for process, point in EARLY if process in BANKS],
]
