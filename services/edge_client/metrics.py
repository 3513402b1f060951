"""What the edge client counts; docs/metrics.md explains each."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

IMAGES = Gauge("feddymem_edge_images", "Image files in the folder, by outcome: read or skipped.", ["outcome"])
EXTRACTED = Counter("feddymem_edge_images_extracted_total", "Images that features were extracted of.")
FEATURE_SECONDS = Gauge("feddymem_edge_extraction_seconds", "Time that the last feature extraction took.")
UPDATE_SECONDS = Histogram(
    "feddymem_edge_local_update_duration_seconds",
    "Time of a round's local update.",
    buckets=(0.5, 1, 5, 15, 60, 300, 900, 3600),
)
LOSS = Gauge("feddymem_edge_generator_loss", "Mean metric loss of the last round's training, in squared radii.")
BANK_ITEMS = Gauge("feddymem_edge_bank_items", "Items of the last reduced bank.")
SENT_BYTES = Counter("feddymem_edge_sent_bytes_total", "Bytes of bank uploads sent to the aggregator.")
ROUND = Gauge("feddymem_edge_round", "Last round that this site's bank was accepted in.")
RETRIES = Counter("feddymem_edge_retries_total", "Calls to the aggregator that were tried again.")
DISK_FULL = Counter("feddymem_edge_disk_full_total", "Times that something could not be written for want of room.")
