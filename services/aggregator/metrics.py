"""What the aggregator counts; docs/metrics.md explains each."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LABELS = ["federation"]
_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)

ROUND = Gauge("feddymem_federation_round", "Number of the open round.", _LABELS)
ROUND_SECONDS = Histogram(
    "feddymem_round_duration_seconds", "Time from opening a round to its release.", _LABELS, buckets=_SECONDS
)
AGGREGATION_SECONDS = Histogram(
    "feddymem_aggregation_duration_seconds", "Time to merge a round's banks.", _LABELS, buckets=_SECONDS
)
AGGREGATIONS_FAILED = Counter("feddymem_aggregations_failed_total", "Aggregations that failed.", _LABELS)
BANKS_ACCEPTED = Counter("feddymem_banks_accepted_total", "Banks accepted.", _LABELS)
BANKS_REFUSED = Counter("feddymem_banks_refused_total", "Banks refused, by reason.", [*_LABELS, "reason"])
BANKS_QUARANTINED = Counter("feddymem_banks_quarantined_total", "Banks of closed rounds left out as outliers.", _LABELS)
BANK_BYTES = Counter("feddymem_bank_received_bytes_total", "Bytes of accepted banks, as received.", _LABELS)
SITES_PRESENT = Gauge("feddymem_sites_present", "Sites whose edge client is connected.", _LABELS)
MEMORY_ITEMS = Gauge("feddymem_global_memory_items", "Items of the global memory.", _LABELS)
RELEASE = Gauge("feddymem_release_version", "Version of the active release.", _LABELS)
