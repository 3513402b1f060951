"""What the aggregator counts; docs/metrics.md explains each."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from feddymem.release_checks import CHECKS
from feddymem.v1.federation_pb2 import Phase
from services.runtime.words import word_of

_LABELS = ["federation"]
_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
NAMED_SITES = 200
"""Sites of a federation that have series of their own, the first that are known; all are in the sums. Names come from
sites, where the settings have no list of them."""
_REFUSALS = ("late", "fingerprint", "duplicate", "invalid")

PHASE = Gauge("feddymem_federation_phase", "1 for the phase that the federation is in, else 0.", [*_LABELS, "phase"])
ROUND = Gauge("feddymem_federation_round", "Number of the open round.", _LABELS)
ROUND_OPENED = Gauge("feddymem_round_opened_timestamp_seconds", "When the last round was opened.", _LABELS)
ROUND_DEADLINE = Gauge("feddymem_round_deadline_seconds", "Setting round_deadline_seconds.", _LABELS)
ROUND_BANKS = Gauge(
    "feddymem_round_banks", "Banks that count of the open round, those in quarantine left out.", _LABELS
)
ROUND_QUORUM = Gauge("feddymem_round_quorum_banks", "Setting quorum.", _LABELS)
ROUND_SECONDS = Histogram(
    "feddymem_round_duration_seconds", "Time from opening a round to its release.", _LABELS, buckets=_SECONDS
)
AGGREGATION_SECONDS = Histogram(
    "feddymem_aggregation_duration_seconds", "Time to merge a round's banks.", _LABELS, buckets=_SECONDS
)
AGGREGATIONS_FAILED = Counter("feddymem_aggregations_failed_total", "Aggregations that failed.", _LABELS)
ITERATIONS = Gauge("feddymem_aggregation_iterations", "K-means iterations of the last aggregation.", _LABELS)
INERTIA = Gauge(
    "feddymem_aggregation_inertia",
    "Sum of squared distances of items to what the last aggregation merged them to, in units of the feature space.",
    _LABELS,
)
BANKS_ACCEPTED = Counter("feddymem_banks_accepted_total", "Banks accepted.", _LABELS)
BANKS_REFUSED = Counter("feddymem_banks_refused_total", "Banks refused, by reason.", [*_LABELS, "reason"])
BANKS_QUARANTINED = Counter("feddymem_banks_quarantined_total", "Banks of closed rounds left out as outliers.", _LABELS)
BANK_BYTES = Counter("feddymem_bank_received_bytes_total", "Bytes of accepted banks, as received.", _LABELS)
SITES_KNOWN = Gauge("feddymem_sites_known", "Sites that the federation expects to take part.", _LABELS)
SITES_PRESENT = Gauge("feddymem_sites_present", "Sites whose edge client is connected.", _LABELS)
SITE_PRESENT = Gauge("feddymem_site_present", "Whether a site's edge client is connected.", [*_LABELS, "site"])
SITE_QUARANTINED = Gauge("feddymem_site_quarantined", "Whether a site's last bank is left out.", [*_LABELS, "site"])
MEMORY_ITEMS = Gauge("feddymem_global_memory_items", "Items of the global memory.", _LABELS)
RELEASE = Gauge("feddymem_release_version", "Version of the active release.", _LABELS)
RELEASE_CREATED = Gauge("feddymem_release_timestamp_seconds", "When the newest release was made.", _LABELS)

RELEASE_WITHHELD = Gauge(
    "feddymem_release_withheld", "Whether the newest release has failed a check and is not active.", _LABELS
)
CHECKS_FAILED = Counter(
    "feddymem_release_checks_failed_total", "Checks that releases have failed.", [*_LABELS, "check"]
)
CALIBRATIONS_ACCEPTED = Counter("feddymem_calibrations_accepted_total", "Calibrations accepted.", _LABELS)


def show_settings(federation: str, quorum: int, deadline: float) -> None:
    """Shows what a federation's rounds are measured by, and all that is counted of it, so that the first is an
    increase."""
    ROUND_QUORUM.labels(federation).set(quorum)
    ROUND_DEADLINE.labels(federation).set(deadline)
    for metric in (
        *(AGGREGATIONS_FAILED, BANKS_ACCEPTED, CALIBRATIONS_ACCEPTED, BANKS_QUARANTINED, BANK_BYTES),
        *(ROUND_SECONDS, AGGREGATION_SECONDS),
    ):
        metric.labels(federation)
    for reason in _REFUSALS:
        BANKS_REFUSED.labels(federation, reason)
    for check in CHECKS:
        CHECKS_FAILED.labels(federation, check)


def show_phase(federation: str, phase: Phase.ValueType) -> None:
    """Shows where a federation stands."""
    for name, number in Phase.items()[1:]:
        PHASE.labels(federation, word_of(name)).set(number == phase)
