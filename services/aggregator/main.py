"""`feddymem aggregator`."""

from __future__ import annotations

import asyncio

from services.aggregator.federation import Federation
from services.aggregator.servicer import FederationServicer
from services.aggregator.settings import AggregatorSettings
from services.aggregator.state import State
from services.runtime.array_store import ArrayStore
from services.runtime.hardware import configure_hardware
from services.runtime.identity import Identity, Role
from services.runtime.logs import configure_logs
from services.runtime.publisher import Publisher
from services.runtime.server import listening, run_until_stopped
from services.runtime.settings import load_settings


def main(args: list[str]) -> None:
    """Runs the aggregator until SIGTERM.

    Raises:
        InvalidSettingsError: a setting is off.
        OSError: an address cannot be bound, or the state folder cannot be written.
    """
    settings = load_settings(AggregatorSettings, args)
    configure_logs(settings.log_format)
    configure_hardware(settings.threads)
    asyncio.run(_serve(settings))


async def _serve(settings: AggregatorSettings) -> None:
    state = State(settings.state_dir)
    arrays = ArrayStore(settings.state_dir / "arrays")
    federations: dict[str, Federation] = {}

    def may_read(who: Identity, federation: str) -> bool:
        return who.role is Role.OPERATOR or (federation in federations and federations[federation].may_join(who.name))

    publisher = Publisher(arrays, frozenset({Role.SITE, Role.INFERENCE, Role.OPERATOR}), may_read)
    federations |= {
        name: Federation(name, federation, state, arrays, publisher)
        for name, federation in settings.federations.items()
    }
    servicer = FederationServicer(federations, state, arrays)
    try:
        async with listening(settings, Role.AGGREGATOR, [servicer.service, publisher.service]) as readiness:
            await readiness.set(True)
            await run_until_stopped(*(federation.run() for federation in federations.values()))
    finally:
        state.close()
