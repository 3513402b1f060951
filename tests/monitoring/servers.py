"""What a real Prometheus and a real Alertmanager say, and what the latter has sent."""

from __future__ import annotations

import json
import math
import shutil
import threading
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from services.demo.processes import Fleet
from services.demo.prometheus import MONITORING, NoPrometheusError, answers, free_port
from tests.monitoring.faster import faster

ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")
"""Names of the program, of Debian's package and of the project's own."""
_ANSWER_SECONDS, _READY_SECONDS = 30, 60
_WEBHOOKS = "127.0.0.1:9095"
"""Of the shipped Alertmanager."""


def find_alertmanager() -> str:
    """Path of the program.

    Raises:
        NoPrometheusError: it is not there.
    """
    found = next(filter(None, map(shutil.which, ALERTMANAGERS)), None)
    if found is None:
        raise NoPrometheusError(f"there is no program {' or '.join(ALERTMANAGERS)} on PATH; tests/monitoring/install")
    return found


def start_alertmanager(fleet: Fleet, program: str, folder: Path, webhooks: str) -> str:
    """Starts the shipped Alertmanager, only faster, with our receivers in place of its own; its HOST:PORT."""
    text = (MONITORING / "alertmanager.yaml").read_text()
    assert text.count(_WEBHOOKS) == 2
    (folder / "alertmanager.yaml").write_text(faster(text).replace(_WEBHOOKS, webhooks))
    address = f"127.0.0.1:{free_port()}"
    fleet.launch_program(
        "alertmanager",
        program,
        f"--config.file={folder / 'alertmanager.yaml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    )
    fleet.wait_until(lambda: answers(address), _READY_SECONDS, "Alertmanager to be ready")
    return address


def asked(address: str, path: str, **parameters: str) -> Any:
    """What a server answers, of JSON."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"http://{address}/api/{path}?{query}", timeout=_ANSWER_SECONDS) as answer:
        return json.load(answer)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs.

    Attributes:
        address: HOST:PORT.
    """

    address: str

    def targets(self) -> list[dict[str, Any]]:
        """Whom it scrapes."""
        found: list[dict[str, Any]] = asked(self.address, "v1/targets")["data"]["activeTargets"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """All rules, and how their evaluation went."""
        return [rule for group in asked(self.address, "v1/rules")["data"]["groups"] for rule in group["rules"]]

    def values(self, label: str, metric: str) -> list[str]:
        """Values of a label of a metric's series: Grafana's `label_values`."""
        found: list[str] = asked(self.address, f"v1/label/{label}/values", **{"match[]": metric})["data"]
        return found

    def numbers(self, expr: str, start: float, end: float) -> list[float]:
        """All that a query has come to between two times, but what is no number."""
        answer = asked(self.address, "v1/query_range", query=expr, start=str(start), end=str(end), step="1")
        values = [float(value) for series in answer["data"]["result"] for _time, value in series["values"]]
        return [value for value in values if not math.isnan(value)]


class Notices:
    """A receiver of Alertmanager's messages; a context.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, str]] = set()
        seen = self._seen

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in message["alerts"]:
                    seen.add((self.path.strip("/"), alert["labels"]["alertname"], alert["status"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                """Not on the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        self._thread = threading.Thread(target=self._server.serve_forever, name="notices")
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Notices:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def told(self, receiver: str, alert: str, status: str) -> bool:
        """Whether a receiver was told that an alert is `firing` or `resolved`."""
        return (receiver, alert, status) in set(self._seen)
