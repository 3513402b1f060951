"""A panel's PromQL as Grafana sends it: variables filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tests.monitoring.dashboards.grafana import ALL

RATE_INTERVAL = "60s"
"""Of Grafana, at a scrape interval of 15 s: four of them."""


def filled(expr: str, values: Mapping[str, Iterable[str]]) -> str:
    """PromQL without variables.

    Args:
        expr: PromQL of a panel.
        values: of each of the dashboard's variables, those that are chosen; none for `All`.
    """
    for name, chosen in values.items():
        escaped = [re.escape(value).replace("\\", "\\\\") for value in chosen]
        expr = expr.replace(f'"${name}"', f'"({"|".join(escaped)})"' if escaped else f'"{ALL}"')
    return expr.replace("$__rate_interval", RATE_INTERVAL)
