"""`feddymem edge`."""

from __future__ import annotations

import asyncio

from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.datasets import list_images
from services.edge_client.arrivals import Arrivals
from services.edge_client.computing import Computing
from services.edge_client.feedback import FeedbackStore
from services.edge_client.feedback_servicer import FeedbackServicer
from services.edge_client.images import SiteImages
from services.edge_client.participant import Participant
from services.edge_client.round_work import RoundWork
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.runtime.files import owned
from services.runtime.hardware import configure_hardware
from services.runtime.health import Readiness
from services.runtime.identity import Identity, Role
from services.runtime.logs import configure_logs
from services.runtime.metrics import show_device
from services.runtime.progress import shown_progress
from services.runtime.publisher import Publisher
from services.runtime.server import listening, run_until_stopped
from services.runtime.settings import InvalidSettingsError, load_settings
from services.runtime.trace_export import exported_traces


def main(args: list[str]) -> None:
    """Runs the edge client until SIGTERM, or with --once until the federation is done.

    Raises:
        InvalidSettingsError: a setting is off.
        InvalidVariableError: a variable of OpenTelemetry is off.
        DatasetError: no folder, no image in it, or none that can be read.
        ParticipationError: the aggregator refuses this site.
        OSError: an address cannot be bound, or the state folder cannot be written.
        ValueError: the state folder is in use.
    """
    settings = load_settings(EdgeClientSettings, args)
    configure_logs(settings.log_format)
    configure_hardware(settings.threads)
    list_images(settings.data)  # fail before anything listens
    device = resolve_device(settings.device)
    show_device(device)
    with exported_traces("edge-client"), owned(settings.state_dir):
        asyncio.run(_serve(settings, device))


async def _serve(settings: EdgeClientSettings, device: str) -> None:
    own = Identity(Role.INFERENCE, settings.site)
    with shown_progress() as progress:
        computing = Computing(settings, progress)
        state = await computing.run(EdgeState, settings.state_dir)
        publisher = Publisher(state.arrays, frozenset({Role.INFERENCE}), lambda who, _federation: who == own)
        feedback = FeedbackServicer(settings)
        services = [publisher.service, feedback.service]
        own_site = Identity(Role.SITE, settings.site)
        async with listening(settings, own_site, services, settings.max_request_bytes) as readiness:
            work = _take_part(settings, device, state, publisher, feedback, readiness, computing)
            await run_until_stopped(work, until_done=settings.once)


async def _take_part(
    settings: EdgeClientSettings,
    device: str,
    state: EdgeState,
    publisher: Publisher,
    feedback: FeedbackServicer,
    readiness: Readiness,
    computing: Computing,
) -> None:
    extractor = await asyncio.to_thread(_load_extractor, settings, device)
    fingerprint = extractor.feature_space.fingerprint
    owner = f"federation {settings.federation}, site {settings.site}, feature space {fingerprint}"
    await computing.run(state.claim, owner)
    kept = await computing.run(FeedbackStore, state.feedback, settings.max_feedback_bytes)
    feedback.begin(kept)
    arrivals = await computing.run(Arrivals, state.arrivals)
    features, progress = state.features, computing.progress
    images = await computing.run(SiteImages, settings, extractor, features, progress, kept.accepted, arrivals)
    work = RoundWork(settings, images, device, state, publisher, computing)
    participant = Participant(settings, images, state, work, computing)
    await participant.look()
    await readiness.set(True)
    await participant.run()


def _load_extractor(settings: EdgeClientSettings, device: str) -> FeatureExtractor:
    try:
        return load_extractor(
            settings.backbone,
            settings.checkpoint,
            settings.input_size,
            settings.tile_size,
            settings.tile_overlap,
            device,
            settings.runtime,
            settings.precision,
        )
    except (ValueError, FileNotFoundError) as error:
        raise InvalidSettingsError(str(error)) from error
