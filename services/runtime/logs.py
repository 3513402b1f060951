"""Logs: one line an event, for people on a terminal and as JSON elsewhere.

A line that belongs to an RPC has its `request_id` and `method`; one in a trace its `trace_id` and `span_id`.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from opentelemetry import trace


def configure_logs(form: Literal["auto", "console", "json"]) -> None:
    """Sends all log lines to standard error, those of libraries from warnings on."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(handlers=[_OfLibraries()], level=logging.WARNING, force=True)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The logger of a module."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


class _OfLibraries(logging.Handler):
    """Makes lines like ours of what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a record."""
        get_logger().log(
            record.levelno, "library", logger=record.name, text=record.getMessage(), exc_info=record.exc_info
        )


def _add_trace(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event
