"""Structured logs: standard library records, rendered by structlog as key=value or JSON, one line each, on standard error."""

from __future__ import annotations

import logging
import sys

import structlog

__all__ = ["set_up"]


def set_up(log_format: str, level: str) -> None:
    """Send everything of level *level* and above to standard error in *log_format* (``logfmt`` or ``json``)."""
    if log_format == "json":
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(default=str)
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _keys, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_peer_gone)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _peer_gone(record: logging.LogRecord) -> bool:
    """Say in one line of level info what gRPC reports with a traceback, as an error: that a peer was gone before its answer.

    gRPC ignores it where it has heard of the cancellation first; the two come in either order (grpc/grpc#32551), and an
    operator can do nothing about either.
    """
    kind = record.exc_info[0] if record.exc_info else None
    if kind is not None and kind.__module__ == "grpc._cython.cygrpc" and kind.__name__ == "ExecuteBatchError":
        record.msg, record.args, record.exc_info = "peer gone before its answer", (), None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return logging.getLogger().isEnabledFor(logging.INFO)
    return True


def _keys(_logger: object, _name: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Logfmt refuses keys with spaces; ours have none, a library's might."""
    return {key.replace(" ", "_"): value for key, value in fields.items()}
