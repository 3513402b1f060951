"""Federation: whether rounds go on, and every site takes part."""

from __future__ import annotations

from tests.monitoring.dashboards.grafana import BLUE, GREEN, ORANGE, RED, Dashboard, Panel, Query, Row, Variable
from tests.monitoring.dashboards.parts import (
    NAMESPACE,
    NOTHING_OR_ODD,
    NOTHING_OR_SOME,
    OF_FEDERATION,
    OF_NAMESPACE,
    PROCESS,
    firing,
    processes,
    ready,
)

_OF = f"{OF_NAMESPACE},{OF_FEDERATION}"
_OURS = "feddymem_round_quorum_banks"
"""That only aggregators have; of each of their federations."""
_NAME = "{{federation}}"
_ALERTS = ("SiteSilent", "QuorumMissed", "RoundStuck", "BankQuarantined", "ReleaseFailedChecks")


def _gauge(metric: str, legend: str = _NAME) -> Query:
    return Query(f"feddymem_{metric}{{{_OF}}}", legend)


def _hourly(metric: str, legend: str = _NAME) -> Query:
    return Query(f"increase(feddymem_{metric}{{{_OF}}}[1h])", legend)


def _mean(metric: str) -> Query:
    total, count = (f"rate(feddymem_{metric}_{part}{{{_OF}}}[1h])" for part in ("sum", "count"))
    return Query(f"{total} / {count}", _NAME)


HEALTH = Row(
    "Is it healthy?",
    4,
    (
        ready(
            "Aggregator ready",
            "Whether an aggregator answers Prometheus and can do its work. While it is away rounds stand still and "
            "lines go on with what they have (docs/operations.md, A failover of the aggregator).",
            _OURS,
            OF_NAMESPACE,
        ),
        *firing(*_ALERTS, of=_OF),
        Panel(
            title="Phase",
            description="waiting: fewer sites have joined than the quorum needs. done: all rounds are over.",
            kind="stat",
            queries=(Query(f"feddymem_federation_phase{{{_OF}}} == 1", "{{federation}}: {{phase}}"),),
            unit="none",
            steps=((BLUE, 0),),
            names=True,
        ),
        Panel(
            title="Sites silent",
            description="Of those that are to take part, banned and removed ones left out. The sites' row below has "
            "their names; SiteSilent fires after half an hour.",
            kind="stat",
            queries=(Query(f"sum(feddymem_sites_known{{{_OF}}} - feddymem_sites_present)"),),
            unit="none",
            steps=NOTHING_OR_ODD,
        ),
        Panel(
            title="In quarantine",
            description="Sites whose last bank is left out as an outlier: `feddymem status` has the reason; admit or "
            "ban it.",
            kind="stat",
            queries=(Query(f"sum(feddymem_site_quarantined{{{_OF}}})"),),
            unit="none",
            steps=NOTHING_OR_ODD,
        ),
        Panel(
            title="Aggregations failed",
            description="In six hours: a fault of ours, or of the disk; `aggregation_failed` in the log.",
            kind="stat",
            queries=(Query(f"sum(increase(feddymem_aggregations_failed_total{{{_OF}}}[6h]))"),),
            unit="none",
            steps=NOTHING_OR_SOME,
        ),
        Panel(
            title="Since the last release",
            description="Of the federation that has waited longest. No fault where all rounds are over.",
            kind="stat",
            queries=(Query(f"time() - min(feddymem_release_timestamp_seconds{{{_OF}}} > 0)"),),
            unit="s",
            steps=((BLUE, 0),),
        ),
    ),
)

ROUNDS = Row(
    "Rounds",
    8,
    (
        Panel(
            title="Phase",
            description="Of each federation over time.",
            kind="state-timeline",
            queries=(Query(f"feddymem_federation_phase{{{_OF}}}", "{{federation}} {{phase}}"),),
            unit="none",
            texts=((0, "no", "transparent"), (1, "yes", BLUE)),
        ),
        Panel(
            title="Round",
            description="Number of the open round. Stands still for longer than the deadline: the quorum is missing.",
            queries=(_gauge("federation_round"),),
            unit="none",
        ),
        Panel(
            title="Banks of the open round",
            description="Those that count, and the quorum. Below it at the deadline is QuorumMissed; at it without a "
            "release RoundStuck.",
            queries=(
                _gauge("round_banks", "{{federation}} banks"),
                _gauge("round_quorum_banks", "{{federation}} quorum"),
            ),
            unit="none",
        ),
        Panel(
            title="Open round, share of its deadline",
            description="Time since the last round was opened, through `round_deadline_seconds`. Above 100 % it closes "
            "with its quorum.",
            queries=(
                Query(
                    f"(time() - feddymem_round_opened_timestamp_seconds{{{_OF}}}) / feddymem_round_deadline_seconds",
                    _NAME,
                ),
            ),
            unit="percentunit",
            steps=((GREEN, 0), (ORANGE, 1)),
        ),
    ),
)

BANKS = Row(
    "Banks",
    7,
    (
        Panel(
            title="Banks accepted and left out, an hour",
            description="Left out are those of closed rounds that were in quarantine.",
            queries=(
                _hourly("banks_accepted_total", "{{federation}} accepted"),
                _hourly("banks_quarantined_total", "{{federation}} left out"),
            ),
        ),
        Panel(
            title="Banks refused, an hour",
            description="late: lengthen the deadline. fingerprint: the site has another backbone or preprocessing. "
            "duplicate: two edge clients speak for one site. invalid: the site's log says what is wrong.",
            queries=(_hourly("banks_refused_total", "{{federation}} {{reason}}"),),
        ),
        Panel(
            title="Bytes in and out, an hour",
            description="Accepted banks as received, and releases as sent. Out that grows without releases: somebody "
            "downloads again and again.",
            queries=(
                _hourly("bank_received_bytes_total", "{{federation}} banks in"),
                Query(
                    f"increase(feddymem_published_bytes_total{{{_OF}}}[1h]) and on (job, instance) {_OURS}",
                    "{{federation}} releases out",
                ),
            ),
            unit="bytes",
        ),
    ),
)

AGGREGATION = Row(
    "Aggregation",
    7,
    (
        Panel(
            title="Mean duration of a round",
            description="From its opening to its release, of an hour. Near the deadline: a site is slow or gone.",
            queries=(_mean("round_duration_seconds"),),
            unit="s",
        ),
        Panel(
            title="Mean duration of an aggregation",
            description="Grows with sites times bank_items times memory_items.",
            queries=(_mean("aggregation_duration_seconds"),),
            unit="s",
        ),
        Panel(
            title="K-means inertia",
            description="Squared distances of the items to the global memory. Jumps between rounds of the same sites: "
            "the images of one have changed. 0 where all items had room.",
            queries=(_gauge("aggregation_inertia"),),
        ),
        Panel(
            title="K-means iterations and items of the global memory",
            description="Of the last aggregation.",
            queries=(
                _gauge("aggregation_iterations", "{{federation}} iterations"),
                _gauge("global_memory_items", "{{federation}} items"),
            ),
            unit="none",
        ),
    ),
)

SITES = Row(
    "Sites",
    8,
    (
        Panel(
            title="Sites present",
            description="Whose edge client is connected; the first 200 of a federation.",
            kind="state-timeline",
            queries=(_gauge("site_present", "{{federation}} {{site}}"),),
            unit="none",
            texts=((0, "silent", RED), (1, "present", GREEN)),
        ),
        Panel(
            title="Banks in quarantine",
            description="Whose last bank is left out as an outlier, until the next round or an operator's decision.",
            kind="state-timeline",
            queries=(_gauge("site_quarantined", "{{federation}} {{site}}"),),
            unit="none",
            texts=((0, "counts", GREEN), (1, "left out", ORANGE)),
        ),
        Panel(
            title="Sites known and present",
            description="All, those without a name here too. Fewer present than the quorum: rounds cannot close.",
            queries=(
                _gauge("sites_known", "{{federation}} known"),
                _gauge("sites_present", "{{federation}} present"),
            ),
            unit="none",
        ),
    ),
)

RELEASES = Row(
    "Releases",
    7,
    (
        Panel(
            title="Active release",
            description="Down: an operator has activated an earlier one.",
            queries=(_gauge("release_version"),),
            unit="none",
        ),
        Panel(
            title="Replicas that score with the active release",
            description="Of all inference replicas of the namespace that are scraped here. Less than all for longer "
            "than some seconds: ReleaseStale.",
            queries=(
                Query(
                    f"avg by (namespace, federation) (feddymem_serving_release_version{{{_OF}}}"
                    " == bool on (namespace, federation) group_left ()"
                    " max by (namespace, federation) (feddymem_release_version))",
                    "{{namespace}} {{federation}}",
                ),
            ),
            unit="percentunit",
            maximum=1,
        ),
        Panel(
            title="Releases withheld",
            description="Whether the newest release of a federation has failed a check and is not active: "
            "`feddymem release show` says which check, and what was found.",
            kind="stat",
            queries=(_gauge("release_withheld"),),
            unit="none",
            steps=NOTHING_OR_ODD,
        ),
        Panel(
            title="Calibrations and failed checks",
            description="In an hour. Each site that has a bank in a release sends one calibration of it; a check that "
            "fails keeps the release from being active.",
            queries=(
                _hourly("calibrations_accepted_total", "{{federation}} calibrations"),
                _hourly("release_checks_failed_total", "{{federation}} {{check}} failed"),
            ),
            unit="none",
        ),
        Panel(
            title="Versions of the program",
            description="Processes of each. Several for longer than a rollout: it is stuck.",
            kind="stat",
            queries=(Query(f"count by (version) (feddymem_build_info{{{OF_NAMESPACE}}})", "{{version}}"),),
            unit="none",
            steps=((BLUE, 0),),
        ),
        Panel(
            title="Files found damaged",
            description="Of the aggregator's state folder, put in quarantine: look at the disk.",
            kind="stat",
            queries=(Query(f"feddymem_damaged_files_total{{{OF_NAMESPACE}}} and on (job, instance) {_OURS}", PROCESS),),
            unit="none",
            steps=NOTHING_OR_SOME,
        ),
    ),
)

DASHBOARD = Dashboard(
    name="federation",
    title="FedDyMem / Federation",
    description="Do rounds go on, and does every site take part?",
    variables=(NAMESPACE, Variable("federation", "Federation", _OURS, "federation")),
    rows=(HEALTH, ROUNDS, BANKS, AGGREGATION, SITES, RELEASES, *processes(OF_NAMESPACE, _OURS)),
)
