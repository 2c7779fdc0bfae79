"""Faults of older gRPC versions that txrpc cannot mend; docs/guide.md names them."""

from __future__ import annotations

import grpc
import pytest

__all__ = ["GRPC", "needs_grpc"]

GRPC: tuple[int, ...] = tuple(int(part) for part in grpc.__version__.split(".")[:2])


def needs_grpc(minor: int, because: str) -> pytest.MarkDecorator:
    """For a test of what gRPC itself got right in version 1.*minor*."""
    return pytest.mark.skipif((1, minor) > GRPC, reason=f"gRPC before 1.{minor}: {because}")
