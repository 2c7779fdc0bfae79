from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import txrpc
from tests.postgres import Server
from tests.system.world import World
from txrpc.testing.processes import CoordinatorProcess

_numbers = itertools.count(1)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path) as coordinator:
        yield coordinator


@pytest.fixture
def make_world(servers: dict[str, Server], tmp_path: Path) -> Iterator[Callable[..., World]]:
    """``make_world(bank_a="participant.after_prepare=kill", options=[...])``: everything started, failpoints armed."""
    worlds: list[World] = []

    def make(
        options: list[str] | None = None,
        nodes: int = 1,
        log: str = "",
        group: int = 0,
        spare: int = 0,
        decides: str = "",
        **failpoints: str,
    ) -> World:
        number = next(_numbers)
        world = World(
            tmp_path, servers, number, options or [], nodes=nodes, log=log, group=group, spare=spare, decides=decides
        )
        worlds.append(world)
        world.start(**failpoints)
        return world

    yield make
    for world in worlds:
        world.stop()


@pytest.fixture
def connected() -> Iterator[Callable[[World], txrpc.TransactionManager]]:
    """``connected(world)``: this process as a client of that world."""
    managers: list[txrpc.TransactionManager] = []

    def connect(world: World) -> txrpc.TransactionManager:
        managers.append(txrpc.connect(world.addresses, process="test"))
        return managers[-1]

    yield connect
    for manager in managers:
        manager.close()
