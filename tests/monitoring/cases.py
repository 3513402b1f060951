"""When each alert must fire, and when it must not: series as promtool's unit tests have them."""

from __future__ import annotations

from dataclasses import dataclass, field

TARGET = ("job", "instance", "namespace", "pod", "app_kubernetes_io_component", "app_kubernetes_io_instance")
"""Labels of a target, where its scrape has them."""
SERVICE = ("job", "namespace", "app_kubernetes_io_instance")

Series = dict[str, str]
"""Values by metric and labels, one each `MINUTES` of the alert; a name that begins with `2:` is of a second replica,
one with `A:` of an aggregator."""


@dataclass(frozen=True)
class Case:
    """One alert at one moment.

    Attributes:
        alert: its name.
        series: what there is.
        at: when.
        summary: what it says then, with WHO for the target's name and SERVICE for the service's; None where it must be
            silent.
        labels: that it has beside those of the target.
        target: those that it has of the target.
        replica: which one it is of.
        why: the case, in words.
    """

    alert: str
    why: str
    series: Series
    at: str
    summary: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    target: tuple[str, ...] = TARGET
    replica: int = 1


def _inspections(slow: str, all_of_them: str) -> Series:
    """Inspections within the objective, and all, as counters."""
    return {
        'feddymem_inspection_duration_seconds_bucket{le="0.25"}': slow,
        "feddymem_inspection_duration_seconds_count": all_of_them,
        'feddymem_inspections_total{outcome="ok"}': all_of_them,
    }


def _outcomes(bad: str, rate: str, ok: str = "0+60x4320") -> Series:
    return {f'feddymem_inspections_total{{outcome="{bad}"}}': rate, 'feddymem_inspections_total{outcome="ok"}': ok}


def _verdicts(normal: str, anomalous: str) -> Series:
    return {
        'feddymem_verdicts_total{federation="parts",verdict="normal"}': normal,
        'feddymem_verdicts_total{federation="parts",verdict="anomalous"}': anomalous,
    }


def _scores(total: str, count: str) -> Series:
    return {
        'feddymem_inspection_score_ratio_sum{federation="parts"}': total,
        'feddymem_inspection_score_ratio_count{federation="parts"}': count,
    }


def _round(opened: str = "0x200", banks: str = "2x200", phase: str = "open", release: str = "1x200") -> Series:
    """A round with a deadline of an hour and a quorum of two."""
    phases = {
        f'feddymem_federation_phase{{federation="parts",phase="{each}"}}': f"{int(each == phase)}x200"
        for each in ("waiting", "open", "aggregating", "calibrating", "done")
    }
    return phases | {
        'feddymem_round_opened_timestamp_seconds{federation="parts"}': opened,
        'feddymem_round_deadline_seconds{federation="parts"}': "3600x200",
        'feddymem_round_banks{federation="parts"}': banks,
        'feddymem_round_quorum_banks{federation="parts"}': "2x200",
        'feddymem_release_version{federation="parts"}': release,
        'feddymem_aggregations_failed_total{federation="parts"}': "0x200",
    }


def _serving(first: str, second: str, aggregator: str | None = None) -> Series:
    series = {
        'feddymem_serving_release_version{federation="parts"}': first,
        '2:feddymem_serving_release_version{federation="parts"}': second,
    }
    return series if aggregator is None else series | {'A:feddymem_release_version{federation="parts"}': aggregator}


def _memory(values: str, began: str = "0x180") -> Series:
    return {
        "process_resident_memory_bytes": values,
        "process_start_time_seconds": began,
        'feddymem_build_info{version="1"}': "1x180",
    }


_PARTS = {"federation": "parts"}
_SITE = {"federation": "parts", "site": "b"}
_PRESENT, _QUARANTINED = (f'feddymem_site_{what}{{federation="parts",site="b"}}' for what in ("present", "quarantined"))
_DRIFT = 'feddymem_drift{federation="parts",site="b"}'
_BAND = {'feddymem_alarm_rate_highest_ratio{federation="parts"}': "0.15x120"}
_EXPIRY = "feddymem_certificate_expiry_timestamp_seconds"
_CONNECTED = 'feddymem_publishers_connected{role="aggregator"}'
_DAY = 86_400

MINUTES = {"InspectionLatencyBudget": 10, "ScoreDrift": 5, "MemoryClimbing": 5}
"""Between two values, and two evaluations, of alerts that look back for long; of all others, one."""

CASES = [
    Case(
        "InspectionErrors",
        "two of a hundred fail",
        _outcomes("failed", "0+2x60", "0+98x60"),
        "20m",
        "2% of the inspections of SERVICE fail",
        target=SERVICE,
    ),
    Case("InspectionErrors", "one failed, once", _outcomes("failed", "0x9 1x50"), "14m"),
    Case("InspectionErrors", "many images that cannot be read", _outcomes("invalid", "0+60x60"), "20m"),
    Case(
        "InspectionLatency",
        "a fifth is slow, for an hour",
        _inspections("0+8x120", "0+10x120"),
        "90m",
        "20% of the inspections of SERVICE take longer than 0.25 s",
        target=SERVICE,
    ),
    Case(
        "InspectionLatency",
        "a tenth is slow, for six hours",
        _inspections("0+9x400", "0+10x400"),
        "390m",
        "10% of the inspections of SERVICE take longer than 0.25 s",
        target=SERVICE,
    ),
    Case("InspectionLatency", "it was slow, and is over", _inspections("0+8x60 490+10x60", "0+10x120"), "100m"),
    Case("InspectionLatency", "it was, for half of an hour", _inspections("0+5x60 310+10x60", "0+10x120"), "95m"),
    Case("InspectionLatency", "hardly any images", _inspections("0x120", "0+0.5x120"), "90m"),
    Case(
        "InspectionLatencyBudget",
        "two of a hundred are slow, for days",
        _inspections("0+980x440", "0+1000x440"),
        "72h",
        "2% of the inspections of SERVICE took longer than 0.25 s in three days",
        target=SERVICE,
    ),
    Case("InspectionLatencyBudget", "five of a thousand are", _inspections("0+9950x440", "0+10000x440"), "72h"),
    Case(
        "LoadRefused",
        "every tenth image",
        _outcomes("rejected", "0+10x60", "0+90x60"),
        "20m",
        "SERVICE refuses 10% of its images",
        target=SERVICE,
    ),
    Case("LoadRefused", "for two minutes", _outcomes("rejected", "0x10 30 60x60"), "14m"),
    Case(
        "AlarmRateOutOfBand",
        "half of all",
        _verdicts("0+5x120", "0+5x120") | _BAND,
        "90m",
        "SERVICE finds 50% of the images of parts anomalous",
        labels=_PARTS,
        target=SERVICE,
    ),
    Case("AlarmRateOutOfBand", "every tenth", _verdicts("0+9x120", "0+1x120") | _BAND, "90m"),
    Case("AlarmRateOutOfBand", "half of few", _verdicts("0+0.5x120", "0+0.5x120") | _BAND, "90m"),
    Case("AlarmRateOutOfBand", "without a calibration", _verdicts("0+5x120", "0+5x120"), "90m"),
    Case(
        "Drift",
        "at one of two replicas",
        {_DRIFT: "0x10 1x60", f"2:{_DRIFT}": "0x70"},
        "20m",
        "images of parts from site b are scored unlike those held out",
        labels=_SITE,
        target=SERVICE,
    ),
    Case(
        "Drift",
        "of a site that is not named",
        {'feddymem_drift{federation="parts",site=""}': "1x60"},
        "20m",
        "images of parts from site that is not named are scored unlike those held out",
        labels=_PARTS,
        target=SERVICE,
    ),
    Case("Drift", "nobody's", {_DRIFT: "0x60"}, "20m"),
    Case("Drift", "it was, and is over", {_DRIFT: "1x4 0x60"}, "20m"),
    Case(
        "ScoreDrift",
        "scores of 1.8 after a day of 1.5",
        _scores("0+75x300 22590+90x40", "0+50x340"),
        "1560m",
        "scores of parts at SERVICE are 20% off those of the day before",
        labels=_PARTS,
        target=SERVICE,
    ),
    Case(
        "ScoreDrift",
        "scores of 1.2 after a day of 1.5",
        _scores("0+75x300 22560+60x40", "0+50x340"),
        "1560m",
        "scores of parts at SERVICE are 20% off those of the day before",
        labels=_PARTS,
        target=SERVICE,
    ),
    Case("ScoreDrift", "scores of 1.6 after 1.5", _scores("0+75x300 22580+80x40", "0+50x340"), "1560m"),
    Case("ScoreDrift", "few images", _scores("0+7.5x300 2259+9x40", "0+5x340"), "1560m"),
    Case(
        "ScoreDrift",
        "few images the day before",
        _scores("0x290 15+15x9 240+90x40", "0x290 10+10x9 150+50x40"),
        "1560m",
    ),
    Case("ScoreDrift", "the first hours of a line", _scores("0x4 0+75x4 390+90x12", "0x4 0+50x16"), "80m"),
    Case(
        "InferenceNotReady",
        "for a quarter of an hour",
        {"feddymem_ready": "0x60", "feddymem_inspections_waiting": "0x60"},
        "15m",
        "WHO has nothing to score with",
    ),
    Case(
        "InferenceNotReady",
        "it starts",
        {"feddymem_ready": "0x5 1x60", "feddymem_inspections_waiting": "0x60"},
        "15m",
    ),
    Case("InferenceNotReady", "an edge client, which extracts features", {"feddymem_ready": "0x60"}, "15m"),
    Case(
        "InferenceDown",
        "both replicas",
        {
            **{f"{n}up": "1x10 0x60" for n in ("", "2:")},
            **{f"{n}feddymem_inspections_waiting": "0x10" for n in ("", "2:")},
        },
        "15m",
        "no replica of SERVICE answers",
        target=SERVICE,
    ),
    Case(
        "InferenceDown",
        "one of two",
        {
            "up": "1x10 0x60",
            "2:up": "1x70",
            "feddymem_inspections_waiting": "0x10",
            "2:feddymem_inspections_waiting": "0x70",
        },
        "15m",
    ),
    Case(
        "ServiceDown",
        "for ten minutes",
        {"up": "1x10 0x60", 'feddymem_build_info{version="1"}': "1x10"},
        "20m",
        "WHO does not answer",
    ),
    Case("ServiceDown", "something that is not ours", {"up": "0x60"}, "20m"),
    Case("ServiceDown", "it answers", {"up": "1x60", 'feddymem_build_info{version="1"}': "1x60"}, "20m"),
    Case(
        "ReplicaBehind",
        "one of two",
        _serving("4x60", "3x60"),
        "20m",
        "WHO scores parts with release 3, which is older than that of other replicas",
        labels=_PARTS,
        replica=2,
    ),
    Case("ReplicaBehind", "one is a minute later", _serving("3x10 4x60", "3x11 4x60"), "15m"),
    Case(
        "ReleaseStale",
        "one of two has missed a release",
        _serving("4x60", "3x60", "4x60"),
        "20m",
        "WHO scores parts with release 3, which is not the aggregator's active one",
        labels=_PARTS,
        replica=2,
    ),
    Case(
        "ReleaseStale",
        "one of two has missed a rollback",
        _serving("3x60", "4x60", "3x60"),
        "20m",
        "WHO scores parts with release 4, which is not the aggregator's active one",
        labels=_PARTS,
        replica=2,
    ),
    Case("ReleaseStale", "both have the active one", _serving("3x60", "3x60", "3x60"), "20m"),
    Case("ReleaseStale", "the aggregator is elsewhere", _serving("3x60", "3x60"), "20m"),
    Case(
        "AggregatorUnreachable",
        "for half an hour",
        {_CONNECTED: "0x60"},
        "30m",
        "WHO has no connection to its aggregator, and gets no releases",
        labels={"role": "aggregator"},
    ),
    Case("AggregatorUnreachable", "for five minutes, again and again", {_CONNECTED: "1x5 0x4 1x5 0x4 1x20"}, "30m"),
    Case(
        "SiteSilent",
        "for an hour",
        {**_round(), _PRESENT: "0x60"},
        "1h",
        "site b of parts is silent",
        labels=_SITE,
    ),
    Case("SiteSilent", "the federation is done", {**_round(phase="done"), _PRESENT: "0x60"}, "1h"),
    Case("SiteSilent", "it has come back", {**_round(), _PRESENT: "0x20 1x60"}, "1h"),
    Case(
        "QuorumMissed",
        "one bank of two, behind the deadline",
        _round(banks="1x200"),
        "70m",
        "a round of parts has not got its quorum",
        labels=_PARTS,
    ),
    Case(
        "QuorumMissed",
        "a site was removed",
        _round(phase="waiting"),
        "20m",
        "a round of parts has not got its quorum",
        labels=_PARTS,
    ),
    Case("QuorumMissed", "before the deadline", _round(banks="1x200"), "50m"),
    Case("QuorumMissed", "sites have not joined yet", _round(phase="waiting", release="0x200"), "70m"),
    Case("QuorumMissed", "all rounds are over", _round(banks="1x200", phase="done"), "70m"),
    Case(
        "RoundStuck",
        "no release of enough banks",
        _round(phase="aggregating"),
        "80m",
        "a round of parts has its banks, and no release comes of it",
        labels=_PARTS,
    ),
    Case(
        "RoundStuck",
        "its aggregation fails",
        {**_round(), 'feddymem_aggregations_failed_total{federation="parts"}': "0x5 0+6x60"},
        "20m",
        "a round of parts has its banks, and no release comes of it",
        labels=_PARTS,
    ),
    Case("RoundStuck", "it aggregates at the deadline", _round(phase="aggregating"), "70m"),
    Case("RoundStuck", "the quorum is missing", _round(banks="1x200"), "80m"),
    Case("RoundStuck", "all rounds are over", _round(phase="done"), "80m"),
    Case(
        "BankQuarantined",
        "one site's",
        {_QUARANTINED: "0x10 1x60"},
        "20m",
        "the bank of site b of parts is left out as an outlier",
        labels=_SITE,
    ),
    Case("BankQuarantined", "nobody's", {_QUARANTINED: "0x60"}, "20m"),
    Case(
        "ReleaseFailedChecks",
        "the newest one",
        {'feddymem_release_withheld{federation="parts"}': "0x10 1x60"},
        "20m",
        "the newest release of parts has failed a check and is not active",
        labels=_PARTS,
    ),
    Case("ReleaseFailedChecks", "none", {'feddymem_release_withheld{federation="parts"}': "0x60"}, "20m"),
    Case(
        "CertificateNearExpiry",
        "in three days",
        {_EXPIRY: f"{3 * _DAY + 7200}x200"},
        "2h",
        "the certificate of WHO expires in 3d 0h 0m 0s",
    ),
    Case("CertificateNearExpiry", "in eight days", {_EXPIRY: f"{8 * _DAY}x200"}, "2h"),
    Case("CertificateNearExpiry", "there is no TLS", {_EXPIRY: "0x200"}, "2h"),
    Case(
        "CertificateExpiring",
        "in six hours",
        {_EXPIRY: f"{8 * 3600}x200"},
        "2h",
        "the certificate of WHO expires in 6h 0m 0s",
    ),
    Case("CertificateExpiring", "in three days", {_EXPIRY: f"{3 * _DAY}x200"}, "2h"),
    Case("CertificateExpiring", "there is no TLS", {_EXPIRY: "0x200"}, "2h"),
    Case(
        "DiskNearFull",
        "a twentieth is free",
        {"feddymem_state_free_bytes": "5x60", "feddymem_state_size_bytes": "100x60"},
        "30m",
        "5% of the disk of WHO are free",
    ),
    Case(
        "DiskNearFull",
        "a fifth is free",
        {"feddymem_state_free_bytes": "20x60", "feddymem_state_size_bytes": "100x60"},
        "30m",
    ),
    Case(
        "MemoryClimbing",
        "10 % more each hour",
        _memory("1000+8.5x180"),
        "14h",
        "WHO takes 2.271kiB of memory, a quarter more than six hours ago, and does not give it back",
    ),
    Case("MemoryClimbing", "it goes up and down", _memory("1000x20 2000x20 1000x20 2000x9 1000x100"), "14h"),
    Case("MemoryClimbing", "it has just started", _memory("1000+8.5x180", "36000x180"), "14h"),
    Case(
        "MemoryClimbing",
        "somebody else's",
        {name: values for name, values in _memory("1000+8.5x180").items() if not name.startswith("feddymem")},
        "14h",
    ),
]
