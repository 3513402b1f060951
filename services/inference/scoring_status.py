"""What scores now, and how: the answer to GetInspectionStatus."""

from __future__ import annotations

from collections.abc import Iterable

from feddymem.v1.inspection_pb2 import ScoringStatus
from services.inference.active import Active
from services.inference.lines import Line


def scoring(active: Iterable[Active], federation: str) -> list[ScoringStatus]:
    """The state of every line that has sent images, and of releases that have had none yet.

    Args:
        active: what scores.
        federation: only of this one; empty for all.
    """
    wanted = [each for each in active if federation in ("", each.federation)]
    of_lines = {id(each.lines): each for each in wanted}.values()
    states = [_of_line(each, line) for each in of_lines for line in each.lines.all()]
    seen = {(state.federation, state.site) for state in states}
    states += [_of_none(each) for each in wanted if (each.federation, each.site) not in seen and not each.lines.all()]
    return sorted(states, key=lambda state: (state.federation, state.site))


def _of_line(active: Active, line: Line) -> ScoringStatus:
    status = line.status()
    status.federation, status.release = active.federation, active.release
    shadow = active.lines.shadow
    if shadow is not None:
        counts = shadow.counts(line.site)
        status.shadow, status.shadow_images = shadow.release, counts.total()
        status.shadow_only_alarms, status.shadow_missing_alarms = counts["shadow_only"], counts["active_only"]
    return status


def _of_none(active: Active) -> ScoringStatus:
    shadow = active.lines.shadow
    return ScoringStatus(
        federation=active.federation,
        site=active.site,
        release=active.release,
        shadow=0 if shadow is None else shadow.release,
    )
