"""Inspection: whether lines get answers, in time, and right ones."""

from __future__ import annotations

from tests.monitoring.dashboards.grafana import GREEN, ORANGE, RED, Dashboard, Panel, Query, Row, Variable
from tests.monitoring.dashboards.parts import (
    NAMESPACE,
    NOTHING_OR_SOME,
    OF_FEDERATION,
    OF_SITE,
    PROCESS,
    SERVICE,
    SITE,
    alerts_of,
    devices,
    firing,
    oldest_release,
    outcomes,
    processes,
    ready,
)

_OURS = "feddymem_inspections_waiting"
"""That only inference services have."""
_BY_SERVICE = "namespace, job, app_kubernetes_io_instance"
_FEDERATIONS = f"{OF_SITE},{OF_FEDERATION}"
_STAGES = ("queue", "decode", "compute", "encode")
_OBJECTIVE_SECONDS, _OBJECTIVE = 0.25, 0.99
_ALERTS = (
    *alerts_of("feddymem-inspection"),
    *("InferenceNotReady", "InferenceDown", "ReplicaBehind", "ReleaseStale", "AggregatorUnreachable"),
)


def _quantile(share: float) -> Query:
    buckets = f"rate(feddymem_inspection_duration_seconds_bucket{{{OF_SITE}}}[$__rate_interval])"
    return Query(f"histogram_quantile({share:g}, sum by (le) ({buckets}))", f"{share:.0%}")


def _mean(stage: str) -> Query:
    name = f"feddymem_inspection_{stage}_seconds"
    total, count = (f"sum(rate({name}_{part}{{{OF_SITE}}}[5m]))" for part in ("sum", "count"))
    return Query(f"{total} / {count}", stage)


def _ninety_ninth(stage: str) -> Query:
    buckets = f"rate(feddymem_inspection_{stage}_seconds_bucket{{{OF_SITE}}}[5m])"
    return Query(f"histogram_quantile(0.99, sum by (le) ({buckets}))", stage)


HEALTH = Row(
    "Is it healthy?",
    4,
    (
        ready(
            "Replicas ready",
            "Share of inference replicas that answer Prometheus and have something to score with. Less than all: see "
            "InferenceNotReady and ServiceDown in docs/alerts.md.",
            _OURS,
            OF_SITE,
        ),
        Panel(
            title="Errors",
            description="Largest share of a service's inspections that fail by a fault of ours, in five minutes. "
            "InspectionErrors fires at 1 %.",
            kind="stat",
            queries=(Query(f"max(service:feddymem_inspections_failed:ratio_rate5m{{{OF_SITE}}})"),),
            unit="percentunit",
            steps=((GREEN, 0), (RED, 0.01)),
        ),
        Panel(
            title="In time",
            description="Share of inspections of an hour that took at most 0.25 s, of the slowest service. The "
            "objective is 99 %.",
            kind="stat",
            queries=(Query(f"1 - max(service:feddymem_inspections_slow:ratio_rate1h{{{OF_SITE}}})"),),
            unit="percentunit",
            steps=((RED, 0), (ORANGE, 0.9), (GREEN, _OBJECTIVE)),
        ),
        Panel(
            title="Refused",
            description="Largest share of a service's images that it refuses, in five minutes: overloaded, or nothing "
            "to score with. LoadRefused fires at 5 %.",
            kind="stat",
            queries=(Query(f"max(service:feddymem_inspections_rejected:ratio_rate5m{{{OF_SITE}}})"),),
            unit="percentunit",
            steps=((GREEN, 0), (ORANGE, 0.001), (RED, 0.05)),
        ),
        *firing(*_ALERTS, of=OF_SITE),
        Panel(
            title="Replicas behind",
            description="Replicas that score a federation with an older release than another one of their service: the "
            "same image gets one score or the other. For some seconds after a release; longer is ReplicaBehind.",
            kind="stat",
            queries=(
                Query(
                    f"count(feddymem_serving_release_version{{{_FEDERATIONS}}}"
                    f" < on ({_BY_SERVICE}, federation) group_left ()"
                    f" max by ({_BY_SERVICE}, federation) (feddymem_serving_release_version)) or vector(0)"
                ),
            ),
            unit="none",
            steps=NOTHING_OR_SOME,
        ),
        oldest_release(_FEDERATIONS),
    ),
)

TRAFFIC = Row(
    "Inspections",
    8,
    (
        outcomes(
            "ok: normal, or no verdict was asked for. rejected: try again later. failed: a fault of ours. invalid: the "
            "line sends what is no image, or asks for what there is not."
        ),
        Panel(
            title="Latency",
            description="From acceptance to result, all services together. The line is the objective, 0.25 s for 99 %.",
            queries=tuple(map(_quantile, (0.5, 0.9, 0.99))),
            unit="s",
            steps=((GREEN, 0), (RED, _OBJECTIVE_SECONDS)),
        ),
        Panel(
            title="Error budget, burn rate",
            description="How many times too many inspections are slower than the objective. At 14.4 in an hour and in "
            "five minutes, or 6 in six hours and in thirty minutes, InspectionLatency fires; above 1 the objective is "
            "missed.",
            queries=tuple(
                Query(f"max(service:feddymem_inspections_slow:ratio_rate{window}{{{OF_SITE}}}) / 0.01", window)
                for window in ("5m", "30m", "1h", "6h", "3d")
            ),
            steps=((GREEN, 0), (ORANGE, 6), (RED, 14.4)),
        ),
    ),
)

TIME = Row(
    "Where the time goes",
    7,
    (
        Panel(
            title="Mean time of a stage",
            description="queue: add replicas. decode: the line sends larger images. compute (of a batch): something "
            "else computes on the node, or the GPU is gone. encode: maps.",
            queries=tuple(map(_mean, _STAGES)),
            unit="s",
            stacked=True,
        ),
        Panel(
            title="99 % of a stage take less than",
            description="As beside. Beyond the last bucket (0.1 s or 2.5 s) Grafana shows that one.",
            queries=tuple(map(_ninety_ninth, _STAGES)),
            unit="s",
        ),
        Panel(
            title="Images in flight",
            description="Accepted and not yet answered, and of those in the queue, by replica; refusals begin at the "
            "limit of the queue.",
            queries=(
                Query(f"{_OURS}{{{OF_SITE}}}", f"in flight {PROCESS}"),
                Query(f"feddymem_inspection_queue_images{{{OF_SITE}}}", f"queue {PROCESS}"),
                Query(f"max(feddymem_inspection_queue_limit_images{{{OF_SITE}}})", "limit of a queue"),
            ),
        ),
        Panel(
            title="Images of a batch",
            description="Mean. Always at `max_batch` on a GPU: saturated. On a CPU it is 1.",
            queries=(
                Query(
                    f"sum by ({_BY_SERVICE}) (rate(feddymem_inspection_batch_images_sum{{{OF_SITE}}}[5m]))"
                    f" / sum by ({_BY_SERVICE}) (rate(feddymem_inspection_batch_images_count{{{OF_SITE}}}[5m]))",
                    SERVICE,
                ),
            ),
        ),
    ),
)

SCORES = Row(
    "Scores",
    8,
    (
        Panel(
            title="Distribution of scores",
            description="Scores through the typical distance of their release. A second heap above are defects; all "
            "of them moving is drift (docs/alerts.md, ScoreDrift).",
            kind="heatmap",
            queries=(
                Query(
                    "sum by (le) (increase("
                    f"feddymem_inspection_score_ratio_bucket{{{_FEDERATIONS}}}[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
        ),
        Panel(
            title="Mean score",
            description="Of an hour, and of a day. ScoreDrift fires where they are 10 % apart.",
            queries=tuple(
                Query(
                    f"service_federation:feddymem_inspection_score_ratio:mean{window}{{{_FEDERATIONS}}}",
                    f"{window} {{{{federation}}}} {SERVICE}",
                )
                for window in ("1h", "1d")
            ),
            minimum=None,
        ),
        Panel(
            title="Alarm rate",
            description="Share of an hour's verdicts that are anomalous, and the highest that is allowed "
            "by the calibration of the release: the rate that it guarantees, and what chance adds to it in 100 images.",
            queries=(
                Query(
                    f"service_federation:feddymem_verdicts_anomalous:ratio_rate1h{{{_FEDERATIONS}}}",
                    f"{{{{federation}}}} {SERVICE}",
                ),
                Query("feddymem:alarm_rate_band:high", "allowed"),
            ),
            unit="percentunit",
            maximum=1,
        ),
        Panel(
            title="Drift",
            description="Whether a site's images are scored unlike those that it held out; images without a site are "
            "one. Drift in docs/alerts.md says what to do.",
            kind="state-timeline",
            queries=(
                Query(f"max by (federation, site) (feddymem_drift{{{_FEDERATIONS}}})", "{{federation}} {{site}}"),
            ),
            unit="none",
            texts=((0, "no", GREEN), (1, "yes", RED)),
        ),
    ),
)

RELEASES = Row(
    "Releases",
    7,
    (
        Panel(
            title="Release that scores",
            description="By replica, and the one that is active at the aggregator, where that is scraped here too. "
            "Apart for longer than some seconds: ReplicaBehind, ReleaseStale.",
            queries=(
                Query(f"feddymem_serving_release_version{{{_FEDERATIONS}}}", f"{{{{federation}}}} {PROCESS}"),
                Query(
                    f'max by (federation) (feddymem_release_version{{namespace=~"$namespace",{OF_FEDERATION}}})',
                    "{{federation}} active",
                ),
            ),
            unit="none",
        ),
        Panel(
            title="Releases swapped in",
            description="In an hour, by replica.",
            queries=(Query(f"increase(feddymem_release_swaps_total{{{OF_SITE}}}[1h])", PROCESS),),
        ),
        Panel(
            title="Publishers connected",
            description="Of releases: the aggregator, and the site's edge clients. Without the aggregator a replica "
            "scores with what it has, and would not hear of a rollback (AggregatorUnreachable).",
            queries=(Query(f"feddymem_publishers_connected{{{OF_SITE}}}", f"{{{{role}}}} {PROCESS}"),),
        ),
        Panel(
            title="Release in the shadow",
            description="Images of an hour that a release in the shadow has judged, by whether it agrees with the "
            "active one, and those left out or failed. shadow_only: it would raise alarms that there are not now.",
            queries=(
                Query(
                    f"sum by (agreement) (increase(feddymem_shadow_verdicts_total{{{OF_SITE}}}[1h])) or vector(0)",
                    "{{agreement}}",
                ),
                Query(
                    f'sum by (outcome) (increase(feddymem_shadow_images_total{{{OF_SITE},outcome!="judged"}}[1h]))',
                    "{{outcome}}",
                ),
            ),
            unit="none",
        ),
    ),
)

LIMITS = Row(
    "Limits and devices",
    7,
    (
        Panel(
            title="RPCs over a limit",
            description="Refused because somebody began, or held open, too many: `rpc_refused` in the log says who. "
            "There is a line for each limit that was ever met.",
            queries=(
                Query(
                    f"sum by (method, limit) (rate(feddymem_rpcs_over_limit_total{{{OF_SITE}}}[$__rate_interval])"
                    f" and on (job, instance) {_OURS})",
                    "{{limit}} {{method}}",
                ),
            ),
            unit="reqps",
        ),
        *devices(OF_SITE, _OURS),
    ),
)

DASHBOARD = Dashboard(
    name="inspection",
    title="FedDyMem / Inspection",
    description="Do lines get answers, in time, and right ones?",
    variables=(NAMESPACE, SITE, Variable("federation", "Federation", "feddymem_serving_release_version", "federation")),
    rows=(HEALTH, TRAFFIC, TIME, SCORES, RELEASES, LIMITS, *processes(OF_SITE, _OURS)),
)
