"""What this process shows to Prometheus, whichever test has had it counted: tests look at by how much it grows."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client


def sample(name: str, **labels: str) -> float | None:
    """The value of a metric with its labels; None where it has none."""
    return prometheus_client.REGISTRY.get_sample_value(f"feddymem_{name}", labels)


def total(name: str, **labels: str) -> float:
    """As `sample`; 0 where nothing has been counted yet."""
    return sample(name, **labels) or 0.0


def growth(*names: str, **labels: str) -> Callable[[], list[float]]:
    """By how much metrics, all with the same labels, have grown since."""
    before = [total(name, **labels) for name in names]
    return lambda: [total(name, **labels) - old for name, old in zip(names, before, strict=True)]
