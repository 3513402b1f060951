"""What each production line has been told by the release that scores it now: alarms, drift, and what a shadow says."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from typing import Literal

from feddymem.calibration import Limit
from feddymem.drift import DriftTest
from feddymem.scoring import Scorer
from feddymem.v1.inspection_pb2 import Guarantee, ScoringStatus
from feddymem.verdicts import ReleaseLimits, SiteLimits
from services.inference import metrics
from services.runtime.logs import get_logger

_RECENT = 1_000
"""Last images of a line whose alarms are counted."""
_BAND_IMAGES = 100
"""Verdicts of an hour from which on AlarmRateOutOfBand looks at them."""

Agreement = Literal["same", "shadow_only", "active_only"]

_log = get_logger()


def guarantee(limit: Limit) -> Guarantee:
    """The message that says what a limit guarantees."""
    return Guarantee(false_alarm_rate=limit.rate, images=limit.images, own_site=limit.basis == "site")


class Shadow:
    """A release that scores beside the active one, and is only counted.

    Args:
        federation: its name.
        release: its version.
        scorers: of each site; by the empty name where it needs no memory generators.
        limits: of its calibration; None without one: then it has no verdicts, and nothing is counted.

    Attributes:
        scorers: as above; others when a memory generator has come, while what is counted stays.
    """

    def __init__(
        self, federation: str, release: int, scorers: Mapping[str, Scorer], limits: ReleaseLimits | None
    ) -> None:
        self.federation, self.release, self.limits = federation, release, limits
        self.scorers = scorers
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Agreement]] = {}
        self._failed = False

    def scorer(self, site: str) -> Scorer | None:
        """What scores a site's images; None where it has no memory generator of the site."""
        scorers = self.scorers
        return scorers.get(site) or scorers.get("")

    def count(self, line: str, alarm: bool, active_alarm: bool) -> None:
        """Counts an image that both have judged."""
        agreement: Agreement = "same" if alarm == active_alarm else "shadow_only" if alarm else "active_only"
        metrics.of_shadow(self.federation, agreement).inc()
        metrics.SHADOWED["judged"].inc()
        with self._lock:
            self._counts.setdefault(line, Counter())[agreement] += 1

    def counts(self, line: str) -> Counter[Agreement]:
        """Images of a line that both have judged, by whether they agree."""
        with self._lock:
            return Counter(self._counts.get(line, Counter()))

    def fail(self, error: Exception) -> None:
        """Notes that an image could not be judged; no caller is to notice. Logged once: it would be for each image."""
        metrics.SHADOWED["failed"].inc()
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            _log.error("shadow_failed", federation=self.federation, release=self.release, exc_info=error)


class Line:
    """The images of one site since the release came, or this service started.

    Args:
        federation: its name.
        site: its name; empty for all that are taken together.
        limits: at the federation's false-alarm rate; None without a calibration.
        shown: its metrics.
    """

    def __init__(self, federation: str, site: str, limits: SiteLimits | None, shown: metrics.OfLine) -> None:
        self.site, self.limits = site, limits
        self._federation = federation
        self._shown, self._lock = shown, threading.Lock()
        self._images = self._alarms = 0
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._drift = None if limits is None else DriftTest(limits.scores)
        shown.drift.set(0)

    def note(self, score: float) -> None:
        """Takes an image's score into account."""
        with self._lock:
            self._images += 1
            if self.limits is None or self._drift is None:
                return
            if len(self._recent) == _RECENT:
                self._alarms -= self._recent[0]
            self._recent.append(score >= self.limits.scores.threshold)
            self._alarms += self._recent[-1]
            before = self._drift.found
            self._drift.add(score)
            if self._drift.found != before:
                self._shown.drift.set(self._drift.found)
                what = "drift_found" if self._drift.found else "drift_over"
                _log.warning(what, federation=self._federation, site=self.site, images=self._images)

    def leave(self) -> None:
        """Another release takes the place of the one that scored."""
        with self._lock:
            self._shown.drift.set(0)

    def status(self) -> ScoringStatus:
        """What is known, but for what the line does not know."""
        with self._lock:
            scores = None if self.limits is None else self.limits.scores
            return ScoringStatus(
                site=self.site,
                threshold=None if scores is None else scores.threshold,
                guarantee=None if scores is None else guarantee(scores),
                images=self._images,
                recent_images=len(self._recent),
                recent_alarms=self._alarms,
                drift=self._drift is not None and self._drift.found,
                images_since_drift=0 if self._drift is None else self._drift.images_since,
            )


class Lines:
    """The lines of one federation with one release.

    Args:
        federation: its name.
        limits: of the release's calibration; None without one.

    Attributes:
        shadow: release that is counted beside it; None for none.
    """

    def __init__(self, federation: str, limits: ReleaseLimits | None) -> None:
        self.federation, self.limits = federation, limits
        self.shadow: Shadow | None = None
        self._lines: dict[str, Line] = {}
        self._lock = threading.Lock()
        self._highest_rate = 0.0

    def of(self, site: str, known: bool) -> Line | None:
        """The line of a site; None where as many as may be are watched already.

        Args:
            site: as the request names it.
            known: whether that is more than a caller's word. Else sites that the release is not calibrated for are one.
        """
        name = site if known or (self.limits is not None and self.limits.knows(site)) else ""
        return self._lines.get(name) or self._open(name)

    def all(self) -> list[Line]:
        """Those that are watched, by name."""
        return [self._lines[name] for name in sorted(self._lines.copy())]

    def leave(self) -> None:
        """Another release takes the place of this one."""
        metrics.forget_highest_rate(self.federation)
        for line in self.all():
            line.leave()

    def _open(self, name: str) -> Line | None:
        shown = metrics.of_line(self.federation, name)
        if shown is None:
            return None
        with self._lock:
            if name not in self._lines:
                limits = None if self.limits is None else self.limits.of(name)
                self._lines[name] = Line(self.federation, name, limits, shown)
                if limits is not None:
                    self._highest_rate = max(self._highest_rate, limits.scores.highest_rate(_BAND_IMAGES))
                    metrics.HIGHEST_RATE.labels(self.federation).set(self._highest_rate)
            return self._lines[name]
