"""A Prometheus beside a fleet, with the configuration and the rules of monitoring/."""

from __future__ import annotations

import http.client
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from services.demo.processes import Fleet
from services.runtime.files import write_atomically

MONITORING = Path(__file__).parents[2] / "monitoring"
_READY_SECONDS = 30
_ANSWER_SECONDS = 5


@dataclass(frozen=True)
class Target:
    """What Prometheus scrapes.

    Attributes:
        address: HOST:PORT of its /metrics.
        job: what it is.
        site: whose it is; empty for the aggregator.
    """

    address: str
    job: str
    site: str = ""


class NoPrometheusError(RuntimeError):
    """There is no program `prometheus`, or no configuration for it; the text says what to do."""


def find_prometheus() -> str:
    """Path of the program.

    Raises:
        NoPrometheusError: it is not there, or the configuration is not.
    """
    found = shutil.which("prometheus")
    if found is None:
        raise NoPrometheusError(
            "there is no program `prometheus` on PATH; install it: `apt-get install prometheus` on Debian and Ubuntu, "
            "`brew install prometheus` on macOS, or from https://prometheus.io/download"
        )
    if not (MONITORING / "prometheus.yaml").exists():
        raise NoPrometheusError(
            f"there is no {MONITORING / 'prometheus.yaml'}; run this in a checkout of the repository"
        )
    return found


def start_prometheus(fleet: Fleet, program: str, configuration: Path) -> str:
    """Starts Prometheus as one of a fleet, and waits until it is ready; its HOST:PORT.

    Args:
        fleet: what it ends with.
        program: path of it.
        configuration: folder with prometheus.yaml and what that names; its data come beside.

    Raises:
        ServiceFailedError: it ended, or is not ready in time; the text has the end of its log.
    """
    address = f"127.0.0.1:{free_port()}"
    fleet.launch_program(
        "prometheus",
        program,
        f"--config.file={configuration / 'prometheus.yaml'}",
        f"--storage.tsdb.path={configuration / 'data'}",
        f"--web.listen-address={address}",
    )
    fleet.wait_until(lambda: answers(address), _READY_SECONDS, "Prometheus to be ready")
    return address


def write_targets(configuration: Path, targets: Sequence[Target]) -> None:
    """Has Prometheus scrape these services, and no others, from now on."""
    groups = [
        {
            "targets": [target.address],
            "labels": {"job": target.job} | ({"app_kubernetes_io_instance": target.site} if target.site else {}),
        }
        for target in targets
    ]
    write_atomically(configuration / "targets.yaml", yaml.safe_dump(groups).encode())


def free_port() -> int:
    """A port that is free now: Prometheus cannot be had to say which one it has picked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(address: str) -> bool:
    """Whether a server at HOST:PORT says that it is ready."""
    connection = http.client.HTTPConnection(address, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
