"""A release at work: what an inspection is scored by, from its first step to its last, whatever is swapped."""

from __future__ import annotations

from dataclasses import dataclass

from feddymem.scoring import Scorer
from feddymem.verdicts import SiteLimits
from services.inference.lines import Line, Lines


@dataclass(frozen=True, eq=False)
class Active:
    """What scores the images of one site now.

    Attributes:
        federation: name of the federation.
        site: name of the site; empty where the release needs no memory generator.
        release: version of the release.
        created: when it was made, in nanoseconds since the epoch; tells it from another one of this version, made by
            an aggregator that has lost its disk.
        scorer: global memory and memory generator, ready to compute.
        lines: who has images scored by it, and what its scores mean to them; one for all sites of the release.
    """

    federation: str
    site: str
    release: int
    created: int
    scorer: Scorer
    lines: Lines

    def limits(self, site: str, rate: float | None = None) -> SiteLimits | None:
        """What tells normal from anomalous; None where the release has no calibration, or no site has held images out.

        Args:
            site: that a request names; may be empty.
            rate: false-alarm rate wanted; None for the federation's.
        """
        return None if self.lines.limits is None else self.lines.limits.of(site or self.site, rate)

    def line(self, site: str) -> Line | None:
        """The line whose image a request is about; None where it is not watched."""
        return self.lines.of(site or self.site, known=bool(self.site))
