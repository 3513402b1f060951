"""What a pod says of itself at /metrics."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.pod import Pod

_SECONDS = 10
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def total(pod: Pod, name: str, **labels: str) -> float:
    """The sum of a metric's samples with some labels; 0 while the pod does not answer."""
    address = f"http://{pod.address}:{pod.spec.container.ports['metrics']}/metrics"
    try:
        with _OPENER.open(address, timeout=_SECONDS) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def inspected(pod: Pod) -> float:
    """How many images an inference pod has scored."""
    return total(pod, "feddymem_inspections_total", outcome="ok")
