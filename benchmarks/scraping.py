"""What being scraped costs an inference service that is busy: `python -m benchmarks.scraping`.

A closed loop of callers, alone and with a Prometheus that scrapes every 15 s (as we do), every second, and twenty times
a second (so that the cost stands out of the noise), in turns; each begins with a scrape. The service has the series of
20 federations. Scrapes are asked for as Prometheus asks: compressed, in OpenMetrics.
"""

from __future__ import annotations

import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from benchmarks import parts, write_result
from benchmarks.inspection import INSPECT, ITEMS, request, serving
from benchmarks.load import run_load
from feddymem.backbone import load_extractor
from services.demo.processes import RunningService
from services.runtime.hardware import configure_hardware

INTERVALS = {"every_15_s": 15.0, "every_second": 1.0, "twenty_a_second": 0.05}
_CLEAREST = "twenty_a_second"
SECONDS, ROUNDS, CALLERS = 10.0, 4, 8
_SCRAPES = 200
_HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}


def scrape(service: RunningService) -> int:
    """One scrape; its bytes, compressed."""
    asked = urllib.request.Request(f"http://{service.metrics}/metrics", headers=_HEADERS)
    with urllib.request.urlopen(asked) as page:  # noqa: S310
        return len(page.read())


@contextmanager
def scraped(service: RunningService, interval: float | None) -> Iterator[None]:
    """Scrapes inside the block, the first time at its start."""
    over = threading.Event()

    def again() -> None:
        while interval is not None:
            scrape(service)
            if over.wait(interval):
                return

    thread = threading.Thread(target=again, name="scraping")
    thread.start()
    yield
    over.set()
    thread.join()


def _processor_ms(service: RunningService) -> float:
    """Processor time that a scrape takes of the service, without anything else to do."""

    def used() -> float:
        times = psutil.Process(service.process.pid).cpu_times()
        return float(times.user + times.system)

    before = used()
    for _ in range(_SCRAPES):
        scrape(service)
    return (used() - before) / _SCRAPES * 1000


def main() -> None:
    """Measures and writes benchmarks/results/scraping.json."""
    configure_hardware(None)
    extractor = load_extractor()
    memory = parts.memory(extractor, (ITEMS,))[ITEMS]
    bodies = [request(jpeg) for jpeg in parts.jpegs(8)]
    intervals: dict[str, float | None] = {"never": None, **INTERVALS}
    rates: dict[str, list[float]] = {name: [] for name in intervals}
    program = (sys.executable, "-m", "tests.monitoring.inference_pod")
    with TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        with serving(folder, extractor, memory, program=program) as service:
            milliseconds = _processor_ms(service)
            for _ in range(ROUNDS):
                for each, interval in intervals.items():
                    with scraped(service, interval):
                        load = run_load(service.grpc, INSPECT, bodies, folder, SECONDS, callers=CALLERS)
                    rates[each].append(load.per_second)
            with urllib.request.urlopen(f"http://{service.metrics}/metrics") as page:
                series = sum(not line.startswith(b"#") for line in page)
            size = scrape(service)
    medians = {each: round(float(np.median(of_it)), 2) for each, of_it in rates.items()}
    cores = psutil.cpu_count() or 1
    write_result(
        "scraping",
        {
            "cores": cores,
            "series": series,
            "compressed_bytes": size,
            "scrape_processor_ms": round(milliseconds, 2),
            "processor_share_percent": {
                each: round(milliseconds / 10 / interval / cores, 4) for each, interval in INTERVALS.items()
            },
            "images_per_second": medians,
            "images_per_second_of_rounds": {each: [round(rate, 2) for rate in of_it] for each, of_it in rates.items()},
            "throughput_lost_percent": {
                each: round(100 * (1 - medians[each] / medians["never"]), 2) for each in INTERVALS
            },
            "throughput_lost_percent_told_from_the_clearest": {
                each: round(100 * (1 - medians[_CLEAREST] / medians["never"]) * INTERVALS[_CLEAREST] / interval, 3)
                for each, interval in INTERVALS.items()
            },
        },
    )


if __name__ == "__main__":
    main()
