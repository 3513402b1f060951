"""`feddymem demo`: the whole system as separate processes on loopback, and what it finds."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from feddymem.backbone import load_extractor
from feddymem.client import InspectionClient, InspectionError, NotServedError, UnavailableError
from feddymem.dataset_files import load_sites
from feddymem.datasets import DatasetError, SiteData
from feddymem.method import Method
from feddymem.synthetic import write_products
from feddymem.v1.federation_pb2 import PHASE_DONE, FederationStatus, Phase
from services.cli.consoles import standard_error, standard_output
from services.cli.exit_codes import FAILED, INTERRUPTED, OK, USAGE
from services.cli.status import get_status
from services.demo.local import local_image_auroc
from services.demo.processes import Fleet, RunningService, ServiceFailedError
from services.demo.prometheus import (
    MONITORING,
    NoPrometheusError,
    Target,
    find_prometheus,
    start_prometheus,
    write_targets,
)
from services.demo.report import Report, ScoredImage, SiteReport, write_report
from services.runtime.words import word_of

_FEDERATION = "demo"
_SHOWN = ("image_auroc", "local_image_auroc", "pixel_auroc", "false_alarm_rate", "detection_rate")
_ROUNDS_SECONDS = 3600
_READY_SECONDS = 120
_LOOK_SECONDS = 0.5


def demo(data: Path | None, out: Path, with_prometheus: bool = False) -> int:
    """Runs the demo; the exit code.

    Args:
        data: site folders; None for synthetic ones.
        out: folder for the report.
        with_prometheus: has a Prometheus watch it, and leaves all of it running until it is interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    console = standard_error()
    try:
        prometheus = find_prometheus() if with_prometheus else None
        with tempfile.TemporaryDirectory(prefix="feddymem-demo-") as name, Fleet(Path(name) / "services") as fleet:
            folder = Path(name)
            if data is None:
                data = folder / "synthetic"
                write_products(data)
            report = _run(fleet, load_sites(data), folder, prometheus, console)
            write_report(report, out)
            standard_output().print(_table(report))
            console.print(f"report: {out / 'report.html'} and {out / 'report.json'}")
            if prometheus is not None:
                _stay(fleet, console)
    except KeyboardInterrupt:
        console.print("feddymem demo: interrupted; all services are stopped")
        return INTERRUPTED
    except DatasetError as error:
        console.print(f"feddymem demo: {error}")
        return USAGE
    except (NoPrometheusError, ServiceFailedError) as error:
        console.print(f"feddymem demo: {error}")
        return FAILED
    return OK


@dataclass(frozen=True)
class _Services:
    """A federation's processes; edge clients by site."""

    aggregator: RunningService
    edges: dict[str, RunningService]
    inference: RunningService


def _run(fleet: Fleet, sites: tuple[SiteData, ...], folder: Path, prometheus: str | None, console: Console) -> Report:
    started = time.perf_counter()
    method = Method()
    with console.status("starting services") as shown:
        services = _start(fleet, sites, method, folder)
        if prometheus is not None:
            _watch(fleet, services, prometheus, folder / "prometheus", console)
        status = _follow_rounds(fleet, services.aggregator, shown.update)
        shown.update("waiting for the inference service")
        _wait_served(fleet, services.inference, sites, status.release)
        scored = {}
        for site in sites:
            shown.update(f"inspecting {len(site.test)} images of {site.name}")
            scored[site.name] = _inspect(services.inference, site)
    federated_seconds = time.perf_counter() - started
    if prometheus is None:
        fleet.stop()  # what follows needs the cores
    sent = {site.site: tuple(site.bytes_per_round) for site in status.sites}
    reports = {}
    extractor = load_extractor()
    for site in sites:
        with console.status(f"{site.name} alone, for comparison"):
            alone = local_image_auroc(site, method, extractor, folder)
        reports[site.name] = SiteReport(scored[site.name], alone, sent[site.name])
    return Report(
        sites=reports,
        seconds=time.perf_counter() - started,
        federated_seconds=federated_seconds,
        rounds=status.method.rounds,
        fingerprint=status.feature_space.fingerprint,
        release=status.release,
    )


def _start(fleet: Fleet, sites: tuple[SiteData, ...], method: Method, folder: Path) -> _Services:
    names = [site.name for site in sites]
    settings = {
        "quorum": len(names),
        "sites": names,
        "round_deadline_seconds": _ROUNDS_SECONDS,
        "method": method.model_dump(),
    }
    config = folder / "aggregator.yaml"
    config.write_text(yaml.safe_dump({"federations": {_FEDERATION: settings}}))
    aggregator = fleet.start("aggregator", "aggregator", "--config", str(config))
    for site in sites:
        # One thread each: the sites of a demo share one machine's cores.
        flags = ["--federation", _FEDERATION, "--site", site.name, "--aggregator", aggregator.grpc, "--threads", "1"]
        images = _linked(site.train, folder / "images" / site.name)
        fleet.launch(f"edge-{site.name}", "edge", *flags, "--data", str(images))
    edges = {name: fleet.wait_listening(f"edge-{name}") for name in names}
    addresses = [flag for edge in edges.values() for flag in ("--edge-clients", edge.grpc)]
    inference = fleet.start("inference", "inference", "--aggregator", aggregator.grpc, *addresses)
    return _Services(aggregator, edges, inference)


def _watch(fleet: Fleet, services: _Services, program: str, folder: Path, console: Console) -> None:
    """Has Prometheus scrape all services, and judge them by the rules; nobody is told of its alerts."""
    folder.mkdir()
    for name in ("prometheus.yaml", "rules.yaml"):
        shutil.copyfile(MONITORING / name, folder / name)
    edges = [Target(edge.metrics, "edge-client", site) for site, edge in services.edges.items()]
    others = [Target(services.aggregator.metrics, "aggregator"), Target(services.inference.metrics, "inference", "all")]
    write_targets(folder, [*edges, *others])
    address = start_prometheus(fleet, program, folder)
    console.print(f"prometheus: http://{address} (its alerts: http://{address}/alerts)")
    for service in (services.aggregator, *services.edges.values(), services.inference):
        console.print(f"{service.name}: gRPC at {service.grpc}, http://{service.metrics}/metrics")


def _stay(fleet: Fleet, console: Console) -> None:
    """Waits for Ctrl-C or SIGTERM, which are how this is meant to end.

    Raises:
        ServiceFailedError: a process has ended before.
    """
    console.print("feddymem demo: all of it runs until Ctrl-C")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            fleet.check_alive()
            time.sleep(_LOOK_SECONDS)


def _linked(images: tuple[Path, ...], folder: Path) -> Path:
    """A folder of links to images, in their order: an edge client takes a folder, a site's images may lie anywhere."""
    folder.mkdir(parents=True)
    for number, path in enumerate(images):
        (folder / f"{number:06}-{path.name}").symlink_to(path.resolve())
    return folder


def _follow_rounds(fleet: Fleet, aggregator: RunningService, show: object) -> FederationStatus:
    """Waits until the federation is done; its last status."""
    seen: list[FederationStatus] = []

    def done() -> bool:
        seen[:] = get_status(aggregator.grpc, _FEDERATION).federations
        state = seen[0]
        delivered = sum(site.last_round >= state.round for site in state.sites)
        show(  # type: ignore[operator]
            f"round {state.round} of {state.method.rounds}: {word_of(Phase.Name(state.phase))}, "
            f"{len(state.sites)} sites joined, {delivered} banks"
        )
        return state.phase == PHASE_DONE

    fleet.wait_until(done, _ROUNDS_SECONDS, "the federation's rounds")
    return seen[0]


def _wait_served(fleet: Fleet, inference: RunningService, sites: tuple[SiteData, ...], release: int) -> None:
    """Waits until the inference service is ready and scores every site with the last release."""
    with grpc.insecure_channel(inference.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def serving() -> bool:
            return bool(health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING)

        fleet.wait_until(serving, _READY_SECONDS, "the inference service to be ready")
    for site in sites:
        image = site.train[0]
        with InspectionClient(inference.grpc, site=site.name, attempts=1) as client:

            def current(client: InspectionClient = client, image: Path = image) -> bool:
                with contextlib.suppress(UnavailableError, NotServedError):  # asked again until the time is up
                    return client.inspect(image).release == release
                return False

            fleet.wait_until(current, _READY_SECONDS, f"release {release} to be served for {site.name}")


def _inspect(inference: RunningService, site: SiteData) -> tuple[ScoredImage, ...]:
    return tuple(_scored(inference, site))


def _scored(inference: RunningService, site: SiteData) -> Iterator[ScoredImage]:
    with InspectionClient(inference.grpc, site=site.name) as client:
        outcomes = client.inspect_many((image.path for image in site.test), map_kind="float32")
        for image, outcome in zip(site.test, outcomes, strict=True):
            if isinstance(outcome, InspectionError):
                raise ServiceFailedError(f"{image.path}: {outcome}") from outcome
            yield ScoredImage(image, outcome)


def _table(report: Report) -> Table:
    # Lines broken by hand, so that 80 columns are enough.
    headings = ("image\nAUROC", "site\nalone", "pixel\nAUROC", "false\nalarms", "detected", "KiB per\nround")
    table = Table("site", *headings, title="inspection through gRPC")
    table.columns[0].no_wrap = True
    for name, figures in (*report.site_figures.items(), ("mean", report.mean_figures)):
        cells = (_cell(figures[key]) for key in _SHOWN)
        table.add_row(
            name, *cells, f"{(figures['bytes_per_round'] or 0) / 1024:.1f}", end_section=name == list(report.sites)[-1]
        )
    guaranteed = _cell(report.mean_figures["guaranteed_rate"])
    table.caption = (
        f"false alarms guaranteed: {guaranteed} at most\n"
        f"{report.federated_seconds:.0f} s federated and inspected, {report.seconds:.0f} s in all"
    )
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
