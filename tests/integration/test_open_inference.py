"""Clients of other inference servers, unchanged, against a real inference service."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FileDescriptor
from numpy.typing import NDArray

from feddymem.client import InspectionClient, InspectionResult
from feddymem.images import decode
from feddymem.openinference import open_inference_pb2
from feddymem.openinference.open_inference_pb2 import ModelInferRequest
from feddymem.openinference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from services.demo.processes import RunningService
from tests.integration.conftest import TIMEOUT_SECONDS, System

ROOT = Path(__file__).parent.parent.parent
CLIENTS = Path(__file__).parent / "clients"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a client's script wrote."""

    results: dict[str, Any]
    anomaly_maps: NDArray[np.float32]


def run(*arguments: str) -> str:
    """Runs Python in the clients' environment; what it prints."""
    assert PYTHON.exists(), "the clients' environment is missing; run `make clients`"
    done = subprocess.run([str(PYTHON), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(system: System) -> Path:
    return next(i for i in system.sites["dim-hall"].test if i.defect).path


@pytest.fixture(scope="module")
def expected(system: System, image: Path) -> InspectionResult:
    """What our own client is answered."""
    with InspectionClient(system.inference.grpc, site="dim-hall") as client:
        return client.inspect(image.read_bytes(), map_kind="float32")


def call(script: str, inference: RunningService, image: Path, folder: Path) -> Answers:
    pixels = folder / "pixels.npy"
    np.save(pixels, decode(image.read_bytes()))
    run(str(CLIENTS / script), inference.grpc, str(image), str(pixels), str(folder))
    return Answers(json.loads((folder / "results.json").read_text()), np.load(folder / "map.npy"))


@pytest.fixture(scope="module")
def triton(system: System, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return call("call_with_tritonclient.py", system.inference, image, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def kserve(system: System, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return call("call_with_kserve.py", system.inference, image, tmp_path_factory.mktemp("kserve"))


def assert_scores(results: dict[str, Any], expected: InspectionResult, counts: dict[str, int]) -> None:
    assert {name: len(results[name]) for name in counts} == counts
    for name, count in counts.items():
        assert results[name] == pytest.approx(count * [expected.score], rel=1e-4), name


def assert_same_maps(maps: NDArray[np.float32], expected: InspectionResult) -> None:
    assert expected.anomaly_map is not None
    np.testing.assert_allclose(maps, np.stack(2 * [expected.anomaly_map]), rtol=1e-4, atol=1e-4)


def test_tritonclient_gets_the_scores_and_maps_of_our_own_client(triton: Answers, expected: InspectionResult) -> None:
    counts = {"files": 1, "batch": 3, "uint8": 1, "fp32": 2, "asynchronous": 3}
    assert_scores(triton.results, expected, counts)
    assert_same_maps(triton.anomaly_maps, expected)
    assert triton.results["id"] == ["bricks", "2", "part-9"]
    assert triton.results["verdict"] == [True]


def test_tritonclient_learns_what_there_is(triton: Answers) -> None:
    told = {name: triton.results[name] for name in ("live", "ready", "model_ready", "server", "platform", "versions")}
    assert told == {
        "live": True,
        "ready": True,
        "model_ready": [True, False, False],
        "server": "feddymem",
        "platform": "feddymem",
        "versions": ["2"],
    }
    assert triton.results["outputs"] == [
        *("score", "verdict", "threshold", "p_value", "normalised_score", "regions", "anomaly_map")
    ]
    assert triton.results["index"] == [["bricks", "2", "READY"]]


def test_tritonclient_is_told_what_is_wrong(triton: Answers) -> None:
    refused = triton.results["refused"]
    assert {name: refused[name]["status"] for name in refused} == {
        "model": "StatusCode.NOT_FOUND",
        "version": "StatusCode.NOT_FOUND",
        "image": "StatusCode.INVALID_ARGUMENT",
    }
    assert "'boats'" in refused["model"]["text"]
    assert "release 2" in refused["version"]["text"]
    assert "image 1 of the request" in refused["image"]["text"]


def test_tritonclients_stream_keeps_its_order_and_goes_on_after_a_bad_image(
    triton: Answers, expected: InspectionResult
) -> None:
    stream = triton.results["stream"]
    assert stream.pop(4).startswith("INVALID_ARGUMENT: image 0 of the request")
    assert [number for number, _ in stream] == [str(n) for n in range(12) if n != 4]
    assert [score for _, score in stream] == pytest.approx(11 * [expected.score], rel=1e-4)


def test_kserves_client_gets_the_scores_and_maps_of_our_own_client(kserve: Answers, expected: InspectionResult) -> None:
    counts = {"files": 1, "typed_file": 1, "batch": 3, "uint8": 1, "typed_uint8": 1, "typed_fp32": 1}
    assert_scores(kserve.results, expected, counts)
    assert_same_maps(kserve.anomaly_maps, expected)
    assert kserve.results["id"] == ["bricks", "2", "part-9"]
    assert kserve.results["verdict"] == [bool(expected.score >= 0.5)]
    assert (kserve.results["live"], kserve.results["ready"], kserve.results["model_ready"]) == (
        True,
        True,
        [True, False],
    )
    assert kserve.results["refused"]["status"] == "StatusCode.INVALID_ARGUMENT"


@pytest.fixture(scope="module", params=["tritonclient.grpc.service_pb2", "kserve.protocol.grpc.grpc_predict_v2_pb2"])
def given(request: pytest.FixtureRequest) -> FileDescriptor:
    """The protocol as a client has it."""
    name = request.param
    code = (
        f"import {name} as given; "
        "print([file.serialized_pb.hex() for file in (*given.DESCRIPTOR.dependencies, given.DESCRIPTOR)])"
    )
    pool = descriptor_pool.DescriptorPool()
    files = [pool.AddSerializedFile(bytes.fromhex(text)) for text in json.loads(run("-c", code).replace("'", '"'))]
    return files[-1]


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """Its messages and those within them."""
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        yield message
        waiting += message.nested_types


def fields(message: Descriptor) -> dict[str, descriptor_pb2.FieldDescriptorProto]:
    proto = descriptor_pb2.DescriptorProto()
    message.CopyToProto(proto)
    return {field.name: field for field in proto.field}


def test_our_protocol_is_the_one_that_clients_have(given: FileDescriptor) -> None:
    ours, theirs = (
        {message.full_name: fields(message) for message in messages(file)}
        for file in (open_inference_pb2.DESCRIPTOR, given)
    )
    common = ours.keys() & theirs.keys()
    assert {"inference.ModelInferRequest", "inference.ModelInferResponse"} <= common
    for name in common:
        assert {field: ours[name].get(field) for field in theirs[name]} == theirs[name], name
    [service] = given.services_by_name.values()
    [our_service] = open_inference_pb2.DESCRIPTOR.services_by_name.values()
    assert our_service.full_name == service.full_name
    for method in our_service.methods:
        if (same := service.methods_by_name.get(method.name)) is not None:
            assert method.input_type.full_name == same.input_type.full_name
            assert method.output_type.full_name == same.output_type.full_name
            assert (method.client_streaming, method.server_streaming) == (same.client_streaming, same.server_streaming)


def test_grpcurl_finds_the_protocol_by_reflection_and_can_call_it(system: System, image: Path) -> None:
    """The docs' call."""

    def grpcurl(*arguments: str, stdin: str = "") -> str:
        command = [str(Path(sys.executable).with_name("grpcurl")), "-plaintext", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30, check=True).stdout

    server = system.inference.grpc
    assert "inference.GRPCInferenceService" in grpcurl(server, "list").split()
    assert "raw_input_contents" in grpcurl(server, "describe", "inference.ModelInferRequest")
    ready = grpcurl("-d", '{"name": "bricks"}', server, "inference.GRPCInferenceService/ModelReady")
    assert json.loads(ready) == {"ready": True}


def test_statuses_are_counted_as_those_of_our_own_protocol(system: System) -> None:
    with grpc.insecure_channel(system.inference.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(ModelInferRequest(), timeout=TIMEOUT_SECONDS)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "expected one, named 'image'" in str(caught.value.details())
    with urllib.request.urlopen(f"http://{system.inference.metrics}/metrics", timeout=TIMEOUT_SECONDS) as page:
        text = page.read().decode()
    counted = 'feddymem_rpc_handled_total{code="INVALID_ARGUMENT",method="/inference.GRPCInferenceService/ModelInfer"}'
    assert counted in text
