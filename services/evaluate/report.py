"""The evaluation's report: report.json for programs, report.html and report.md for people."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import jinja2

from feddymem.calibration import FALSE_ALARM_RATE
from feddymem.comparison import CONTENDERS
from feddymem.experiment import METRICS, Experiment, Figures

COLUMNS = (
    "image AUROC",
    "image AP",
    "best image F1",
    "pixel AUROC",
    "AUPRO",
    "false alarms",
    "detected",
    "guaranteed",
    "held out",
    "KiB per site and round",
    "s",
    "peak MiB",
)
"""Headings of METRICS, in their order."""

_FORMS = {
    "held_out_images": (1.0, ".0f"),
    "bytes_per_site_round": (1024.0, ".0f"),
    "seconds": (1.0, ".1f"),
    "peak_memory_bytes": (2.0**20, ".0f"),
}
"""Unit and form of the figures that are no shares."""


def write_report(experiment: Experiment, out: Path) -> None:
    """Writes report.json, report.html and report.md to a folder that exists."""
    (out / "report.json").write_text(json.dumps(as_json(experiment), indent=2, allow_nan=False) + "\n")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("services.evaluate", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),  # not the Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("report.html", "report.md"):
        template = environment.get_template(f"{name}.j2")
        page = template.render(
            experiment=experiment, columns=COLUMNS, cells=cells, contenders=CONTENDERS, rate=FALSE_ALARM_RATE
        )
        (out / name).write_text(page)


def as_json(experiment: Experiment) -> dict[str, object]:
    """Content of report.json; figures that cannot be said are null."""
    return {
        "data": experiment.data,
        "seeds": list(experiment.seeds),
        "train_images": experiment.train_images,
        "false_alarm_rate": FALSE_ALARM_RATE,
        "method": experiment.method.model_dump(exclude={"seed"}),
        "fingerprint": experiment.feature_space.fingerprint,
        "feature_space": asdict(experiment.feature_space),
        "methods": {
            name: {
                **_finite(result.mean),
                "std": _finite(result.std),
                "sites": {site: _finite(figures) for site, figures in result.sites.items()},
            }
            for name, result in experiment.results.items()
        },
    }


def cells(figures: Figures, std: Figures | None = None) -> list[str]:
    """A table's cells of METRICS, each with its standard deviation if there is one; a dash where a figure is NaN."""
    return [_cell(key, figures[key], None if std is None else std[key]) for key in METRICS]


def _cell(key: str, value: float, std: float | None) -> str:
    if math.isnan(value):
        return "–"
    unit, form = _FORMS.get(key, (1.0, ".3f"))
    return f"{value / unit:{form}}" + ("" if std is None else f" ± {std / unit:{form}}")


def _finite(figures: Figures) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}
