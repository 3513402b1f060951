"""Where spans go: to a collector that the environment names, over OTLP; by OpenTelemetry's SDK, if it does.

The variables are OpenTelemetry's own (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables),
the same for programs of all makers; docs/tracing.md says which count here.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace

import feddymem
from services.runtime.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_SECONDS = 3
"""Time for the last spans to get to the collector when a service stops."""
TELL_SECONDS = 60
"""Shortest pause between two log lines on spans that do not get there."""
_LONGEST_VALUE = 256
"""Characters of an attribute of a span; what callers have named may be longer."""

_log = get_logger()


class InvalidVariableError(ValueError):
    """An environment variable of OpenTelemetry that cannot be followed; the text says which."""


@contextmanager
def exported_traces(service: str) -> Iterator[None]:
    """Sends the spans of this process to the collector that the environment names; without one, does nothing.

    A collector that is not there holds up nobody: what does not fit into the SDK's queue is dropped.

    Args:
        service: name of the program, unless the environment has another one.

    Raises:
        InvalidVariableError: a variable is off.
    """
    if not wanted():
        yield
        return
    _require("OTEL_TRACES_EXPORTER", ("otlp",))
    _require(_first_set("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"), ("grpc",))
    logging.getLogger("opentelemetry").addHandler(_Trouble())
    logging.getLogger("opentelemetry").propagate = False
    try:
        provider, exporter = _begin(service)
    except Exception as error:  # whatever the SDK says to a value that is off
        raise InvalidVariableError(f"environment variables OTEL_*: {error}") from error
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        _flush(provider, exporter)


def wanted() -> bool:
    """Whether the environment asks for traces."""
    return (
        bool(os.environ.get(_first_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")))
        and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        and os.environ.get("OTEL_TRACES_EXPORTER") != "none"
    )


def _first_set(*names: str) -> str:
    return next((name for name in names if os.environ.get(name)), names[-1])


def _require(name: str, known: tuple[str, ...]) -> None:
    value = os.environ.get(name)
    if value and value not in known:
        raise InvalidVariableError(f"environment variable {name} is {value!r}; expected {' or '.join(known)}")


def _begin(service: str) -> tuple[TracerProvider, OTLPSpanExporter]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = {
        "service.name": f"feddymem-{service}",
        "service.version": feddymem.__version__,
        "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
    }
    provider = TracerProvider(
        resource=Resource.create(own).merge(OTELResourceDetector().detect()),
        span_limits=SpanLimits(max_span_attribute_length=_LONGEST_VALUE),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter


def _flush(provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
    """The SDK itself would wait for half a minute."""
    flushing = threading.Thread(target=provider.shutdown, daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
    if flushing.is_alive():
        _log.warning(
            "traces_lost", reason=f"the collector did not take the last spans within {FLUSH_SECONDS:g} seconds"
        )
        exporter.shutdown()  # breaks off what is under way


class _Trouble(logging.Handler):
    """What the SDK says, at most one line in `TELL_SECONDS`: it repeats itself for as long as a collector is away."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told = -float(TELL_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a record, or passes it over."""
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            _log.warning("traces_not_sent", reason=record.getMessage(), exc_info=record.exc_info)
