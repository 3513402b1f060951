"""`feddymem inference`."""

from __future__ import annotations

import asyncio
import sys

from feddymem.backbone import resolve_device
from services.inference import metrics
from services.inference.batcher import Batcher
from services.inference.feedback import FeedbackForwarder
from services.inference.inspector import Inspector
from services.inference.open_inference import OpenInferenceServicer
from services.inference.registry import Registry
from services.inference.servicer import InspectionServicer
from services.inference.settings import InferenceSettings
from services.runtime.files import owned
from services.runtime.following import follow
from services.runtime.hardware import configure_hardware
from services.runtime.health import Readiness
from services.runtime.identity import Role
from services.runtime.logs import configure_logs
from services.runtime.metrics import show_device
from services.runtime.server import listening, run_until_stopped
from services.runtime.settings import load_settings
from services.runtime.trace_export import exported_traces

_SWITCH_SECONDS = 0.0002
"""How long a Python thread may keep the others waiting. The computing thread takes part in many short operations: with
Python's 5 ms it would wait that long for a busy event loop again and again."""

_HELD_REQUESTS = 2
"""Requests in memory together have no more bytes than so many of the largest: the next one comes while one is computed.
Each is there twice, as a message and as an image."""


def main(args: list[str]) -> None:
    """Runs the inference service until SIGTERM.

    Raises:
        InvalidSettingsError: a setting is off.
        InvalidVariableError: a variable of OpenTelemetry is off.
        OSError: an address cannot be bound, or the state folder cannot be written.
        ValueError: the state folder is in use.
    """
    settings = load_settings(InferenceSettings, args)
    configure_logs(settings.log_format)
    configure_hardware(settings.threads)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with exported_traces("inference"), owned(settings.state_dir):
        asyncio.run(_serve(settings))


async def _serve(settings: InferenceSettings) -> None:
    registry = Registry(settings)
    batcher = Batcher(settings.batch, settings.at_once, settings.max_delay_seconds, settings.room, settings.max_pixels)
    inspector = Inspector(registry, batcher)
    show_device(resolve_device(settings.device))
    metrics.QUEUE_IMAGES.set_function(lambda: batcher.queue_length)
    metrics.QUEUE_LIMIT.set(batcher.queue_size)
    services = (
        InspectionServicer(inspector, registry, FeedbackForwarder(settings)).service,
        OpenInferenceServicer(inspector, registry).service,
    )
    batcher.start()
    try:
        async with listening(
            settings,
            Role.INFERENCE,
            services,
            settings.max_request_bytes,
            settings.max_open_streams,
            settings.room,
            _HELD_REQUESTS * settings.max_request_bytes,
        ) as readiness:
            await registry.load()
            publishers = {settings.aggregator: Role.AGGREGATOR, **dict.fromkeys(settings.edge_clients, Role.SITE)}
            await run_until_stopped(
                _show(readiness, registry),
                *(
                    follow(address, settings.federations, registry.arrays, settings, role, registry.receive)
                    for address, role in publishers.items()
                ),
            )
    finally:
        batcher.stop()


async def _show(readiness: Readiness, registry: Registry) -> None:
    """Keeps readiness true: SERVING exactly while there is something to score with."""
    while True:
        await readiness.set(registry.ready)
        await registry.changes.wait()
