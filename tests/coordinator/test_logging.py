"""What a coordinator's operator reads on its standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from txrpc._coordinator import logging_setup

cygrpc: Any = import_module("grpc._cython.cygrpc")  # it has no types
library = logging.getLogger("grpc._cython.cygrpc")


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def report(error: Exception) -> None:
    """As gRPC's server does it for what its handler of a call could not do."""
    try:
        raise error
    except Exception:
        library.exception("ExecuteBatchError raised in core by servicer method [%s]", "/txrpc.v1.Coordinator/Session")


def test_a_peer_that_is_gone_before_its_answer_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    logging_setup.set_up("logfmt", "info")
    report(cygrpc.ExecuteBatchError('Failed "execute_batch": (<SendStatusFromServerOperation>,)'))
    (line,) = capsys.readouterr().err.splitlines()
    assert 'level=info event="peer gone before its answer"' in line
    assert "exception" not in line


def test_it_is_not_said_where_only_warnings_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    logging_setup.set_up("logfmt", "warning")
    report(cygrpc.ExecuteBatchError("gone"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("a bug"), cygrpc.InternalError("another")])
def test_any_other_error_keeps_its_level_and_its_traceback(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    logging_setup.set_up("json", "info")
    report(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert '"level": "error"' in line
    assert "Traceback" in line
    assert str(error) in line
