"""The whole system as real processes: what the integrator of a production line relies on."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray

from feddymem.backbone import load_extractor
from feddymem.images import decode
from feddymem.maps import anomaly_map
from feddymem.scoring import Scorer
from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_FLOAT32,
    MAP_FORMAT_PNG,
    InspectRequest,
    InspectResponse,
    InspectStreamRequest,
    RawImage,
)
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub
from services.runtime.arrays import bank_from_wire
from tests.integration.conftest import TIMEOUT_SECONDS, System, published
from tests.integration.refusals import refused


@pytest.fixture(scope="module")
def inspection(system: System) -> Iterator[InspectionServiceStub]:
    with grpc.insecure_channel(system.inference.grpc) as channel:
        yield InspectionServiceStub(channel)


@pytest.fixture(scope="module")
def image(system: System) -> bytes:
    """A defect image of the site `dim-hall`."""
    return next(i for i in system.sites["dim-hall"].test if i.defect).path.read_bytes()


@pytest.fixture(scope="module")
def scorer(system: System) -> Scorer:
    """The library's scorer, from what the aggregator publishes."""
    return Scorer(load_extractor(device="cpu"), bank_from_wire(published(system.aggregator)[1]), None)


def grey_pixels(image: bytes) -> NDArray[np.uint8]:
    return decode(image)[:, :, 0].astype(np.uint8)


def inspect(stub: InspectionServiceStub, **fields: Any) -> InspectResponse:
    fields.setdefault("site", "dim-hall")
    return stub.Inspect(InspectRequest(**fields), timeout=TIMEOUT_SECONDS)


def test_scores_and_maps_are_those_of_the_library(
    system: System, inspection: InspectionServiceStub, scorer: Scorer
) -> None:
    for name, site in system.sites.items():
        for test_image in site.test:
            data = test_image.path.read_bytes()
            answer = inspect(inspection, site=name, encoded=data, map_format=MAP_FORMAT_FLOAT32)
            expected = scorer.inspect(scorer.extractor.prepare(decode(data))[None])[0]
            assert answer.score == pytest.approx(expected.score, rel=1e-4)
            values = np.frombuffer(answer.map.data, "<f4").reshape(answer.map.height, answer.map.width)
            np.testing.assert_allclose(values, anomaly_map(expected.distances, (224, 224)), rtol=1e-4, atol=1e-4)
            assert (answer.release, answer.site, answer.federation) == (2, name, "bricks")
            assert answer.queue_seconds > 0
            assert answer.compute_seconds > 0


def test_defects_score_higher_than_good_parts(system: System, inspection: InspectionServiceStub) -> None:
    site = system.sites["dim-hall"]
    scores = {i.path: inspect(inspection, encoded=i.path.read_bytes()).score for i in site.test}
    good = [scores[i.path] for i in site.test if not i.defect]
    defects = [scores[i.path] for i in site.test if i.defect]
    assert np.median(defects) > max(good)


def test_every_encoding_of_the_same_pixels_gets_the_same_score(inspection: InspectionServiceStub, image: bytes) -> None:
    pixels = grey_pixels(image)
    wide = pixels.astype(np.uint16) * 257
    colour = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)
    expected = inspect(inspection, encoded=image).score
    height, width = pixels.shape
    files = {
        (".png", "grey 16"): wide,
        (".png", "RGB 8"): colour,
        (".png", "RGBA 16"): cv2.cvtColor(cv2.merge([wide, wide, wide]), cv2.COLOR_BGR2BGRA),
        (".bmp", "RGB 8"): colour,
        (".tiff", "grey 8"): pixels,
        (".tiff", "RGB 16"): cv2.merge([wide, wide, wide]),
    }
    for (suffix, what), values in files.items():
        score = inspect(inspection, encoded=cv2.imencode(suffix, values)[1].tobytes()).score
        assert score == pytest.approx(expected, rel=1e-4), (suffix, what)
    raws = [
        RawImage(height=height, width=width, channels=1, bits=8, data=pixels.tobytes()),
        RawImage(height=height, width=width, channels=3, bits=8, data=colour.tobytes()),
        RawImage(height=height, width=width, channels=1, bits=16, data=wide.astype("<u2").tobytes()),
    ]
    for raw in raws:
        assert inspect(inspection, raw=raw).score == pytest.approx(expected, rel=1e-4), (raw.channels, raw.bits)


def test_without_memory_generators_no_site_need_be_named(inspection: InspectionServiceStub, image: bytes) -> None:
    named, unnamed = (inspect(inspection, encoded=image, site=site) for site in ("dim-hall", ""))
    assert (named.site, unnamed.site) == ("dim-hall", "")
    assert unnamed.score == pytest.approx(named.score, rel=1e-4)


def test_the_png_heatmap_has_the_size_of_the_image(inspection: InspectionServiceStub, image: bytes) -> None:
    larger = cv2.imencode(".png", cv2.resize(grey_pixels(image), (301, 173)))[1].tobytes()
    answer = inspect(inspection, encoded=larger, map_format=MAP_FORMAT_PNG)
    assert decode(answer.map.data).shape == (173, 301, 3)


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels by its header, in a few bytes."""
    small = bytearray(cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes())
    small[16:24] = (30_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"encoded": b"no image"}, grpc.StatusCode.INVALID_ARGUMENT, "JPEG"),
        ({"encoded": bomb()}, grpc.StatusCode.INVALID_ARGUMENT, "900000000 pixels"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "no image"),
        ({"encoded": b"x", "map_format": 9}, grpc.StatusCode.INVALID_ARGUMENT, "map_format is 9"),
        ({"raw": RawImage(height=2, width=2, channels=3, bits=8)}, grpc.StatusCode.INVALID_ARGUMENT, "12"),
        ({"encoded": b"x", "federation": "boats"}, grpc.StatusCode.NOT_FOUND, "'boats'"),
    ],
)
def test_bad_requests_get_their_status_and_lose_nothing(
    inspection: InspectionServiceStub, image: bytes, fields: dict[str, Any], status: grpc.StatusCode, said: str
) -> None:
    code, text = refused(lambda: inspect(inspection, **fields))
    assert code == status
    assert said in text
    assert inspect(inspection, encoded=image).score > 0


def test_truncated_images_of_every_format_are_invalid(inspection: InspectionServiceStub, image: bytes) -> None:
    pixels = decode(image)
    for suffix in (".jpg", ".png", ".bmp", ".tiff"):
        data = cv2.imencode(suffix, pixels)[1].tobytes()
        code, _ = refused(lambda data=data: inspect(inspection, encoded=data[: len(data) // 2]))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT, suffix


def test_a_stream_answers_in_order_and_goes_on_after_a_bad_image(
    system: System, inspection: InspectionServiceStub
) -> None:
    files = [i.path.read_bytes() for i in system.sites["dim-hall"].test]
    files.insert(7, b"broken")
    requests = (
        InspectStreamRequest(id=str(n), inspect=InspectRequest(site="dim-hall", encoded=data))
        for n, data in enumerate(files)
    )
    answers = list(inspection.InspectStream(requests, timeout=TIMEOUT_SECONDS))
    assert [answer.id for answer in answers] == [str(n) for n in range(len(files))]
    assert [n for n, answer in enumerate(answers) if answer.HasField("error")] == [7]
    assert answers[7].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    single = inspect(inspection, encoded=files[0]).score
    assert answers[0].result.score == pytest.approx(single, rel=1e-4)


def test_a_client_that_only_knows_reflection_can_inspect(system: System, image: bytes) -> None:
    with grpc.insecure_channel(system.inference.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "feddymem.v1.InspectionService" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("feddymem.v1.InspectionService").FindMethodByName("Inspect")
        request: Any = message_factory.GetMessageClass(method.input_type)(site="dim-hall", encoded=image)
        answer: Any = channel.unary_unary(
            "/feddymem.v1.InspectionService/Inspect",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )(request, timeout=TIMEOUT_SECONDS)
        assert answer.score > 0


def test_grpcurl_lists_every_service_of_every_server(system: System) -> None:
    expected = {
        system.aggregator: [f"feddymem.v1.{name}Service" for name in ("Federation", "Operator", "Release")],
        system.edges["dim-hall"]: [f"feddymem.v1.{name}Service" for name in ("Feedback", "Release")],
        system.inference: ["feddymem.v1.InspectionService"],
    }
    grpcurl = str(Path(sys.executable).with_name("grpcurl"))
    for service, names in expected.items():
        listed = subprocess.run(
            [grpcurl, "-plaintext", service.grpc, "list"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.split()
        assert [name for name in listed if name.startswith("feddymem.")] == names
        assert "grpc.health.v1.Health" in listed


def test_every_service_is_serving_and_answers_for_metrics(system: System, inspection: InspectionServiceStub) -> None:
    refused(lambda: inspect(inspection, encoded=b"no image"))
    wanted = {
        system.aggregator: 'feddymem_banks_accepted_total{federation="bricks"} 4.0',
        system.edges["dim-hall"]: 'feddymem_edge_images{outcome="read"} 24.0',
        system.inference: (
            'feddymem_rpc_handled_total{code="INVALID_ARGUMENT",method="/feddymem.v1.InspectionService/Inspect"}'
        ),
    }
    for service, line in wanted.items():
        with grpc.insecure_channel(service.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "liveness"):
                status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_SECONDS).status
                assert status == health_pb2.HealthCheckResponse.SERVING
        with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=30) as page:
            text = page.read().decode()
        assert line in text
        assert "process_resident_memory_bytes" in text


def feddymem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_inspect_command_scores_files_and_writes_heatmaps(system: System, tmp_path: Path) -> None:
    good = str(system.sites["dim-hall"].test[0].path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    flags = ("--server", system.inference.grpc, "--site", "dim-hall")
    run = feddymem("inspect", good, str(broken), *flags, "--heatmap", str(tmp_path / "maps"), "--json")
    assert run.returncode == 4
    first, second = (json.loads(line) for line in run.stdout.splitlines())
    assert (first["image"], first["release"], second["code"]) == (good, 2, 3)
    assert first["score"] > 0
    assert [decode(path.read_bytes()).shape for path in (tmp_path / "maps").iterdir()] == [(224, 224, 3)]
    assert feddymem("inspect", good, *flags).returncode == 0
    assert feddymem("inspect", str(tmp_path / "missing.png"), *flags).returncode == 2
    assert feddymem("inspect", good, "--server", "127.0.0.1:1").returncode == 3


def test_the_status_command_shows_rounds_sites_and_release(system: System) -> None:
    run = feddymem("status", "--server", system.aggregator.grpc, "--json")
    assert run.returncode == 0
    [federation] = json.loads(run.stdout)["federations"]
    assert (federation["phase"], federation["release"]) == ("PHASE_DONE", 2)
    assert [site["site"] for site in federation["sites"]] == ["brick-hall", "dim-hall"]
    assert all(len(site["bytes_per_round"]) == 2 for site in federation["sites"])
    table = feddymem("status", "--server", system.aggregator.grpc)
    assert "dim-hall" in table.stdout
    assert feddymem("status", "--server", "127.0.0.1:1").returncode == 3
    assert feddymem("status", "--server", system.aggregator.grpc, "--federation", "boats").returncode == 3


def test_a_bank_is_small_enough_to_leave_the_site(system: System) -> None:
    run = json.loads(feddymem("status", "--server", system.aggregator.grpc, "--json").stdout)
    for site in run["federations"][0]["sites"]:
        for sent in site["bytes_per_round"]:
            assert 200 * 152 < int(sent) < 200 * 152 + 4096


def test_nothing_but_standard_tools_is_needed_to_call(system: System, image: bytes, tmp_path: Path) -> None:
    """The README's grpcurl call."""
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"site": "dim-hall", "encoded": base64.b64encode(image).decode()}))
    grpcurl = str(Path(sys.executable).with_name("grpcurl"))
    with request.open() as stdin:
        run = subprocess.run(
            [grpcurl, "-plaintext", "-d", "@", system.inference.grpc, "feddymem.v1.InspectionService/Inspect"],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert json.loads(run.stdout)["score"] > 0
