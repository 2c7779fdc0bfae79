"""A small real network: every node a network namespace of its own, all on one bridge, and any way between two of them can be cut.

A way is cut by giving the sender a wrong hardware address for the receiver: packets leave and arrive nowhere, as with a broken
switch, and neither side is told.  Needs root, and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

__all__ = ["Net", "Node", "why_not"]

_NOBODY = "02:00:00:00:00:99"


def why_not() -> str:
    """Why there can be no such network here, or ""."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2 for network namespaces"
    name = f"txrpc{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False, timeout=20)
    if made.returncode:
        return f"needs root that may make network namespaces: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False, timeout=20)
    return ""


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} exits with {done.returncode}: {done.stderr.strip()}")


class Node:
    """One machine of the network."""

    def __init__(self, net: Net, name: str, number: int) -> None:
        self.net, self.name = net, name
        self.address = f"10.213.{net.number}.{number}"
        self.namespace = f"txrpc{os.getpid()}{name}"
        self.launch = ["ip", "netns", "exec", self.namespace]
        """Before a command: run it here."""
        self.outside, inside = f"tx{net.number}o{number}", f"tx{net.number}i{number}"
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "add", self.outside, "type", "veth", "peer", "name", inside)
        _run("ip", "link", "set", inside, "netns", self.namespace)
        _run("ip", "link", "set", self.outside, "master", net.bridge, "up")
        self.inside("ip", "link", "set", inside, "name", "eth0", "up")
        self.inside("ip", "link", "set", "lo", "up")
        self.inside("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.device = "eth0"

    def inside(self, *command: str, check: bool = True) -> None:
        """Run *command* here."""
        _run(*self.launch, *command, check=check)


class _Host(Node):
    """The machine that the test runs on, as one of them."""

    def __init__(self, net: Net, number: int) -> None:
        self.net, self.name, self.launch, self.device = net, "client", [], net.bridge
        self.address = f"10.213.{net.number}.{number}"
        _run("ip", "address", "add", f"{self.address}/24", "dev", net.bridge)


class Net:
    """See the module's docstring.  A context manager: all is undone at its end."""

    def __init__(self) -> None:
        self.number = os.getpid() % 250 + 1
        self.bridge = f"txbr{self.number}"
        self.nodes: list[Node] = []
        self._cuts: list[tuple[Node, Node]] = []
        self._slow: list[Node] = []

    def __enter__(self) -> Self:
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "link", "set", self.bridge, "up")
        self.client = _Host(self, 1)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            # First the link: with its namespace it goes some time later, and the next network would find its name taken.
            _run("ip", "link", "delete", node.outside, check=False)
            _run("ip", "netns", "delete", node.namespace, check=False)
        _run("ip", "link", "delete", self.bridge, check=False)

    def add(self, name: str) -> Node:
        """A new machine."""
        self.nodes.append(Node(self, name, len(self.nodes) + 2))
        return self.nodes[-1]

    def cut(self, source: Node, target: Node) -> None:
        """What *source* sends does not arrive at *target* any more."""
        source.inside(
            "ip", "neighbour", "replace", target.address, "lladdr", _NOBODY, "dev", source.device, "nud", "permanent"
        )
        self._cuts.append((source, target))

    def part(self, one: Node, other: Node) -> None:
        """Cut both ways."""
        self.cut(one, other)
        self.cut(other, one)

    def slow(self, node: Node, rate: str = "40kbit") -> None:
        """What *node* sends goes out at *rate*."""
        limits = ("rate", rate, "burst", "2kb", "latency", "2s")
        node.inside("tc", "qdisc", "replace", "dev", node.device, "root", "tbf", *limits)
        self._slow.append(node)

    def heal(self) -> None:
        """All ways are open, at full speed."""
        for source, target in self._cuts:
            source.inside("ip", "neighbour", "delete", target.address, "dev", source.device, check=False)
        for node in self._slow:
            node.inside("tc", "qdisc", "delete", "dev", node.device, "root", check=False)
        self._cuts, self._slow = [], []
