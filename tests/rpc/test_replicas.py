"""Several replicas of one service in one transaction (M2): the header that load balancers can hash on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import grpc
import pytest

from tests.rpc.aio_kit import AsyncWorld, abehaviour
from tests.rpc.interceptor_kit import SHAPES, Stub, World, behaviour
from tests.rpc.recorder import AsyncHandle, Handle, Recorder
from txrpc._context import bind
from txrpc._grpc.client import ClientInterceptor
from txrpc._wire.metadata import XID_KEY


def xids_of(metadata: Any) -> list[str]:
    return [value for key, value in metadata if key == XID_KEY]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_call_of_a_transaction_names_it_in_a_header(world: World, shape: str) -> None:
    seen: list[list[str]] = []

    def work(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(xids_of(context.invocation_metadata()))
        return request

    stub, root = world.dial(world.serve(Recorder(), **{shape: behaviour(shape, work)})), Handle()
    with bind(root):
        stub.call(shape)
    stub.call(shape)
    assert seen[0] == [str(root.xid)]
    assert seen[-1] == []


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_call_of_a_transaction_names_it_in_a_header_aio(aworld: AsyncWorld, shape: str) -> None:
    seen: list[list[str]] = []

    async def work(request: bytes, context: Any) -> bytes:
        seen.append(xids_of(context.invocation_metadata()))
        return request

    address = await aworld.serve(Recorder(AsyncHandle), **{shape: abehaviour(shape, work)})
    stub, root = await aworld.dial(address), AsyncHandle()
    with bind(root):
        await stub.acall(shape)
    assert seen[0] == [str(root.xid)]


def test_a_header_that_was_passed_on_is_replaced(world: World) -> None:
    seen: list[list[str]] = []

    def work(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(xids_of(context.invocation_metadata()))
        return request

    stub, root = world.dial(world.serve(Recorder(), unary_unary=work)), Handle()
    with bind(root):
        stub.unary_unary(b"x", metadata=((XID_KEY, "of another one"),))
    assert seen == [[str(root.xid)]]


# ----------------------------------------------------------------------------------------------- gRPC's own ring hash

RING = json.dumps({"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": "txrpc-xid"}}]})
KEY = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"


def play() -> None:
    """In a process of its own, because gRPC reads the variable once: print which of three replicas got each call."""
    worlds = [World() for _ in range(3)]
    tags = [str(number).encode() for number in range(3)]
    ports = [
        world.serve(Recorder(), unary_unary=lambda _r, _c, tag=tag: tag)
        for world, tag in zip(worlds, tags, strict=True)
    ]
    target = "ipv4:" + ",".join(ports)
    channel = grpc.insecure_channel(target, [("grpc.service_config", RING)])
    stub = Stub(grpc.intercept_channel(channel, ClientInterceptor()))
    for _ in range(12):
        with bind(Handle()):
            print("".join(stub.unary_unary(b"x").decode() for _ in range(6)))
    os._exit(0)


@pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 80), reason="gRPC before 1.80: no header to hash on"
)
def test_grpcs_ring_hash_sends_one_transaction_to_one_replica() -> None:
    """As docs/guide.md says."""
    command = [sys.executable, "-c", "from tests.rpc.test_replicas import play; play()"]
    result = subprocess.run(
        command, env=os.environ | {KEY: "true"}, capture_output=True, text=True, timeout=60, check=True
    )
    lines = result.stdout.split()
    assert len(lines) == 12, result.stderr
    assert all(line == line[0] * 6 for line in lines)
    assert len(set(lines)) > 1
