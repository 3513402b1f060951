"""The sites of one federation: who may take part, who has joined, who is there."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from feddymem.names import NAME_PATTERN, NAME_RULE
from feddymem.v1.federation_pb2 import JoinRequest
from feddymem.v1.operator_pb2 import STANDING_ADMITTED, STANDING_BANNED, STANDING_JUDGED, Standing
from services.aggregator import metrics
from services.aggregator.settings import MAX_SITES, FederationSettings
from services.aggregator.state import PastBank, Site, State
from services.runtime.errors import Refusal, exists, invalid, not_found, precondition
from services.runtime.identity import denied
from services.runtime.messages import feature_space_from_message

_MAX_IMAGES = 10**9


@dataclass(frozen=True, eq=False)
class Presence:
    """A site's edge client is connected.

    Attributes:
        site: name of the site.
        instance: the edge client that speaks for it.
    """

    site: str
    instance: str


class Members:
    """Keeps the sites of a federation. Presence is known to this process only; everything else is on disk, and read
    from there once: with a thousand sites, all of it is asked for with each bank that comes."""

    def __init__(self, name: str, settings: FederationSettings, state: State) -> None:
        self._name, self._settings, self._state = name, settings, state
        self._instances = {site.name: site.instance for site in state.sites(name).values()}
        self._standings, self._removed = state.standings(name), state.removed(name)
        self._present: dict[str, Presence] = {}
        # Whether a site that was there before a restart comes back is not known yet.
        self._left = dict.fromkeys(self.joined, time.monotonic())
        self._quarantined = {site for site in self._instances if _is_quarantined(state.last_banks(name, site))}
        self._named: set[str] = set()
        for site in sorted({*settings.sites, *self._instances}):
            self._show(site)
        self._show_known()
        metrics.SITES_PRESENT.labels(name).set(0)

    @property
    def joined(self) -> list[str]:
        """Sites that have joined, are on the list and not banned."""
        return [site for site in self._instances if self.counts(site)]

    @property
    def expected(self) -> list[str]:
        """Sites that are to take part: those on the list or, where there is none, all that have joined."""
        return [site for site in self._settings.sites or self._instances if self._expects(site)]

    def listed(self, site: str) -> bool:
        """Whether a site is one of the federation's."""
        return not self._settings.sites or site in self._settings.sites

    def counts(self, site: str) -> bool:
        """Whether a site may take part."""
        return self.listed(site) and self.standing(site) != STANDING_BANNED

    def admitted(self, site: str) -> bool:
        """Whether a site's banks count whatever those of others are like."""
        return self.standing(site) == STANDING_ADMITTED

    def standing(self, site: str) -> Standing.ValueType:
        """How a site's banks are treated."""
        return self._standings.get(site, STANDING_JUDGED)

    def present(self, site: str) -> bool:
        """Whether a site's edge client is connected."""
        return site in self._present

    def join(self, request: JoinRequest) -> None:
        """A site joins; see federation.proto."""
        self._require_counts(request.site)
        for what, value in (("site", request.site), ("instance", request.instance)):
            if not re.fullmatch(NAME_PATTERN, value):
                raise invalid(f"{what} {value!r} must be {NAME_RULE}")
        self._check_alone(request.site, request.instance)
        check_images(request.images)
        self._require_room_for(request.site)
        space = feature_space_from_message(request.feature_space)
        known = self._state.feature_space(self._name)
        if known is not None and self._is_used(request.site):
            ours = feature_space_from_message(known)
            ours.require_same(space, f"federation {self._name!r}", f"site {request.site!r}")
        elif known != request.feature_space:
            self._state.set_feature_space(self._name, request.feature_space)
        self._state.put_site(self._name, Site(request.site, request.instance, request.images))
        self._instances[request.site] = request.instance
        self._removed.discard(request.site)
        self._left.setdefault(request.site, time.monotonic())
        self._show(request.site)
        self._show_known()

    def require_joined(self, site: str, instance: str) -> None:
        """Checks that an edge client speaks for a site that has joined.

        Raises:
            Refusal: FAILED_PRECONDITION if not; NOT_FOUND or PERMISSION_DENIED where the site may not take part any
                more.
        """
        self._require_counts(site)
        if self._instances.get(site) != instance:
            raise precondition(
                f"site {site!r} has not joined federation {self._name!r} with this edge client; call Join first"
            )

    @contextmanager
    def presence(self, site: str, instance: str) -> Iterator[Presence]:
        """The site counts as present inside the block, or until another one of the same edge client begins."""
        self.require_joined(site, instance)
        self._check_alone(site, instance)
        presence = self._present[site] = Presence(site, instance)
        self._left.pop(site, None)
        metrics.SITES_PRESENT.labels(self._name).set(len(self._present))
        self._show(site)
        try:
            yield presence
        finally:
            if self._present.get(site) is presence:
                self._leave(site)

    def require_present(self, presence: Presence) -> None:
        """Checks that a presence goes on, and may.

        Raises:
            Refusal: UNAVAILABLE where the site was called back or has begun another one; as `require_joined`.
        """
        self.require_joined(presence.site, presence.instance)
        if self._present.get(presence.site) is not presence:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "this watch is over; call Join and watch the rounds again")

    def call_back(self, site: str) -> None:
        """Ends a site's presence, so that its edge client begins anew and looks what is wanted of it."""
        if site in self._present:
            self._leave(site)

    def waited_for(self) -> dict[str, float]:
        """Sites whose banks a round waits for, and how much longer, in seconds, for each of them.

        For one that is there, or has not come yet, for as long as the round; for one that has gone, `grace_seconds`.
        """
        now, names = time.monotonic(), self.expected
        ends = {site: self._left[site] + self._settings.grace_seconds - now for site in names if site in self._left}
        return {site: ends.get(site, float("inf")) for site in names if ends.get(site, 1) > 0}

    def set_standing(self, site: str, standing: Standing.ValueType) -> None:
        """See operator.proto."""
        if not re.fullmatch(NAME_PATTERN, site):
            raise invalid(f"site {site!r} must be {NAME_RULE}")
        if standing not in Standing.values()[1:]:
            raise invalid(f"standing is {standing}; expected JUDGED (1), ADMITTED (2) or BANNED (3)")
        self._state.put_standing(self._name, site, standing)
        self._standings[site] = standing
        self._show(site)
        self._show_known()

    def remove(self, site: str, round_number: int) -> None:
        """See operator.proto."""
        if site not in self._instances:
            raise not_found(f"no site {site[:63]!r} has joined federation {self._name!r}; see `feddymem status`")
        self._state.remove_site(self._name, site, round_number)
        del self._instances[site]
        self._removed.add(site)
        self._quarantined.discard(site)
        self._left.pop(site, None)
        self._show(site)
        self._show_known()

    def show_quarantine(self, outlying: Collection[str], sites: Iterable[str]) -> None:
        """Shows of which sites the bank of a round is left out, of those that have one."""
        for site in sites:
            (self._quarantined.add if site in outlying else self._quarantined.discard)(site)
            self._show(site)

    def _show(self, site: str) -> None:
        """Shows how a site stands."""
        if not self._expects(site):
            self._named.discard(site)
            metrics.SITE_PRESENT.remove(self._name, site)
            metrics.SITE_QUARANTINED.remove(self._name, site)
        elif site in self._named or len(self._named) < metrics.NAMED_SITES:
            self._named.add(site)
            quarantined = site in self._quarantined and not self.admitted(site)
            metrics.SITE_PRESENT.labels(self._name, site).set(self.present(site))
            metrics.SITE_QUARANTINED.labels(self._name, site).set(quarantined)

    def _show_known(self) -> None:
        metrics.SITES_KNOWN.labels(self._name).set(len(self.expected))

    def _expects(self, site: str) -> bool:
        known = bool(self._settings.sites) or site in self._instances
        return known and self.counts(site) and site not in self._removed

    def _leave(self, site: str) -> None:
        del self._present[site]
        self._left[site] = time.monotonic()
        metrics.SITES_PRESENT.labels(self._name).set(len(self._present))
        self._show(site)

    def _require_counts(self, site: str) -> None:
        if not self.listed(site):
            raise unknown_federation(self._name, site)
        if not self.counts(site):
            raise denied(f"site {site!r} is banned from federation {self._name!r}; ask its operator")

    def _is_used(self, joining: str) -> bool:
        """Whether the feature space is to stay: else a site that was the first, and wrong, would keep out all others,
        even when it has been removed or banned, or comes right itself."""
        return self._state.has_banks(self._name) or any(site != joining for site in self.joined)

    def _require_room_for(self, site: str) -> None:
        if site not in self._instances and len(self._instances) >= self._settings.max_sites:
            raise precondition(
                f"federation {self._name!r} has its {self._settings.max_sites} sites; its operator can remove one, or "
                f"raise max_sites (at most {MAX_SITES})"
            )

    def _check_alone(self, site: str, instance: str) -> None:
        present = self._present.get(site)
        if present is not None and present.instance != instance:
            raise exists(
                f"another edge client takes part as site {site!r} of federation {self._name!r} right now; "
                "stop it first, or give this one another site name"
            )


def _is_quarantined(banks: Sequence[PastBank]) -> bool:
    return bool(banks) and bool(banks[-1].quarantine)


def check_images(images: int) -> None:
    """Checks how many images a site says that it has, or has made a bank from.

    Raises:
        Refusal: INVALID_ARGUMENT for none, or more than the database can have.
    """
    if not 1 <= images <= _MAX_IMAGES:
        raise invalid(f"{images} images; expected 1 to {_MAX_IMAGES}")


def unknown_federation(name: str, site: str | None = None) -> Refusal:
    """The same where there is no such federation and where a site is not on its list: it must not learn which."""
    if site is None:
        return not_found(f"there is no federation {name[:63]!r} at this aggregator; check its name")
    return Refusal(
        grpc.StatusCode.NOT_FOUND,
        f"there is no federation {name[:63]!r} for site {site[:63]!r} at this aggregator; check both names, or ask its "
        "operator to put the site on its list",
    )
