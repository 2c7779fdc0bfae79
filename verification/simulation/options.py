"""What a simulated run is made of: the size of the cluster, its work, and every fault as one field."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["CALM", "NODE", "Options"]

NODE = "c1"
"""The first coordinator; where there are several, the others are c2 and c3."""


@dataclass(frozen=True, slots=True)
class Options:
    """One run.  Probabilities are from 0 to 1, times in simulated milliseconds; counts say how often within `trouble_ms`."""

    # The cluster and its work.
    nodes: int = 1
    """Coordinators, which share one log."""
    clients: int = 2
    services: int = 2
    databases: int = 2
    transactions: int = 3
    """Of each client, one after another."""
    calls: int = 3
    """At most so many calls in a transaction."""
    read_only: float = 0.15
    """How likely a call only reads."""
    gives_up: float = 0.1
    """How likely a root rolls back instead of committing."""
    refuses: float = 0.05
    """How likely a database refuses a PREPARE or a commit in one phase."""
    nested: float = 0.2
    """How likely a call leads to another one, to the next service."""
    own_resource: float = 0.15
    """How likely a root works in a database of its own process as well."""
    final_calls: float = 0.0
    """How likely a caller says, truly or not, that the transaction calls a service no more."""
    decides: float = 0.0
    """How likely a root lets a database of its own process decide."""

    # The network.
    delay_ms: int = 20
    """The longest usual way of a message."""
    stray: float = 0.0
    """How likely a message takes up to a hundred times as long: late calls, late votes."""
    loss: float = 0.0
    """Of a message.  A stream that has lost one breaks, sooner or later."""
    duplication: float = 0.0
    """Of a message: the call runs twice, the vote comes twice."""
    reordering: float = 0.0
    """How likely a message of a stream overtakes others."""
    partitions: int = 0
    """Pairs of nodes that cannot reach each other for a while."""
    one_way: int = 0
    """Pairs of which only one cannot reach the other."""

    # The machines.
    crashes: int = 0
    """Of services and clients, with a restart some time later."""
    client_deaths: int = 0
    """Clients that die for good."""
    coordinator_crashes: int = 0
    coordinator_deaths: int = 0
    """Coordinators that die for good, if there are others: these must finish what the dead ones have left."""
    takeovers: int = 0
    """A second process of a coordinator is started while the first is frozen; it wakes up later (rule 7)."""
    usurpations: int = 0
    """A coordinator takes over another one that is in the best of health."""
    database_crashes: int = 0
    freezes: int = 0
    """Nodes that stand still for a while and then go on as if nothing had been."""
    slow: float = 0.0
    """How likely a node takes ten times as long for everything."""
    clock_jumps: int = 0
    """Of the machines' wall clocks, forward and back: a process's by up to a day, the coordinator's by less than its retention."""

    drifts: int = 0
    """Machines whose monotonic clock goes too fast or too slow for a while, by up to a fifth."""
    sleeps: int = 0
    """Machines that stand still together with their monotonic clock, for up to two minutes (CLOCK_MONOTONIC under suspend)."""

    # The disks.
    log_errors: float = 0.0
    """How likely the log fails: sometimes nothing was written, sometimes nobody can know."""
    lost_writes: float = 0.0
    """How likely a crash takes writes with it that were not forced."""
    torn_writes: float = 0.0
    """How likely a crash leaves a part of the batch that was being written."""
    log_keeps: int = 1_000
    """Finished decisions that the log has room for."""
    log_restores: int = 0
    """The log comes back as it was some seconds before, in the same epoch (rule 18)."""
    hands: int = 0
    """Operators who end a prepared branch by hand, as they think right."""
    amnesia: int = 0
    """Databases that fail over to a standby that has not received what is prepared (rule 16)."""
    refuses_finish: float = 0.0
    """How likely a database refuses COMMIT PREPARED and ROLLBACK PREPARED, though it holds the branch (rule 20)."""
    cut_prepares: float = 0.0
    """How likely the connection breaks under a PREPARE, which the database carries out later all the same."""
    patience_s: int = 10
    """How long a resource asks how a commit ended whose connection broke; a database may be away for longer."""
    late_requests: int = 0
    """Requests of roots that come a second time, from beyond every horizon: a client that asks after its transaction much later."""
    misnames: int = 0
    """Processes that are started with another database under a resource's name, for a while (rule 17)."""
    forgeries: int = 0
    """Messages of a session that lies about other processes' branches."""

    # The group, if the coordinators' log is on the disks of one.
    group: bool = False
    """The log is on the disks of three members, of which the first ones run the coordinators."""
    member_cuts: float = 0.0
    """How likely one member cannot reach another one at a moment, or no other."""
    disk_losses: int = 0
    """Members whose disk is an empty one from some moment on."""
    view_changes: int = 0
    """Members that come or go."""

    trouble_ms: int = 12_000
    """For how long things go wrong.  Then everything is repaired, and must come to rest."""

    @classmethod
    def of(cls, seed: int) -> Options:
        """A world for *seed*: some of the faults, each as hard as the dice say.

        With all faults at once hardly anything would ever get far; leaving many of them out at random finds more (swarm
        testing, Groce et al. 2012).
        """
        dice = random.Random(f"options {seed}")
        chosen: dict[str, Any] = {
            "clients": dice.choice((1, 2, 2, 3)),
            "services": dice.choice((1, 2, 2, 3)),
            "databases": dice.choice((1, 2, 2, 3)),
            "transactions": dice.choice((1, 2, 3)),
            "calls": dice.choice((1, 2, 3, 4)),
            "delay_ms": dice.choice((5, 20, 100, 600)),
        }
        used = dice.choice((0.05, 0.2, 0.4, 0.6))
        for name, most in _HARDEST.items():
            if dice.random() < used:
                chosen[name] = dice.randint(1, most) if isinstance(most, int) else dice.random() * most
        chosen["patience_s"] = dice.choice((10, 10, 1))
        chosen["final_calls"] = random.Random(f"final {seed}").choice((0.0, 0.0, 0.0, 0.3, 1.0))
        # Of a branch that voted before all that its log remembers, no one can say that it was not decided: an operator must look.
        # A log that was restored has an older clock, by which a branch may seem to have.
        may_seem_old = chosen["final_calls"] or "log_restores" in chosen
        keeps = (1_000,) if may_seem_old else (1_000, 1_000, 1_000, 5, 0)
        chosen["log_keeps"] = random.Random(f"log {seed}").choice(keeps)
        chosen["decides"] = random.Random(f"decides {seed}").choice((0.0, 0.0, 0.0, 0.5, 1.0))
        if "log_restores" in chosen:
            # What nobody alive has heard of cannot be missed.
            for name in ("crashes", "client_deaths"):
                chosen.pop(name, None)
        else:
            chosen |= cls._several(random.Random(f"nodes {seed}"))
            if chosen["log_keeps"] == 1_000:
                chosen |= cls._group(random.Random(f"in a group {seed}"))
        return cls(**chosen)

    @staticmethod
    def _several(dice: random.Random) -> dict[str, int]:
        nodes = dice.choice((1, 1, 2, 3))
        if nodes == 1:
            return {}
        deaths = dice.randint(1, nodes - 1) if dice.random() < 0.3 else 0
        return {"nodes": nodes, "coordinator_deaths": deaths, "usurpations": dice.choice((0, 0, 1, 3))}

    @staticmethod
    def _group(dice: random.Random) -> dict[str, Any]:
        if dice.random() < 0.75:
            return {}
        cuts = dice.choice((0.0, 0.1, 0.3, 0.5))
        return {
            "group": True,
            "member_cuts": cuts,
            "disk_losses": dice.choice((0, 0, 1, 3)),
            "view_changes": dice.choice((0, 0, 2, 6)),
        }

    def without(self, *names: str) -> Options:
        """The same world without these faults."""
        plain: dict[str, Any] = {name: getattr(CALM, name) for name in names}
        return replace(self, **plain)


_HARDEST: dict[str, int | float] = {
    "refuses": 0.3,
    "gives_up": 0.4,
    "read_only": 0.8,
    "stray": 0.2,
    "loss": 0.1,
    "duplication": 0.2,
    "reordering": 0.3,
    "partitions": 3,
    "one_way": 3,
    "crashes": 4,
    "client_deaths": 1,
    "coordinator_crashes": 3,
    "takeovers": 2,
    "database_crashes": 3,
    "freezes": 3,
    "slow": 0.5,
    "clock_jumps": 3,
    "log_errors": 0.3,
    "lost_writes": 1.0,
    "torn_writes": 1.0,
    "log_restores": 2,
    "cut_prepares": 0.2,
    "forgeries": 20,
    "late_requests": 20,
    "misnames": 2,
    "hands": 3,
    "amnesia": 2,
    "refuses_finish": 0.5,
    "drifts": 4,
    "sleeps": 2,
}

CALM = Options()
"""No faults at all."""
