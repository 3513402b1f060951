"""Lines that break: whoever was cut off, and however, ends bit for bit where all would have ended without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feddymem.client import InspectionClient
from tests.chaos import REPEATS
from tests.chaos.federation import ROUNDS, SITES, wait
from tests.chaos.forks import Place
from tests.chaos.kill_at import KillPoint
from tests.chaos.matrix import Matrix
from tests.chaos.network import Host, Network, why_not

SITE, OTHER_SITE = SITES
KEEPALIVE_SECONDS = 1
LOSS = 0.3
_FLAGS = ("--rpc-timeout-seconds", "3", "--transfer-timeout-seconds", "20")

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}")


class Partition:
    """A federation with the aggregator, the first site and the inference service each on a host of its own."""

    def __init__(self, matrix: Matrix, folder: Path, network: Network, keepalive_seconds: float | None) -> None:
        self.network, self._undisturbed = network, matrix.undisturbed.outcome
        self.hosts = {name: network.add() for name in ("aggregator", SITE, "inference")}
        self.hosts[OTHER_SITE] = network.hosts[0]
        places = {name: Place(host.address, host.namespace, keepalive_seconds) for name, host in self.hosts.items()}
        self.trial = matrix.trial(folder, places, flags=_FLAGS)

    def start(self, kill: KillPoint | None = None) -> None:
        """Starts all services; the second site's edge client may be told when to die."""
        for name in self.trial.names:
            self.trial.start(name, kill if name == OTHER_SITE else None)

    def ends_as_undisturbed(self) -> None:
        self.trial.wait_done()
        assert self.trial.outcome(self._undisturbed).differences(self._undisturbed) == ""

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        wait(condition, lambda: what + self.trial.logs())

    def present(self, site: str) -> bool:
        """Whether the aggregator takes a site to be there."""
        return any(each.present for each in self.trial.status().sites if each.site == site)

    def heard(self, name: str, *events: str) -> bool:
        return any(self.trial.events(name, event) for event in events)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture
def partition(matrix: Matrix, tmp_path: Path, network: Network, request: pytest.FixtureRequest) -> Iterator[Partition]:
    made = Partition(matrix, tmp_path / "trial", network, getattr(request, "param", KEEPALIVE_SECONDS))
    yield made
    made.trial.close()


def there(network: Network, site: Host, aggregator: Host) -> None:
    network.lose(1, site, aggregator)


def back(network: Network, site: Host, aggregator: Host) -> None:
    network.lose(1, aggregator, site)


@pytest.mark.parametrize("fault", [Network.cut, Network.reject, there, back], ids=["drop", "reject", "there", "back"])
@pytest.mark.parametrize("_repeat", range(REPEATS))
def test_a_site_that_is_cut_off_in_a_round_goes_on_with_it(
    partition: Partition, fault: Callable[[Network, Host, Host], None], _repeat: int
) -> None:
    """Cut for so long that both ends have noticed: the site tries again, the aggregator takes it to be gone."""
    site, aggregator = partition.hosts[SITE], partition.hosts["aggregator"]
    partition.start()
    partition.wait(lambda: partition.heard(SITE, "joined"), "the site to join")
    fault(partition.network, site, aggregator)
    partition.wait(
        lambda: partition.heard(SITE, "aggregator_interrupted", "aggregator_unreachable"), "the site to notice"
    )
    partition.wait(lambda: not partition.present(SITE), "the aggregator to notice")
    assert not partition.trial.done()
    partition.network.heal(site, aggregator)
    partition.ends_as_undisturbed()


@pytest.mark.parametrize("partition", [None], indirect=True)
def test_a_line_that_breaks_for_a_moment_is_not_even_noticed(partition: Partition) -> None:
    site, aggregator = partition.hosts[SITE], partition.hosts["aggregator"]
    partition.start()
    partition.wait(lambda: partition.heard(SITE, "joined"), "the site to join")
    partition.network.cut(site, aggregator)
    partition.wait(lambda: partition.network.dropped >= 3, "packets to get lost")
    partition.network.heal(site, aggregator)
    partition.ends_as_undisturbed()
    assert not partition.heard(SITE, "aggregator_interrupted", "upload_interrupted", "aggregator_unreachable")


@pytest.mark.parametrize("partition", [None], indirect=True)
@pytest.mark.parametrize("_repeat", range(REPEATS))
def test_a_third_of_all_packets_may_get_lost(partition: Partition, _repeat: int) -> None:
    site, aggregator = partition.hosts[SITE], partition.hosts["aggregator"]
    partition.network.lose(LOSS, site, aggregator)
    partition.network.lose(LOSS, aggregator, site)
    partition.start()
    partition.ends_as_undisturbed()
    assert partition.network.dropped > 5


@pytest.mark.parametrize("_repeat", range(REPEATS))
def test_an_inference_service_that_is_cut_off_serves_what_it_has_and_catches_up(
    matrix: Matrix, partition: Partition, _repeat: int
) -> None:
    inference, image = partition.hosts["inference"], matrix.undisturbed.line.image
    before_the_last_round = KillPoint("services.edge_client.round_work:local_update", "before", ROUNDS)
    partition.start(before_the_last_round)
    partition.wait(lambda: bool(partition.trial.fleet.ended()), "the last round")
    known = matrix.undisturbed.scores[ROUNDS - 1]
    with InspectionClient(partition.trial.fleet.address("inference"), site=SITE) as line:
        partition.wait(lambda: _served(line, image) == (ROUNDS - 1, known), "the release before the last")
        for name in ("aggregator", SITE):
            partition.network.cut(inference, partition.hosts[name])
        partition.trial.start(OTHER_SITE)
        partition.wait(lambda: _served(line, image) == (ROUNDS - 1, known) and partition.trial.done(), "the last round")
        partition.wait(lambda: partition.heard("inference", "watch_interrupted"), "the inference service to notice")
        assert _served(line, image) == (ROUNDS - 1, known)
        for name in ("aggregator", SITE):
            partition.network.heal(inference, partition.hosts[name])
    partition.ends_as_undisturbed()


def _served(line: InspectionClient, image: Path) -> tuple[int, float]:
    result = line.inspect(image)
    return result.release, result.score
