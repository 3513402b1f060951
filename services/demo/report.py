"""The demo's report: report.json for programs, report.html for people."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from feddymem.client import InspectionResult, Verdict
from feddymem.datasets import TestImage
from feddymem.evaluation import Alarms, alarms, detect
from feddymem.images import decode_file
from feddymem.maps import HeatScale, coloured

_CASES = 4
"""Images shown of each kind for each site."""


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """A test image and what the inference service answered.

    Attributes:
        image: the test image.
        result: the answer, with an anomaly map.
    """

    image: TestImage
    result: InspectionResult

    @property
    def anomalies(self) -> NDArray[np.float32]:
        """(input_size, input_size) float32 anomaly map."""
        assert self.result.anomaly_map is not None, "it was asked for"
        return self.result.anomaly_map


@dataclass(frozen=True, eq=False)
class SiteReport:
    """One site's results.

    Attributes:
        scored: its test images.
        local_image_auroc: image AUROC of the site alone, with as many items as it sends to a federation.
        bytes_sent: bytes that left the site in each round.
    """

    scored: tuple[ScoredImage, ...]
    local_image_auroc: float
    bytes_sent: tuple[int, ...]

    @property
    def labels(self) -> NDArray[np.bool_]:
        """(n,) True for defect."""
        return np.array([scored.image.defect for scored in self.scored], bool)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,) anomaly scores."""
        return np.array([scored.result.score for scored in self.scored], np.float64)

    @property
    def anomalous(self) -> NDArray[np.bool_] | None:
        """(n,) True for what was found anomalous; None where there were no verdicts."""
        verdicts = [scored.result.verdict for scored in self.scored]
        return None if None in verdicts else np.array([verdict is Verdict.ANOMALOUS for verdict in verdicts], bool)

    @cached_property
    def figures(self) -> dict[str, float | None]:
        """What report.json says of the site; null where it cannot be said."""
        masks = [s.image.read_mask(_size(s.anomalies)) if s.image.mask is not None else None for s in self.scored]
        detection = detect(self.labels, self.scores, masks, [s.anomalies for s in self.scored])
        called = Alarms(math.nan, math.nan) if self.anomalous is None else alarms(self.labels, self.anomalous)
        return {
            **{name: _finite(value) for name, value in {**asdict(detection), **asdict(called)}.items()},
            "guaranteed_rate": max(
                (g.false_alarm_rate for s in self.scored if (g := s.result.guarantee)), default=None
            ),
            "local_image_auroc": _finite(self.local_image_auroc),
            "bytes_per_round": max(self.bytes_sent, default=None),
        }


@dataclass(frozen=True, eq=False)
class Report:
    """All results of a demo.

    Attributes:
        sites: results by site.
        seconds: wall time of everything, comparison included.
        federated_seconds: wall time until the last image was inspected.
        rounds: rounds run.
        fingerprint: of the feature space.
        release: version that scored.
    """

    sites: dict[str, SiteReport]
    seconds: float
    federated_seconds: float
    rounds: int
    fingerprint: str
    release: int

    @cached_property
    def site_figures(self) -> dict[str, dict[str, float | None]]:
        """Each site's figures."""
        return {name: site.figures for name, site in self.sites.items()}

    @cached_property
    def mean_figures(self) -> dict[str, float | None]:
        """Mean over those sites that have a figure."""
        figures = list(self.site_figures.values())
        means: dict[str, float | None] = {}
        for key in figures[0]:
            known = [value for site in figures if (value := site[key]) is not None]
            means[key] = float(np.mean(known)) if known else None
        return means

    def as_json(self) -> dict[str, object]:
        """Content of report.json."""
        return {
            "sites": self.site_figures,
            "mean": self.mean_figures,
            "seconds": self.seconds,
            "federated_seconds": self.federated_seconds,
            "rounds": self.rounds,
            "fingerprint": self.fingerprint,
            "release": self.release,
        }


def write_report(report: Report, out: Path) -> None:
    """Writes report.json and report.html to a folder, which is made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("services.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        report=report,
        figures=report.site_figures,
        mean=report.mean_figures,
        distributions={name: _distribution(site) for name, site in report.sites.items()},
        curves=_curves(report),
        cases={name: _cases(site) for name, site in report.sites.items()},
    )
    (out / "report.html").write_text(page)


def _cases(site: SiteReport) -> dict[str, list[tuple[str, str]]]:
    """Overlays of the clearest catches, and of the defects and good images that are most wrong; (caption, image)
    each."""
    defects = sorted((s for s in site.scored if s.image.defect), key=lambda s: s.result.score)
    good = sorted((s for s in site.scored if not s.image.defect), key=lambda s: s.result.score)
    chosen = {
        "best: defects with the highest scores": defects[::-1][:_CASES],
        "worst: defects with the lowest scores": defects[:_CASES],
        "worst: good images with the highest scores": good[::-1][:_CASES],
    }
    full_scale = max((float(s.anomalies.max()) for s in site.scored), default=1.0)
    return {
        title: [(_caption(s), _overlay(s, s.result.scale or HeatScale(0.0, full_scale))) for s in group]
        for title, group in chosen.items()
    }


def _caption(scored: ScoredImage) -> str:
    verdict = "" if scored.result.verdict is None else f", {scored.result.verdict.value}"
    return f"{scored.image.kind}/{scored.image.path.name}: {scored.result.score:.2f}{verdict}"


def _overlay(scored: ScoredImage, scale: HeatScale) -> str:
    """The image, the same with its anomaly map, and the mask's outline; as a data URL."""
    image = decode_file(scored.image.path).astype(np.uint8)
    pixels = cv2.resize(image, _size(scored.anomalies)[::-1], interpolation=cv2.INTER_AREA)
    blended = cv2.addWeighted(pixels, 0.55, coloured(scored.anomalies, scale), 0.45, 0)
    if scored.image.mask is not None:
        mask = scored.image.read_mask(_size(scored.anomalies)).astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(blended, outlines, -1, (255, 255, 255), 1)
    both = cv2.cvtColor(np.hstack([pixels, blended]), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", both, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return _data_url("image/jpeg", encoded.tobytes())


def _distribution(site: SiteReport) -> str:
    figure = Figure(figsize=(5, 2.4), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(site.scores, bins=24).tolist()
    axes.hist(site.scores[~site.labels], edges, color="#2a7ab0", alpha=0.7, label="good")
    axes.hist(site.scores[site.labels], edges, color="#c0392b", alpha=0.6, label="defect")
    axes.set(xlabel="anomaly score", ylabel="images")
    axes.legend(frameon=False)
    return _svg(figure)


def _curves(report: Report) -> str:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, site in report.sites.items():
        if site.labels.any() and not site.labels.all():
            false_positives, true_positives, _ = roc_curve(site.labels, site.scores)
            axes.plot(false_positives, true_positives, label=name)
    axes.plot([0, 1], [0, 1], color="#999", linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return _data_url("image/svg+xml", buffer.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _size(values: NDArray[np.float32]) -> tuple[int, int]:
    return int(values.shape[0]), int(values.shape[1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
