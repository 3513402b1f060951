"""`feddymem edge`."""

from __future__ import annotations

import asyncio
import time

from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.datasets import list_images
from feddymem.extraction import Extraction, extract
from feddymem.memory_reduce import Progress
from services.edge_client import metrics
from services.edge_client.participant import Participant
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.runtime.hardware import configure_hardware
from services.runtime.identity import Identity, Role
from services.runtime.logs import configure_logs, get_logger
from services.runtime.progress import shown_progress
from services.runtime.publisher import Publisher
from services.runtime.server import Readiness, listening, run_until_stopped
from services.runtime.settings import InvalidSettingsError, load_settings

_log = get_logger()


def main(args: list[str]) -> None:
    """Runs the edge client until SIGTERM, or with --once until the federation is done.

    Raises:
        InvalidSettingsError: a setting is off.
        DatasetError: no folder, no image in it, or none that can be read.
        ParticipationError: the aggregator refuses this site.
        OSError: an address cannot be bound, or the state folder cannot be written.
    """
    settings = load_settings(EdgeClientSettings, args)
    configure_logs(settings.log_format)
    configure_hardware(settings.threads)
    list_images(settings.data)  # fail before anything listens
    device = resolve_device(settings.device)
    asyncio.run(_serve(settings, device))


async def _serve(settings: EdgeClientSettings, device: str) -> None:
    state = EdgeState(settings.state_dir)
    own = Identity(Role.INFERENCE, settings.site)
    publisher = Publisher(state.arrays, frozenset({Role.INFERENCE}), lambda who, _federation: who == own)
    with shown_progress() as progress:
        async with listening(settings, Identity(Role.SITE, settings.site), [publisher.service]) as readiness:
            work = _take_part(settings, device, state, publisher, readiness, progress)
            await run_until_stopped(work, until_done=settings.once)


async def _take_part(
    settings: EdgeClientSettings,
    device: str,
    state: EdgeState,
    publisher: Publisher,
    readiness: Readiness,
    progress: Progress,
) -> None:
    extractor = await asyncio.to_thread(_load_extractor, settings, device)
    extraction = await asyncio.to_thread(_extract, settings, extractor, state, progress)
    participant = Participant(settings, extractor.feature_space, extraction.patches, device, state, publisher, progress)
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


def _extract(
    settings: EdgeClientSettings, extractor: FeatureExtractor, state: EdgeState, progress: Progress
) -> Extraction:
    paths = list_images(settings.data)
    started = time.perf_counter()
    extraction = extract(paths, extractor, state.patches, settings.batch_size, settings.max_pixels, progress)
    seconds = time.perf_counter() - started
    for reason in extraction.skipped:
        _log.warning("image_skipped", reason=reason)
    metrics.IMAGES.labels("read").inc(extraction.patches.images)
    metrics.IMAGES.labels("skipped").inc(len(extraction.skipped))
    metrics.FEATURE_SECONDS.set(seconds)
    _log.info(
        "features_extracted",
        images=extraction.patches.images,
        skipped=len(extraction.skipped),
        seconds=round(seconds, 3),
        device=str(extractor.device),
        fingerprint=extractor.feature_space.fingerprint,
    )
    return extraction
