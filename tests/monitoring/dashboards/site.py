"""Site: whether its edge client learns what it should, and its lines have the releases."""

from __future__ import annotations

from tests.monitoring.dashboards.grafana import GREEN, ORANGE, RED, Dashboard, Panel, Query, Row
from tests.monitoring.dashboards.parts import (
    NAMESPACE,
    NOTHING_OR_ODD,
    NOTHING_OR_SOME,
    OF_SITE,
    PROCESS,
    SITE,
    alerts_of,
    devices,
    firing,
    oldest_release,
    outcomes,
    processes,
    ready,
)

_EDGE, _INFERENCE = "feddymem_edge_round", "feddymem_inspections_waiting"
"""That only edge clients, and only inference services have."""


def _gauge(metric: str, legend: str = PROCESS) -> Query:
    return Query(f"feddymem_edge_{metric}{{{OF_SITE}}}", legend)


def _hourly(metric: str, legend: str = PROCESS) -> Query:
    return Query(f"increase(feddymem_edge_{metric}{{{OF_SITE}}}[1h])", legend)


HEALTH = Row(
    "Is it healthy?",
    4,
    (
        ready(
            "Edge clients ready",
            "Share of the edge clients that answer Prometheus and have extracted their features. One with `--once` "
            "that is done is gone.",
            _EDGE,
            OF_SITE,
        ),
        ready("Inference ready", "Share of the inference replicas that can score.", _INFERENCE, OF_SITE),
        *firing(*alerts_of("feddymem-inspection", "feddymem"), of=OF_SITE),
        Panel(
            title="Connected to the aggregator",
            description="Share of the inference replicas. Without it a replica scores with what it has, and would not "
            "hear of a rollback.",
            kind="stat",
            queries=(Query(f'avg(feddymem_publishers_connected{{{OF_SITE},role="aggregator"}} > bool 0)'),),
            unit="percentunit",
            steps=((RED, 0), (GREEN, 1)),
        ),
        Panel(
            title="Images skipped",
            description="Files that are no images, or cannot be read: `image_skipped` in the log names each.",
            kind="stat",
            queries=(Query(f'sum(feddymem_edge_images{{{OF_SITE},outcome="skipped"}})'),),
            unit="none",
            steps=NOTHING_OR_ODD,
        ),
        Panel(
            title="Calls tried again, an hour",
            description="To the aggregator. Rises steadily: the line or the aggregator is down.",
            kind="stat",
            queries=(Query(f"sum(increase(feddymem_edge_retries_total{{{OF_SITE}}}[1h]))"),),
            unit="none",
            steps=((GREEN, 0), (ORANGE, 5)),
        ),
        oldest_release(OF_SITE),
    ),
)

IMAGES = Row(
    "Images",
    7,
    (
        Panel(
            title="Images in the folder",
            description="Those read enter the next bank; skipped are named in the log.",
            queries=(_gauge("images", f"{{{{outcome}}}} {PROCESS}"),),
            unit="none",
        ),
        Panel(
            title="Images extracted, an hour",
            description="New and changed ones, all of them after a start with an empty state folder.",
            queries=(_hourly("images_extracted_total"),),
        ),
        Panel(
            title="Features per second",
            description="Patch features through the time that their extraction took, since the process started. Fewer "
            "than before: something else computes on the machine, or the GPU is gone.",
            queries=(
                Query(
                    f"feddymem_edge_features_total{{{OF_SITE}}} / (feddymem_edge_extraction_seconds_total > 0)", PROCESS
                ),
            ),
            unit="cps",
        ),
    ),
)

LEARNING = Row(
    "Local update",
    7,
    (
        Panel(
            title="Round",
            description="Last round that the site's bank was accepted in. Behind the aggregator's: the site misses "
            "rounds.",
            queries=(_gauge("round"),),
            unit="none",
        ),
        Panel(
            title="Mean duration of a local update",
            description="Of an hour. Near the round's deadline: give it cores or a GPU.",
            queries=(
                Query(
                    f"rate(feddymem_edge_local_update_duration_seconds_sum{{{OF_SITE}}}[1h])"
                    f" / rate(feddymem_edge_local_update_duration_seconds_count{{{OF_SITE}}}[1h])",
                    PROCESS,
                ),
            ),
            unit="s",
        ),
        Panel(
            title="Generator loss",
            description="Mean metric loss of the last training, in squared radii; 0 without memory generators. Jumps "
            "between rounds: the site's images have changed.",
            queries=(_gauge("generator_loss"),),
        ),
        Panel(
            title="Calibration",
            description="Images held out of the last bank, and seconds that scoring them takes, mean of an hour. Fewer "
            "than 19: a rate of 5 % rests on other sites' images, too.",
            queries=(
                _gauge("held_out_images", "images"),
                Query(
                    f"rate(feddymem_edge_calibration_duration_seconds_sum{{{OF_SITE}}}[1h])"
                    f" / rate(feddymem_edge_calibration_duration_seconds_count{{{OF_SITE}}}[1h])",
                    "seconds",
                ),
            ),
            unit="none",
        ),
    ),
)

BANK = Row(
    "Bank and device",
    7,
    (
        Panel(
            title="Items of the bank",
            description="Of the last reduced bank.",
            queries=(_gauge("bank_items"),),
            unit="none",
        ),
        Panel(
            title="Memory-reduce ratio",
            description="Items of the last reduced bank, through the patches that it was made of.",
            queries=(_gauge("memory_reduce_ratio"),),
            unit="percentunit",
        ),
        *devices(OF_SITE, "feddymem_device_info"),
    ),
)

FEEDBACK = Row(
    "Feedback",
    7,
    (
        Panel(
            title="Feedback received",
            description="In an hour, by opinion. More false alarms than before: see Drift and AlarmRateOutOfBand in "
            "docs/alerts.md.",
            queries=(
                Query(
                    f"sum by (opinion) (increase(feddymem_edge_feedback_total{{{OF_SITE}}}[1h])) or vector(0)",
                    "kept: {{opinion}}",
                ),
                Query(
                    f"sum by (opinion) (increase(feddymem_feedback_reports_total{{{OF_SITE}}}[1h])) or vector(0)",
                    "handed over: {{opinion}}",
                ),
            ),
            unit="none",
        ),
        Panel(
            title="Images that something was said of",
            description="undecided: somebody has to look at them (docs/operations.md, Feedback).",
            queries=(Query(f"sum by (state) (feddymem_edge_feedback_images{{{OF_SITE}}}) or vector(0)", "{{state}}"),),
            unit="none",
        ),
        Panel(
            title="Size of these images",
            description="Near `max_feedback_bytes`, new feedback is refused: decide about what is there.",
            queries=(Query(f"sum(feddymem_edge_feedback_bytes{{{OF_SITE}}}) or vector(0)", "bytes"),),
            unit="bytes",
        ),
    ),
)

LINE = Row(
    "To the aggregator",
    7,
    (
        Panel(
            title="Bytes sent, an hour",
            description="Of bank uploads, repeated parts included. Grows without rounds: the line breaks.",
            queries=(_hourly("sent_bytes_total"),),
            unit="bytes",
        ),
        Panel(
            title="Tried again, an hour",
            description="Calls to the aggregator, and the uploads among them that were interrupted.",
            queries=(
                _hourly("retries_total", f"calls {PROCESS}"),
                _hourly("upload_retries_total", f"uploads {PROCESS}"),
            ),
        ),
        Panel(
            title="No room, and damaged files",
            description="Times that something could not be written for want of room; files of the state folder that "
            "were found damaged. Any: look at the disk.",
            queries=(
                _gauge("disk_full_total", f"no room {PROCESS}"),
                Query(f"feddymem_damaged_files_total{{{OF_SITE}}}", f"damaged {PROCESS}"),
            ),
            unit="none",
        ),
    ),
)

INSPECTION = Row(
    "Its lines",
    7,
    (
        outcomes("More on the dashboard Inspection."),
        Panel(
            title="Release that scores",
            description="By federation and replica.",
            queries=(Query(f"feddymem_serving_release_version{{{OF_SITE}}}", f"{{{{federation}}}} {PROCESS}"),),
            unit="none",
        ),
        Panel(
            title="Inference replicas up",
            description="Whether each answers Prometheus.",
            kind="state-timeline",
            queries=(Query(f"up{{{OF_SITE}}} and on (job, instance) last_over_time({_INFERENCE}[1h])", PROCESS),),
            unit="none",
            texts=((0, "down", RED), (1, "up", GREEN)),
        ),
        Panel(
            title="Files found damaged",
            description="Of all state folders of the site, since the processes started.",
            kind="stat",
            queries=(Query(f"sum(feddymem_damaged_files_total{{{OF_SITE}}})"),),
            unit="none",
            steps=NOTHING_OR_SOME,
        ),
    ),
)

DASHBOARD = Dashboard(
    name="site",
    title="FedDyMem / Site",
    description="Does a site's edge client learn what it should, and do its lines have the releases?",
    variables=(NAMESPACE, SITE),
    rows=(HEALTH, IMAGES, LEARNING, BANK, FEEDBACK, LINE, INSPECTION, *processes(OF_SITE, "feddymem_device_info")),
)
