"""Beside the interceptors of others: OpenTelemetry's and py-grpc-prometheus', the real ones, on both sides of ours (B6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation import grpc as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from py_grpc_prometheus.prometheus_client_interceptor import PromClientInterceptor
from py_grpc_prometheus.prometheus_server_interceptor import PromServerInterceptor

import txrpc
from txrpc._context import bind
from txrpc.errors import AbortCode

from .aio_kit import AsyncWorld
from .interceptor_kit import SHAPES, Stub, World, answer_of, behaviour, echo_using
from .recorder import AsyncHandle, Handle, Recorder

WORK = {shape: behaviour(shape, echo_using("shop")) for shape in SHAPES}


SPANS = InMemorySpanExporter()


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """The synchronous instrumentation takes the provider of the whole process, which can be set only once."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SPANS))
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture
def instrumented(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    """Every channel and server that is made from now on is traced, in both colours, as OpenTelemetry's manual says."""
    kinds: list[Any] = [
        otel.GrpcInstrumentorClient,
        otel.GrpcInstrumentorServer,
        otel.GrpcAioInstrumentorClient,
        otel.GrpcAioInstrumentorServer,
    ]
    all_of_them = [kind() for kind in kinds]
    SPANS.clear()
    for each in all_of_them:
        each.instrument(tracer_provider=provider)
    yield SPANS
    for each in all_of_them:
        each.uninstrument()


def traced(spans: InMemorySpanExporter) -> list[str]:
    """The methods whose calls have been traced at the client."""
    return [span.name for span in spans.get_finished_spans() if span.kind is trace.SpanKind.CLIENT]


def joined(channel: Any, shape: str) -> Handle:
    """Make one call in a transaction that writes in the shop; all of its replies must come home."""
    handle = Handle()
    with bind(handle):
        assert Stub(channel).call(shape) == answer_of(shape, b"ab")
    handle.settle()
    assert (handle.call.end, handle.call.branches) == ("replied", {"shop"})
    return handle


@pytest.mark.parametrize("shape", SHAPES)
def test_opentelemetry_next_to_the_network(world: World, instrumented: InMemorySpanExporter, shape: str) -> None:
    address = world.serve(Recorder(), **WORK)
    with grpc.insecure_channel(address) as channel:
        joined(txrpc.intercept_channel(channel), shape)
        assert traced(instrumented) == [f"/t.T/{shape}"], "the call is traced all the same"
        assert Stub(channel).call(shape) == answer_of(shape, b"ab"), "the channel itself is what it was"


@pytest.mark.usefixtures("instrumented")
def test_above_opentelemetry_a_response_stream_says_what_to_do(world: World) -> None:
    address, handle = world.serve(Recorder(), **WORK), Handle()
    with grpc.insecure_channel(address) as channel, bind(handle):
        stub = Stub(grpc.intercept_channel(channel, *txrpc.client_interceptors()))
        assert stub.call("unary_stream") == b"first ab"
    assert handle.call.end == "lost"
    reason = handle.call.failure
    assert reason is not None
    assert reason.code is AbortCode.NOT_JOINED
    assert not reason.retryable
    assert "txrpc.intercept_channel(channel)" in reason.text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", ["below", "above", "one call to intercept_channel"])
def test_prometheus(world: World, given: str, shape: str) -> None:
    registry = CollectorRegistry()
    prometheus = PromClientInterceptor(registry=registry)
    served = PromServerInterceptor(registry=CollectorRegistry())
    address = world.serve(Recorder(), before=[served], **WORK)
    with grpc.insecure_channel(address) as channel:
        if given == "below":
            ours = txrpc.intercept_channel(grpc.intercept_channel(channel, prometheus))
        elif given == "above":
            ours = grpc.intercept_channel(txrpc.intercept_channel(channel), prometheus)
        else:
            ours = grpc.intercept_channel(channel, prometheus, *txrpc.client_interceptors())
        joined(ours, shape)
    counted = {
        sample.labels["grpc_method"] for metric in registry.collect() for sample in metric.samples if sample.value > 0
    }
    assert counted == {shape}


def test_what_is_outside_goes_below_as_well(world: World) -> None:
    address, handle = world.serve(None, **WORK), Handle()
    prometheus = PromClientInterceptor(registry=CollectorRegistry())
    with grpc.insecure_channel(address) as channel, bind(handle):
        wrapped = grpc.intercept_channel(channel, prometheus)
        stub = Stub(txrpc.intercept_channel(wrapped, outside=["/t.T/unary_unary"]))
        assert stub.call("unary_unary") == b"ab"
    assert handle.calls == []


@pytest.mark.parametrize("shape", SHAPES)
async def test_opentelemetry_in_asyncio(aworld: AsyncWorld, instrumented: InMemorySpanExporter, shape: str) -> None:
    address = await aworld.serve(Recorder(AsyncHandle), **WORK)
    stub, handle = await aworld.dial(address), AsyncHandle()
    with bind(handle):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
    await handle.asettle()
    assert (handle.call.end, handle.call.branches) == ("replied", {"shop"})
    assert traced(instrumented) == [f"/t.T/{shape}"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_opentelemetry_by_hand_in_asyncio(aworld: AsyncWorld, shape: str) -> None:
    address = await aworld.serve(Recorder(AsyncHandle), **WORK)
    interceptors: Any = otel.aio_client_interceptors  # which has no types
    stub, handle = await aworld.dial(address, before=interceptors()), AsyncHandle()
    with bind(handle):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
    await handle.asettle()
    assert (handle.call.end, handle.call.branches) == ("replied", {"shop"})
