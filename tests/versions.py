"""Faults of older versions of gRPC and asyncpg that txrpc cannot mend; docs/guide.md names them."""

from __future__ import annotations

import importlib.metadata

import grpc
import pytest

__all__ = ["GRPC", "asyncpg_is_before", "needs_grpc"]

GRPC: tuple[int, ...] = tuple(int(part) for part in grpc.__version__.split(".")[:2])


def asyncpg_is_before(minor: int) -> bool:
    """Whether asyncpg is older than version 0.*minor*."""
    return int(importlib.metadata.version("asyncpg").split(".")[1]) < minor


def needs_grpc(minor: int, because: str) -> pytest.MarkDecorator:
    """For a test of what gRPC itself got right in version 1.*minor*."""
    return pytest.mark.skipif((1, minor) > GRPC, reason=f"gRPC before 1.{minor}: {because}")
