"""The client library, `feddymem inspect` and the documented callers against real services."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from feddymem.client import (
    AsyncInspectionClient,
    Image,
    InspectionClient,
    InspectionResult,
    InspectionTimeoutError,
    InvalidRequestError,
    NotServedError,
    UnavailableError,
    Verdict,
)
from services.demo.processes import Fleet, RunningService
from tests.integration.conftest import System, inference_flags, serves
from tests.integration.test_end_to_end import feddymem

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_SECONDS = 120
SITE = "dim-hall"
BASH = shutil.which("bash") or "bash"


@pytest.fixture
def client(system: System) -> Iterator[InspectionClient]:
    with InspectionClient(system.inference.grpc, site=SITE) as connected:
        yield connected


@pytest.fixture(scope="module")
def good(system: System) -> list[Path]:
    return [image.path for image in system.sites[SITE].test if not image.defect]


@pytest.fixture(scope="module")
def defect(system: System) -> Path:
    return next(image.path for image in system.sites[SITE].test if image.defect)


@pytest.fixture
def parts(good: list[Path], tmp_path: Path) -> Path:
    """A folder of five images, the third of which is broken."""
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for number, path in enumerate(good[:4]):
        shutil.copy(path, folder / ("deep" if number == 0 else "") / f"{number}.png")
    (folder / "1b.png").write_bytes(b"broken")
    return folder


def scored(outcome: object) -> InspectionResult:
    assert isinstance(outcome, InspectionResult), outcome
    return outcome


def test_an_image_scores_the_same_however_it_is_handed_in(client: InspectionClient, defect: Path) -> None:
    with PIL.Image.open(defect) as opened:
        colours = np.asarray(opened.convert("RGB"))
    expected = client.inspect(defect)
    assert (expected.federation, expected.site, expected.release) == ("bricks", SITE, 2)
    assert expected.queue_seconds > 0
    assert expected.compute_seconds > 0
    wide = colours.astype(np.uint16) * 257
    with PIL.Image.open(defect) as opened:
        images: list[Image] = [str(defect), defect.read_bytes(), opened, colours, wide, colours[:, :, 0]]
        for image in images:
            assert client.inspect(image).score == pytest.approx(expected.score, rel=1e-4)


def test_verdict_and_regions_are_by_the_thresholds_given(client: InspectionClient, defect: Path) -> None:
    plain = client.inspect(defect, map_kind="float32")
    assert plain.threshold is not None  # of the release's calibration
    assert (plain.verdict is Verdict.ANOMALOUS) == (plain.score >= plain.threshold)
    assert plain.regions == ()
    assert plain.anomaly_map is not None
    peak = float(plain.anomaly_map.max())
    for threshold, verdict in ((plain.score * 0.99, Verdict.ANOMALOUS), (plain.score * 1.01, Verdict.NORMAL)):
        assert client.inspect(defect, threshold=threshold).verdict is verdict
    region, *_ = client.inspect(defect, pixel_threshold=peak * 0.9).regions
    assert region.peak == pytest.approx(peak, rel=1e-4)
    assert client.inspect(defect, pixel_threshold=peak * 1.01).regions == ()
    with pytest.raises(InvalidRequestError, match="threshold is -1"):
        client.inspect(defect, threshold=-1)


def test_an_overlay_shows_heat_and_regions_on_the_image(client: InspectionClient, defect: Path) -> None:
    result = client.inspect(defect, map_kind="png", pixel_threshold=0)
    with PIL.Image.open(defect) as opened:
        shape = (opened.height, opened.width, 3)
    assert result.heatmap is not None
    assert result.heatmap.shape == shape
    drawn = result.overlay(defect)
    assert drawn.shape == shape
    assert (drawn[0] == 255).all()  # everything is one region at that threshold, and its frame the border


async def test_the_asynchronous_client_gives_the_same(
    system: System, client: InspectionClient, good: list[Path], defect: Path
) -> None:
    images = [*good, defect]
    expected = [scored(outcome).score for outcome in client.inspect_many(images)]

    async def camera() -> AsyncIterator[bytes]:
        for path in images:
            yield await asyncio.to_thread(path.read_bytes)

    async with AsyncInspectionClient(system.inference.grpc, site=SITE) as another:
        assert (await another.inspect(defect)).score == pytest.approx(expected[-1], rel=1e-4)
        for source in (images, camera()):
            scores = [scored(outcome).score async for outcome in another.inspect_many(source)]
            assert scores == pytest.approx(expected, rel=1e-4)


def test_a_bad_image_among_many_is_an_outcome_of_its_own(client: InspectionClient, parts: Path) -> None:
    files = sorted(parts.glob("*.png"))
    kinds = [type(outcome) for outcome in client.inspect_many([*files, parts / "missing.png"])]
    assert kinds == [InspectionResult, InvalidRequestError, InspectionResult, InspectionResult, InvalidRequestError]


def test_a_deadline_holds_for_a_real_service(client: InspectionClient, defect: Path) -> None:
    with pytest.raises(InspectionTimeoutError):
        client.inspect(defect, timeout_seconds=0.001)
    assert client.inspect(defect).score > 0


def test_an_unknown_federation_is_named(system: System, defect: Path) -> None:
    with (
        InspectionClient(system.inference.grpc, federation="boats") as stranger,
        pytest.raises(NotServedError, match="'boats'"),
    ):
        stranger.inspect(defect)


def inspections(service: RunningService) -> float:
    """How many images a service has scored."""
    with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=TIMEOUT_SECONDS) as page:
        text = page.read().decode()
    return float(re.search(r'^feddymem_inspections_total\{outcome="ok"\} (\S+)', text, re.MULTILINE)[1])  # type: ignore[index]


def test_images_go_round_two_servers_and_on_when_one_is_killed(system: System, fleet: Fleet, good: list[Path]) -> None:
    names = ("first", "second")
    flags = inference_flags(system.aggregator, system.edges.values())
    for name in names:
        fleet.launch(name, "inference", *flags)
    services = [fleet.wait_listening(name) for name in names]
    for service in services:
        fleet.wait_until(lambda s=service: serves(s, system.sites[SITE], 2), TIMEOUT_SECONDS, "release 2")  # type: ignore[misc]
    before = [inspections(service) for service in services]
    with InspectionClient(f"ipv4:{services[0].grpc},{services[1].grpc}", site=SITE) as client:
        assert all(scored(outcome) for outcome in client.inspect_many(good * 4))
        for service, count in zip(services, before, strict=True):
            assert inspections(service) - count > len(good)
        outcomes = client.inspect_many(good * 4)
        assert scored(next(outcomes)).release == 2
        fleet.kill("first")
        assert len([scored(outcome) for outcome in outcomes]) == 4 * len(good) - 1


@contextmanager
def restarted(service: RunningService, flags: list[str]) -> Iterator[None]:
    """A service that was killed, again at its address and with its state."""
    addresses = ("--listen", service.grpc, "--metrics-listen", "127.0.0.1:0")
    state = ("--state-dir", str(service.log.parent / "state"))
    with service.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "inference", *flags, *addresses, *state], stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.kill()
        process.wait(TIMEOUT_SECONDS)


def test_a_client_outlives_the_restart_of_its_server(system: System, fleet: Fleet, good: list[Path]) -> None:
    flags = inference_flags(system.aggregator, system.edges.values())
    service = fleet.start("alone", "inference", *flags)
    with InspectionClient(service.grpc, site=SITE, attempts=2) as client:

        def answers() -> bool:
            try:
                return client.inspect(good[0]).release == 2
            except UnavailableError:
                return False

        fleet.wait_until(answers, TIMEOUT_SECONDS, "release 2")
        fleet.kill("alone")
        assert not answers()
        with restarted(service, flags):
            fleet.wait_until(answers, TIMEOUT_SECONDS, "the service to be back")


def test_the_command_takes_folders_and_patterns_in_order(system: System, parts: Path) -> None:
    server = ("--server", system.inference.grpc)
    run = feddymem("inspect", str(parts), *server, "--json", "--threshold", "0", "--pixel-threshold", "0")
    assert run.returncode == 4
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    names = ["1.png", "1b.png", "2.png", "3.png", "deep/0.png"]
    assert [row["image"] for row in rows] == [str(parts / name) for name in names]
    assert [row.get("verdict") for row in rows] == ["anomalous", None, "anomalous", "anomalous", "anomalous"]
    assert rows[0]["regions"][0]["area"] > 0
    assert rows[1]["code"] == 3
    assert "1b.png" in run.stderr
    assert "5 images in" in run.stderr
    assert "4 anomalous, 1 failed" in run.stderr

    pattern = feddymem("inspect", str(parts / "[23].png"), str(parts / "deep"), *server, "--csv", "-")
    assert pattern.returncode == 0
    lines = list(csv.DictReader(pattern.stdout.splitlines()))
    assert [line["image"] for line in lines] == [str(parts / name) for name in ("2.png", "3.png", "deep/0.png")]
    assert [float(line["score"]) for line in lines] == pytest.approx([rows[n]["score"] for n in (2, 3, 4)], rel=1e-4)
    assert {line["verdict"] for line in lines} <= {"normal", "anomalous"}


def test_the_command_writes_csv_and_heatmaps_and_shows_verdicts(system: System, parts: Path, tmp_path: Path) -> None:
    server = ("--server", system.inference.grpc)
    results, maps = tmp_path / "results.csv", tmp_path / "maps"
    run = feddymem("inspect", str(parts), *server, "--csv", str(results), "--heatmap", str(maps))
    assert (run.returncode, run.stdout) == (4, "")
    lines = list(csv.DictReader(results.read_text().splitlines()))
    assert [bool(line["error"]) for line in lines] == [False, True, False, False, False]
    assert [Path(line["heatmap"]).name for line in lines if line["heatmap"]] == [
        *("00000_1.png", "00002_2.png", "00003_3.png", "00004_0.png")
    ]
    assert sorted(maps.iterdir()) == sorted(Path(line["heatmap"]) for line in lines if line["heatmap"])
    table = feddymem("inspect", str(parts / "1.png"), *server, "--threshold", "1000000")
    assert table.returncode == 0
    assert "normal" in table.stdout


def test_the_command_refuses_what_makes_no_sense(system: System, parts: Path) -> None:
    server = ("--server", system.inference.grpc)
    assert feddymem("inspect", str(parts), *server, "--json", "--csv", "-").returncode == 2
    assert feddymem("inspect", str(parts / "*.gif"), *server).returncode == 2
    assert feddymem("inspect", str(parts), *server, "--threshold", "-1").returncode == 2
    unknown = feddymem("inspect", str(parts), *server, "--federation", "boats")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert "'boats'" in unknown.stderr
    assert feddymem("inspect", str(parts), *server, "--csv", str(parts / "no" / "x.csv")).returncode == 1


def python_programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(python_programs())))
def test_the_documented_python_runs(system: System, parts: Path, defect: Path, number: int) -> None:
    for name in ("part.png", "other.png"):
        shutil.copy(defect, parts.parent / name)
    program = python_programs()[number].replace("127.0.0.1:7072", system.inference.grpc).replace("plant-a", "dim-hall")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=parts.parent,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout or (parts.parent / "overlay.png").stat().st_size > 0


def test_the_page_shows_the_programs_of_the_examples() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    for language, file in (("cpp", "cpp/inspect.cc"), ("csharp", "csharp/Program.cs")):
        assert f"```{language}\n{(ROOT / 'examples' / file).read_text()}```" in page


@pytest.mark.skipif(
    None in (shutil.which("g++"), shutil.which("grpc_cpp_plugin"), shutil.which("pkg-config")),
    reason="needs g++ and gRPC for C++ (docs/clients.md)",
)
def test_the_documented_cpp_builds_and_runs(system: System, defect: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    page = (ROOT / "docs" / "clients.md").read_text().split("## C++")[1]
    [commands] = re.findall(r"^```sh\n(.*?)^```$", page.split("## C#")[0], re.MULTILINE | re.DOTALL)
    commands = commands.replace("127.0.0.1:7072", system.inference.grpc).replace("part.png", str(defect))
    commands = re.sub(r"\bbuild\b(?=/| |$)", str(build), commands)
    run = subprocess.run(
        [BASH, "-e", "-c", commands], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr
    with InspectionClient(system.inference.grpc) as client:
        expected = client.inspect(defect)
    score, verdict = re.search(r"score (\S+), (\w+), release 2", run.stdout).groups()  # type: ignore[union-attr]
    assert float(score) == pytest.approx(expected.score, rel=1e-4)
    assert verdict == (expected.verdict.value if expected.verdict else "unjudged")
