"""Whole clusters of the real protocol in one thread, from one seed, with every fault that one can think of.

After FoundationDB's simulation and TigerBeetle's VOPR: time, chance, network, disks and machines are simulated; the coordinator,
the participants, the managers' core and the flows in which roots end their transactions are the ones that run in production.
Checkers from outside, one for each rule of the design, watch what databases, disks, messages and applications show.
"""

from __future__ import annotations

from verification.simulation.cluster import Run, simulate
from verification.simulation.options import Options

__all__ = ["Options", "Run", "simulate"]
