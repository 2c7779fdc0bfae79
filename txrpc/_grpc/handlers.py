"""The objects in which gRPC's servers, synchronous and asyncio, hold a method: looked into, and made anew with another function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grpc

from txrpc._grpc.ports import Behaviour

__all__ = ["behaviour_of", "remembered", "replaced"]

_HANDLERS_MAX = 1_000
"""So many are kept; other interceptors may make new ones at each call."""


def behaviour_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Behaviour:
    """The user's function in a `grpc.RpcMethodHandler`."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(behaviour for behaviour in kinds if behaviour)


def replaced(handler: grpc.RpcMethodHandler[Any, Any], behaviour: Behaviour) -> grpc.RpcMethodHandler[Any, Any]:
    """*handler* with another function."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def remembered(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """*make*, whose results are kept: gRPC has one handler for a method, and asks for it at each call."""
    kept = functools.lru_cache(_HANDLERS_MAX)(make)

    def get(handler: Any) -> Any:
        try:
            return kept(handler)
        except TypeError:  # it cannot be hashed
            return make(handler)

    return get
