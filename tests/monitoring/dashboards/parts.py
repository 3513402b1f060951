"""What several dashboards have: variables, selectors, and panels that are of any service."""

from __future__ import annotations

import yaml

from tests.monitoring.dashboards.grafana import BLUE, GREEN, ORANGE, RED, Panel, Query, Row, Variable
from tests.monitoring.prometheus_rule import RULES

NAMESPACE = Variable("namespace", "Namespace", "feddymem_build_info", "namespace")
SITE = Variable("site", "Site", "feddymem_build_info", "app_kubernetes_io_instance")
"""A site is the label that our PodMonitor takes from its pods, and monitoring/targets.yaml gives its targets."""

OF_NAMESPACE = 'namespace=~"$namespace"'
OF_SITE = f'{OF_NAMESPACE},app_kubernetes_io_instance=~"$site"'
OF_FEDERATION = 'federation=~"$federation"'

PROCESS = "{{pod}} {{instance}}"
"""Name of a process: Grafana leaves out a label that is not there."""
SERVICE = "{{app_kubernetes_io_instance}} {{job}}"
"""Name of all replicas of a line's service."""

NOTHING_OR_SOME = ((GREEN, 0), (RED, 1))
NOTHING_OR_ODD = ((GREEN, 0), (ORANGE, 1))


def firing(*alerts: str, of: str) -> tuple[Panel, Panel]:
    """How many of these alerts fire: those that page, and the others."""
    return (
        _firing(alerts, of, "page", "Pages", "Somebody should be on it now", RED),
        _firing(alerts, of, "ticket", "Tickets", "To be looked at, at work", ORANGE),
    )


def _firing(alerts: tuple[str, ...], of: str, severity: str, title: str, what: str, colour: str) -> Panel:
    names = "|".join(alerts)
    labels = f'alertname=~"{names}",alertstate="firing",severity="{severity}",{of}'
    return Panel(
        title=title,
        description=f"Alerts of severity `{severity}` that fire. {what}: docs/alerts.md says what each means.",
        kind="stat",
        queries=(Query(f"count(ALERTS{{{labels}}}) or vector(0)"),),
        unit="none",
        steps=((GREEN, 0), (colour, 1)),
    )


def alerts_of(*groups: str) -> list[str]:
    """Names of the alerts in groups of the rules."""
    rules = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for group in rules if group["name"] in groups for rule in group["rules"] if "alert" in rule]


def ready(title: str, description: str, who: str, of: str) -> Panel:
    """Share of services that answer Prometheus and can do their work.

    Args:
        title: of the panel.
        description: of the panel.
        who: metric that only they have.
        of: selector of their series.
    """
    return Panel(
        title=title,
        description=description,
        kind="stat",
        queries=(
            Query(
                f"(sum(feddymem_ready{{{of}}} and on (job, instance) {who}) or vector(0))"
                f" / count(up{{{of}}} and on (job, instance) last_over_time({who}[1h]))"
            ),
        ),
        unit="percentunit",
        steps=((RED, 0), (GREEN, 1)),
    )


def oldest_release(of: str) -> Panel:
    """How old releases are."""
    return Panel(
        title="Oldest release",
        description="Age of the oldest release that scores. No fault by itself: rounds may be over.",
        kind="stat",
        queries=(Query(f"time() - min(feddymem_serving_release_timestamp_seconds{{{of}}})"),),
        unit="s",
        steps=((BLUE, 0),),
    )


def outcomes(description: str) -> Panel:
    """How a site's inspections end."""
    query = f"sum by (outcome) (rate(feddymem_inspections_total{{{OF_SITE}}}[$__rate_interval]))"
    return Panel(
        title="Inspections, by outcome",
        description=description,
        queries=(Query(query, "{{outcome}}"),),
        unit="reqps",
        stacked=True,
    )


def devices(of: str, who: str) -> tuple[Panel, Panel]:
    """What some services compute on, and the memory that they hold there."""
    theirs = f"and on (job, instance) {who}"
    return (
        Panel(
            title="Computes on",
            description="cpu on a node with a GPU: it was not given to the container.",
            kind="stat",
            queries=(Query(f"count by (device) (feddymem_device_info{{{of}}} {theirs})", "{{device}}"),),
            unit="none",
            steps=((BLUE, 0),),
        ),
        Panel(
            title="GPU memory",
            description="Held by torch; near the GPU's size a smaller `max_batch` (edge client: `batch_size`) helps. 0 "
            "without a GPU.",
            queries=(
                Query(
                    f'(feddymem_gpu_memory_bytes{{{of},state="reserved"}} or on (job, instance)'
                    f" 0 * feddymem_device_info{{{of}}}) {theirs}",
                    PROCESS,
                ),
            ),
            unit="bytes",
        ),
    )


def processes(of: str, who: str) -> tuple[Row, ...]:
    """What the operating system and gRPC say of some processes.

    Args:
        of: selector of their series.
        who: metric that only they have.
    """
    theirs = f"and on (job, instance) {who}"
    return (
        Row(
            "RPCs",
            7,
            (
                Panel(
                    title="RPCs started",
                    description="By method. More than before: who calls so often? `rpc_refused` in the log names them.",
                    queries=(
                        Query(
                            f"sum by (method) (rate(feddymem_rpc_started_total{{{of}}}[$__rate_interval]) {theirs})",
                            "{{method}}",
                        ),
                    ),
                    unit="reqps",
                ),
                Panel(
                    title="RPCs handled, by status",
                    description="INTERNAL is a fault of ours: `rpc_failed` in the log. RESOURCE_EXHAUSTED: more is "
                    "asked than a limit allows (docs/operations.md, Limits).",
                    queries=(
                        Query(
                            f"sum by (code) (rate(feddymem_rpc_handled_total{{{of}}}[$__rate_interval]) {theirs})",
                            "{{code}}",
                        ),
                    ),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    title="Mean duration of RPCs",
                    description="By method, streams included from their start to their end.",
                    queries=(
                        Query(
                            f"sum by (method) (rate(feddymem_rpc_duration_seconds_sum{{{of}}}[5m]) {theirs})"
                            f" / sum by (method) (rate(feddymem_rpc_duration_seconds_count{{{of}}}[5m]) {theirs})",
                            "{{method}}",
                        ),
                    ),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Processes",
            7,
            (
                Panel(
                    title="CPU",
                    description="Cores in use. At the container's limit it is throttled, and all durations grow.",
                    queries=(Query(f"rate(process_cpu_seconds_total{{{of}}}[$__rate_interval]) {theirs}", PROCESS),),
                ),
                Panel(
                    title="Memory",
                    description="Resident memory. A slope over days is what MemoryClimbing is for; steps come with "
                    "releases and rounds.",
                    queries=(Query(f"process_resident_memory_bytes{{{of}}} {theirs}", PROCESS),),
                    unit="bytes",
                ),
                Panel(
                    title="Disk of the state folder, free",
                    description="Below 10 % DiskNearFull fires: make room, or lower `keep_releases`.",
                    queries=(
                        Query(f"feddymem_state_free_bytes{{{of}}} / feddymem_state_size_bytes {theirs}", PROCESS),
                    ),
                    unit="percentunit",
                    maximum=1,
                    steps=((RED, 0), (GREEN, 0.1)),
                ),
                Panel(
                    title="Certificate expires",
                    description="Of what the service has loaded; it loads a renewed one with the next connection. "
                    "`no TLS` for services on loopback.",
                    kind="stat",
                    queries=(Query(f"1000 * feddymem_certificate_expiry_timestamp_seconds{{{of}}} {theirs}", PROCESS),),
                    unit="dateTimeFromNow",
                    steps=((BLUE, 0),),
                    texts=((0, "no TLS", BLUE),),
                ),
            ),
        ),
    )
