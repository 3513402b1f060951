"""`feddymem aggregator`."""

from __future__ import annotations

import asyncio

from services.aggregator.database import database_of
from services.aggregator.federation import Federation
from services.aggregator.operator_servicer import OperatorServicer
from services.aggregator.servicer import FederationServicer
from services.aggregator.settings import AggregatorSettings
from services.aggregator.state import BANKS, RELEASES, State
from services.runtime.array_store import ArrayStore
from services.runtime.files import owned
from services.runtime.hardware import configure_hardware
from services.runtime.identity import Identity, Role
from services.runtime.logs import configure_logs
from services.runtime.publisher import Publisher
from services.runtime.server import listening, run_until_stopped
from services.runtime.settings import load_settings
from services.runtime.trace_export import exported_traces
from services.runtime.unfinished import exit_if_unfinished


def main(args: list[str]) -> None:
    """Runs the aggregator until SIGTERM.

    Raises:
        InvalidSettingsError: a setting is off.
        InvalidVariableError: a variable of OpenTelemetry is off.
        OSError: an address cannot be bound, the state folder cannot be written, or its database not be read.
        ValueError: the state folder is in use, or that of another version.
    """
    settings = load_settings(AggregatorSettings, args)
    configure_logs(settings.log_format)
    configure_hardware(settings.threads)
    with exported_traces("aggregator"), owned(settings.state_dir), database_of(settings.state_dir):
        asyncio.run(_serve(settings))
    exit_if_unfinished()  # a merge, which takes minutes; its banks are there, and it is begun anew


async def _serve(settings: AggregatorSettings) -> None:
    state = State(settings.state_dir)
    releases = ArrayStore(settings.state_dir / RELEASES)
    kept = [release for name in state.federations for release in (*state.releases(name), *state.candidates(name))]
    releases.keep_only((array.sha256 for release in kept for array in release.arrays), keep_parts=False)
    federations: dict[str, Federation] = {}

    def may_read(who: Identity, federation: str) -> bool:
        return who.role is Role.OPERATOR or (
            federation in federations and federations[federation].members.counts(who.name)
        )

    publisher = Publisher(releases, frozenset({Role.SITE, Role.INFERENCE, Role.OPERATOR}), may_read)
    federations |= {
        name: Federation(name, federation, state, settings.state_dir / BANKS / name, releases, publisher)
        for name, federation in settings.federations.items()
    }
    services = [FederationServicer(federations).service, OperatorServicer(federations).service, publisher.service]
    try:
        async with listening(settings, Role.AGGREGATOR, services) as readiness:
            await readiness.set(True)
            await run_until_stopped(*(federation.rounds.run() for federation in federations.values()))
    finally:
        state.close()
