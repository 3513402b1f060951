"""What the edge client counts; docs/metrics.md explains each."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

IMAGES = Gauge(
    "feddymem_edge_images",
    "Image files in the folder and false alarms accepted, by outcome: read or skipped.",
    ["outcome"],
)
EXTRACTED = Counter("feddymem_edge_images_extracted_total", "Images that features were extracted of.")
FEATURES = Counter("feddymem_edge_features_total", "Patch features extracted.")
FEATURE_SECONDS = Counter("feddymem_edge_extraction_seconds_total", "Time that feature extractions took.")
UPDATE_SECONDS = Histogram(
    "feddymem_edge_local_update_duration_seconds",
    "Time of a round's local update.",
    buckets=(0.5, 1, 5, 15, 60, 300, 900, 3600),
)
LOSS = Gauge("feddymem_edge_generator_loss", "Mean metric loss of the last round's training, in squared radii.")
BANK_ITEMS = Gauge("feddymem_edge_bank_items", "Items of the last reduced bank.")
REDUCE_RATIO = Gauge(
    "feddymem_edge_memory_reduce_ratio", "Items of the last reduced bank, divided by the patches that it was made of."
)
HELD_OUT = Gauge("feddymem_edge_held_out_images", "Images held out of the last bank, to calibrate releases.")
CALIBRATION_SECONDS = Histogram(
    "feddymem_edge_calibration_duration_seconds",
    "Time to score the held-out images with a round's candidate and base.",
    buckets=(0.5, 1, 5, 15, 60, 300, 900, 3600),
)
SENT_BYTES = Counter("feddymem_edge_sent_bytes_total", "Bytes of bank uploads sent to the aggregator.")
ROUND = Gauge("feddymem_edge_round", "Last round that this site's bank was accepted in.")
RETRIES = Counter("feddymem_edge_retries_total", "Calls to the aggregator that were tried again.")
UPLOAD_RETRIES = Counter("feddymem_edge_upload_retries_total", "Uploads that were interrupted, and tried again.")
DISK_FULL = Counter("feddymem_edge_disk_full_total", "Times that something could not be written for want of room.")
FEEDBACK = Counter("feddymem_edge_feedback_total", "Feedback that was kept, by opinion.", ["opinion"])
FEEDBACK_IMAGES = Gauge(
    "feddymem_edge_feedback_images",
    "Images kept with what was said of them: false alarms undecided or accepted, bad parts, and rejected ones.",
    ["state"],
)
FEEDBACK_BYTES = Gauge("feddymem_edge_feedback_bytes", "Size of those images.")
