"""The `dev` overlay run for real: `make deploy-test`. The tests build on each other, in this order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.deploy.conftest import Deployment
from tests.deploy.engine import podman
from tests.deploy.inspections import Inspection, Line
from tests.deploy.metrics import inspected, total
from tests.deploy.pod import Pod

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

INFERENCE = "inference-site-a"
RELEASE = "feddymem_serving_release_version"
_SECONDS = 120
_SETTLED = 20
"""Inspections before and after whatever a test does to the pods."""
_IMAGE_BYTES = 1.5e9
"""Of the image for CPUs, at most."""


def pods(deployment: Deployment) -> list[Pod]:
    return deployment.cluster.pods_of(INFERENCE)


def serves(deployment: Deployment, release: int) -> Callable[[], bool]:
    """Whether all inference pods serve a release."""
    workloads = (INFERENCE, "inference-site-b")
    return lambda: all(total(pod, RELEASE) == release for name in workloads for pod in deployment.cluster.pods_of(name))


@contextmanager
def under_load(deployment: Deployment, what: str) -> Iterator[Line]:
    """A line that is at work before, during and after the block, and that no inspection may fail."""
    with deployment.line() as line:
        line.wait_for(_SETTLED)
        yield line
        line.wait_for(_SETTLED)
        inspections = line.inspections()
    failed = [each for each in inspections if each.error]
    slowest = max(each.seconds for each in inspections)
    median = statistics.median(each.seconds for each in inspections)
    deployment.measured(
        f"{what}: {len(inspections)} inspections, {len(failed)} failed, "
        f"median {median * 1000:.0f} ms, slowest {slowest:.2f} s"
    )
    assert not failed, f"{failed[:5]}\n{deployment.cluster.state()}"


def settle(deployment: Deployment, what: str) -> float:
    return deployment.cluster.wait(deployment.cluster.settled, _SECONDS, what)


def test_the_image_is_small_enough(deployment: Deployment) -> None:
    size = int(podman("image", "inspect", "--format", "{{.Size}}", deployment.image))
    deployment.measured(f"the image: {size / 1e9:.3f} GB")
    assert size < _IMAGE_BYTES


def test_everything_starts_and_a_federation_is_done(deployment: Deployment) -> None:
    for name in ("aggregator", "edge-client-site-a", "edge-client-site-b", INFERENCE, "inference-site-b"):
        (pod,) = deployment.cluster.pods_of(name)
        assert pod.became_ready is not None
        deployment.measured(f"{name}: ready {pod.became_ready - pod.started:.1f} s after its container was started")
        assert (pod.restarts, pod.wrongs) == (0, [])
    deployment.cluster.wait(serves(deployment, 2), _SECONDS, "release 2 everywhere")
    with under_load(deployment, "undisturbed, one pod") as line:
        line.wait_for(len(list(deployment.pictures.rglob("*.*"))), _SECONDS)
        scores = line.inspections()
    good = [each.score for each in scores if each.image.startswith("good/")]
    defective = [each.score for each in scores if not each.image.startswith("good/")]
    assert statistics.mean(defective) > statistics.mean(good)


def test_pods_reach_nothing_but_the_cluster(deployment: Deployment) -> None:
    for pod in deployment.cluster.pods:
        routes = pod.inside("cat", "/proc/net/route").splitlines()[1:]
        assert any(route.split()[0] != "lo" for route in routes)
        assert not any(route.split()[1] == "00000000" for route in routes), "there is a default route"
    program = (
        "import socket, sys\n"
        "try: socket.create_connection(('1.1.1.1', 443), 5)\n"
        "except OSError as error: print(error.strerror)\n"
        "try: socket.getaddrinfo('example.org', 443)\n"
        "except socket.gaierror as error: print(error.strerror)\n"
    )
    said = pods(deployment)[0].inside("python", "-c", program).splitlines()
    assert said == ["Network is unreachable", "Name or service not known"]


def test_a_pod_may_do_only_what_its_manifest_says(deployment: Deployment) -> None:
    (pod,) = pods(deployment)
    status = dict(line.split(":\t", 1) for line in pod.inside("cat", "/proc/1/status").splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    program = (
        "import pathlib\n"
        "for folder in ('/', '/opt', '/etc/feddymem', '/run', '/var/tmp', '/tmp', '/var/cache', '/var/lib/feddymem'):\n"
        "    try: pathlib.Path(folder, 'probe').write_text('')\n"
        "    except OSError: continue\n"
        "    pathlib.Path(folder, 'probe').unlink(); print(folder)\n"
    )
    assert pod.inside("python", "-c", program).split() == ["/tmp", "/var/cache", "/var/lib/feddymem"]  # noqa: S108


def test_a_second_pod_has_its_share_in_seconds(deployment: Deployment) -> None:
    with under_load(deployment, "scaled from 1 to 2") as line:
        deployment.cluster.scale(INFERENCE, 2)
        settle(deployment, "two inference pods")
        _first, second = pods(deployment)
        assert second.became_ready is not None
        deployment.cluster.wait(lambda: inspected(second) > 0, _SECONDS, "an inspection by the second pod")
        waited = time.monotonic() - second.became_ready
        deployment.measured(f"a new inference pod: first inspection {waited:.1f} s after it was ready")
        before = [inspected(pod) for pod in pods(deployment)]
        line.wait_for(100)
        shares = [inspected(pod) - count for pod, count in zip(pods(deployment), before, strict=True)]
    deployment.measured(f"two pods behind one name: {shares[0]:.0f} and {shares[1]:.0f} of about 100 inspections")
    assert min(shares) > 0.2 * sum(shares)


def test_a_pod_that_is_deleted_drains(deployment: Deployment) -> None:
    leaving = pods(deployment)[0]
    with under_load(deployment, "deleted, SIGTERM under load"):
        leaving.delete()
        deployment.cluster.wait(lambda: leaving.gone, _SECONDS, "the end of a pod")
    settle(deployment, "two inference pods")
    assert (leaving.exits, leaving.wrongs) == ([0], [])


def test_a_pod_that_is_killed_is_started_again(deployment: Deployment) -> None:
    victim = pods(deployment)[0]
    with under_load(deployment, "killed, SIGKILL under load"):
        victim.kill()
        deployment.cluster.wait(lambda: victim.restarts == 1, _SECONDS, "a restart")
        settle(deployment, "two inference pods")
    assert victim.exits == [137]


def test_inspections_go_on_without_the_aggregator(deployment: Deployment) -> None:
    cluster = deployment.cluster
    (aggregator,) = cluster.pods_of("aggregator")
    victim = pods(deployment)[0]
    aggregator.cut_off()
    try:
        with under_load(deployment, "aggregator cut off, a pod restarted meanwhile"):
            victim.kill()
            seconds = cluster.wait(lambda: victim.restarts == 2 and victim.ready, _SECONDS, "readiness from disk")
            deployment.measured(f"ready from disk, without the aggregator: {seconds:.1f} s after a kill")
        # What has no release yet must get no images.
        cluster.scale(INFERENCE, 3)
        cluster.wait(lambda: len(pods(deployment)) == 3, _SECONDS, "a third pod")
        newest = max(pods(deployment), key=lambda pod: pod.made)
        cluster.wait(lambda: "listening" in newest.log.read_text(), _SECONDS, "a third pod that listens")
        assert not newest.ready
        assert newest.address not in cluster.published(INFERENCE)
        assert aggregator.restarts == 0
    finally:
        aggregator.reconnect()
    seconds = settle(deployment, "three inference pods")
    deployment.measured(f"a new pod ready {seconds:.1f} s after the aggregator could be reached again")
    cluster.scale(INFERENCE, 2)
    settle(deployment, "two inference pods")


def test_a_rolling_update_to_a_new_image(deployment: Deployment) -> None:
    following = f"{deployment.image}-next"
    deployment.engine.tag(deployment.image, following)
    deployment.overlay.replicas[INFERENCE] = 2
    before = {pod.name for pod in pods(deployment)}
    with under_load(deployment, "rolling update of everything to a new image"):
        deployment.cluster.apply(deployment.overlay.build(following))
        seconds = deployment.cluster.wait(deployment.cluster.settled, 240, "all pods of the new image")
    deployment.measured(f"rolling update of all services: {seconds:.0f} s")
    assert not before & {pod.name for pod in pods(deployment)}
    ended = [pod for pod in deployment.cluster.pods if pod.gone and pod.exits]
    assert [pod.name for pod in ended if pod.exits[-1]] == []
    deployment.image = following


def test_a_new_release_is_taken_up(deployment: Deployment) -> None:
    def released(inspections: list[Inspection]) -> list[int]:
        return [each.release for each in inspections if not each.error]

    deployment.overlay.set_rounds(3)
    with under_load(deployment, "a third round, and its release") as line:
        deployment.cluster.apply(deployment.overlay.build(deployment.image))
        deployment.cluster.wait(serves(deployment, 3), _SECONDS, "release 3 everywhere")
        line.wait_for(_SETTLED)
    assert set(released(line.inspections())) == {2, 3}
    settle(deployment, "all pods after new settings")


def test_everything_comes_back_after_a_power_cut(deployment: Deployment) -> None:
    cluster = deployment.cluster
    present = [pod for pod in cluster.pods if not pod.gone]
    restarts = {pod.name: pod.restarts for pod in present}
    release = total(pods(deployment)[0], RELEASE)
    for pod in present:
        pod.kill()
    cluster.wait(lambda: all(pod.restarts > restarts[pod.name] for pod in present), _SECONDS, "restarts")
    seconds = settle(deployment, "all pods again")
    deployment.measured(f"everything killed at once: all found again {seconds:.1f} s after they were started")
    with under_load(deployment, "after everything was killed"):
        assert serves(deployment, int(release))()


def test_nothing_was_done_by_force(deployment: Deployment) -> None:
    assert deployment.cluster.wrongs() == []
