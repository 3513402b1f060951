"""What honest callers send: for every RPC of every server, the messages of some calls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthListRequest
from grpc_reflection.v1alpha.reflection_pb2 import ExtensionRequest, ServerReflectionRequest

from feddymem.openinference import open_inference_pb2 as oip
from feddymem.v1.array_pb2 import ArrayChunk
from feddymem.v1.federation_pb2 import (
    BankHeader,
    CalibrateRequest,
    GetStatusRequest,
    JoinRequest,
    UploadBankRequest,
    WatchRoundsRequest,
)
from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    OPINION_BAD_PART,
    OPINION_FALSE_ALARM,
    DecideFeedbackRequest,
    GetFeedbackOwnerRequest,
    KeepFeedbackRequest,
    ListFeedbackRequest,
)
from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_FLOAT32,
    MAP_FORMAT_PNG,
    GetInspectionStatusRequest,
    InspectRequest,
    InspectStreamRequest,
    RawImage,
    ReportFeedbackRequest,
)
from feddymem.v1.operator_pb2 import (
    STANDING_ADMITTED,
    STANDING_BANNED,
    ActivateReleaseRequest,
    GetReleaseRequest,
    ListReleasesRequest,
    RemoveSiteRequest,
    SetStandingRequest,
    ShadowReleaseRequest,
)
from feddymem.v1.release_pb2 import DownloadArrayRequest, WatchReleasesRequest
from services.runtime.arrays import WireArray, bank_to_wire, chunks
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.fake_site import calibration_message, make_bank
from tests.unit.encoded_images import BOMBS, LOSSLESS, SAMPLES, encode, random_values, smooth

Call = Sequence[Message]
"""The messages of one call."""
Calls = dict[str, list[Call]]
"""By a method's path, /SERVICE/METHOD."""

FEDERATION = "open"
"""Takes any site, and waits in its first round for ever."""
SITE, OTHER_SITE, INSTANCE = "fuzzed", "waited-for", "0123456789abcdef"
ITEMS = 20
_PIECE_BYTES = 100


def aggregator_calls(arrays: Iterable[bytes]) -> Calls:
    """All that an aggregator serves.

    Args:
        arrays: SHA-256 of arrays that it has.
    """
    federation, operator = "/feddymem.v1.FederationService", "/feddymem.v1.OperatorService"
    named = {"federation": FEDERATION, "site": SITE}
    return {
        f"{federation}/Join": [[join_request(SITE)]],
        f"{federation}/WatchRounds": [[WatchRoundsRequest(**named, instance=INSTANCE)]],
        f"{federation}/UploadBank": [_upload(ITEMS * SPACE.channels), _upload(_PIECE_BYTES)],
        f"{federation}/Calibrate": [[calibrate_request([])], [calibrate_request([40.0, 41.0, 45.5, 45.6])]],
        f"{federation}/GetStatus": [[GetStatusRequest()], [GetStatusRequest(federation=FEDERATION)]],
        f"{operator}/ListReleases": [[ListReleasesRequest(federation=FEDERATION)]],
        f"{operator}/ActivateRelease": [
            [ActivateReleaseRequest(federation=FEDERATION, version=version, expected=expected)]
            for version, expected in ((0, None), (1, 0))
        ],
        f"{operator}/GetRelease": [[GetReleaseRequest(federation=FEDERATION, version=1)]],
        f"{operator}/ShadowRelease": [
            [ShadowReleaseRequest(federation=FEDERATION, version=version)] for version in (0, 1)
        ],
        f"{operator}/SetStanding": [
            [SetStandingRequest(**named, standing=standing)] for standing in (STANDING_ADMITTED, STANDING_BANNED)
        ],
        f"{operator}/RemoveSite": [[RemoveSiteRequest(**named)]],
        **_release_calls(arrays),
        **_standard_calls("feddymem.v1.FederationService"),
    }


def edge_client_calls(arrays: Iterable[bytes]) -> Calls:
    """All that an edge client serves.

    Args:
        arrays: SHA-256 of arrays that it has.
    """
    return {**_release_calls(arrays), **feedback_calls(), **_standard_calls("feddymem.v1.ReleaseService")}


def feedback_calls() -> Calls:
    """What an edge client of federation `parts` and site `dim-hall` is told of verdicts."""
    service = "/feddymem.v1.FeedbackService"
    named: dict[str, Any] = {"federation": "parts", "site": "dim-hall"}
    images = [hashlib.sha256(file).hexdigest() for file in image_files()]
    return {
        f"{service}/GetFeedbackOwner": [[GetFeedbackOwnerRequest()]],
        f"{service}/KeepFeedback": [[KeepFeedbackRequest(**named, **said)] for said in _said()],
        f"{service}/ListFeedback": [[ListFeedbackRequest(undecided=undecided)] for undecided in (False, True)],
        f"{service}/DecideFeedback": [
            [DecideFeedbackRequest(image=image[:length], decision=decision)]
            for image in images
            for length, decision in ((64, DECISION_REJECTED), (6, DECISION_ACCEPTED))
        ],
    }


def inference_calls() -> Calls:
    """All that an inference service serves."""
    inspection, open_inference = "/feddymem.v1.InspectionService", "/inference.GRPCInferenceService"
    inspections, inferences = _inspections(), _inferences()
    streamed = [InspectStreamRequest(id=str(number), inspect=each) for number, each in enumerate(inspections)]
    return {
        f"{inspection}/Inspect": [[request] for request in inspections],
        f"{inspection}/InspectStream": _in_threes(streamed),
        f"{inspection}/ReportFeedback": [
            *([ReportFeedbackRequest(**said)] for said in _said()),
            *([ReportFeedbackRequest(federation="parts", site="dim-hall", **said)] for said in _said()),
        ],
        f"{inspection}/GetInspectionStatus": [
            [GetInspectionStatusRequest()],
            [GetInspectionStatusRequest(federation="parts")],
        ],
        f"{open_inference}/ServerLive": [[oip.ServerLiveRequest()]],
        f"{open_inference}/ServerReady": [[oip.ServerReadyRequest()]],
        f"{open_inference}/ModelReady": [[oip.ModelReadyRequest(name="parts", version="1")]],
        f"{open_inference}/ServerMetadata": [[oip.ServerMetadataRequest()]],
        f"{open_inference}/ModelMetadata": [[oip.ModelMetadataRequest(name="parts", version="1")]],
        f"{open_inference}/ModelInfer": [[request] for request in inferences],
        f"{open_inference}/ModelStreamInfer": _in_threes(inferences),
        f"{open_inference}/RepositoryIndex": [[oip.RepositoryIndexRequest(repository_name="all", ready=True)]],
        **_standard_calls("feddymem.v1.InspectionService"),
    }


def image_files() -> list[bytes]:
    """Files of every format and depth that is decoded, and small ones that claim to be huge."""
    good = [encode(kind, random_values(dtype, channels)) for kind, dtype, channels in LOSSLESS]
    return [*good, *(make() for make in SAMPLES.values()), *(make() for make in BOMBS)]


def join_request(site: str) -> JoinRequest:
    """A site joins `FEDERATION`."""
    space = feature_space_to_message(SPACE)
    return JoinRequest(federation=FEDERATION, site=site, instance=INSTANCE, feature_space=space, images=10)


def candidate_arrays() -> list[WireArray]:
    """Of the candidate that `calibrate_request` is about."""
    return bank_to_wire(make_bank(seed=2), "float16")


def calibrate_request(scores: Sequence[float]) -> CalibrateRequest:
    """`SITE` says how the candidate of the first round scores its held-out images."""
    return CalibrateRequest(
        federation=FEDERATION,
        site=SITE,
        instance=INSTANCE,
        round=1,
        items_sha256=candidate_arrays()[0].manifest.sha256,
        candidate=calibration_message(scores),
    )


def _said() -> Iterator[dict[str, Any]]:
    """Images with an opinion each."""
    for number, file in enumerate(image_files()):
        opinion = (OPINION_FALSE_ALARM, OPINION_BAD_PART)[number % 2]
        yield {"encoded": file, "opinion": opinion, "note": "a shadow\nof the gripper" * (number % 3)}


def _upload(piece_bytes: int) -> Call:
    arrays = bank_to_wire(make_bank(items=ITEMS), "uint8")
    header = BankHeader(
        federation=FEDERATION,
        site=SITE,
        instance=INSTANCE,
        round=1,
        fingerprint=SPACE.fingerprint,
        images=10,
        arrays=[array.manifest for array in arrays],
    )
    pieces = (piece for array in arrays for piece in _pieces(array, piece_bytes))
    return [UploadBankRequest(header=header), *(UploadBankRequest(chunk=piece) for piece in pieces)]


def _pieces(array: WireArray, size: int) -> Iterable[ArrayChunk]:
    for offset in range(0, len(array.data), size):
        yield from chunks(array.manifest.sha256, array.data[: offset + size], offset)


def _release_calls(arrays: Iterable[bytes]) -> Calls:
    service = "/feddymem.v1.ReleaseService"
    return {
        f"{service}/WatchReleases": [[WatchReleasesRequest()], [WatchReleasesRequest(federations=["parts"])]],
        f"{service}/DownloadArray": [[DownloadArrayRequest(sha256=sha256, offset=8)] for sha256 in arrays],
    }


def _standard_calls(service: str) -> Calls:
    requests = [
        ServerReflectionRequest(list_services="*"),
        ServerReflectionRequest(file_containing_symbol=service),
        ServerReflectionRequest(file_by_filename="feddymem/v1/array.proto"),
        ServerReflectionRequest(all_extension_numbers_of_type="feddymem.v1.Array"),
        ServerReflectionRequest(
            file_containing_extension=ExtensionRequest(containing_type="feddymem.v1.Array", extension_number=1)
        ),
    ]
    return {
        "/grpc.health.v1.Health/Check": [[HealthCheckRequest(service=service)]],
        "/grpc.health.v1.Health/Watch": [[HealthCheckRequest(service=service)]],
        "/grpc.health.v1.Health/List": [[HealthListRequest()]],
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [[each] for each in requests] + [requests],
    }


def _inspections() -> list[InspectRequest]:
    wished = [
        InspectRequest(),
        InspectRequest(map_format=MAP_FORMAT_FLOAT32, threshold=1, pixel_threshold=1),
        InspectRequest(federation="parts", site="dim-hall", map_format=MAP_FORMAT_PNG, threshold=0.5),
        InspectRequest(site=SITE, map_format=MAP_FORMAT_PNG, false_alarm_rate=0.3, regions=True),
    ]
    requests = []
    for number, file in enumerate(image_files()):
        request = InspectRequest(encoded=file)
        request.MergeFrom(wished[number % len(wished)])
        requests.append(request)
    for dtype, bits in (("uint8", 8), ("uint16", 16)):
        for channels in (1, 3, 4):
            pixels = random_values(dtype, channels)
            height, width = pixels.shape[:2]
            raw = RawImage(height=height, width=width, channels=channels, bits=bits, data=pixels.tobytes())
            requests.append(InspectRequest(raw=raw, map_format=MAP_FORMAT_FLOAT32))
    return requests


def _inferences() -> list[oip.ModelInferRequest]:
    files, pixels = image_files(), smooth()
    floats = pixels.astype(np.float32)
    several = [files[0], files[-1], files[3]]
    requests = [_inference("BYTES", [1], raw=len(file).to_bytes(4, "little") + file) for file in files]
    requests += [
        _inference("BYTES", [3], raw=b"".join(len(file).to_bytes(4, "little") + file for file in several)),
        _inference("BYTES", [3], bytes_contents=several),
        _inference("UINT8", [1, *pixels.shape], raw=pixels.tobytes()),
        _inference("UINT8", pixels.shape, uint_contents=pixels.ravel().tolist()),
        _inference("FP32", pixels.shape, raw=floats.tobytes()),
        _inference("FP32", [1, *pixels.shape], fp32_contents=floats.ravel().tolist()),
    ]
    for request in requests[::2]:
        request.model_name, request.model_version = "parts", "1"
        request.parameters["site"].string_param = "dim-hall"
        request.parameters["threshold"].double_param = 0.5
        request.parameters["false_alarm_rate"].string_param = "0.3"
        for name in ("score", "verdict", "p_value", "normalised_score", "threshold", "regions", "anomaly_map"):
            request.outputs.add(name=name)
    return requests


def _inference(
    datatype: str, shape: Iterable[int], raw: bytes | None = None, **contents: object
) -> oip.ModelInferRequest:
    typed = oip.InferTensorContents(**contents) if contents else None  # type: ignore[arg-type]
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape, contents=typed)
    return oip.ModelInferRequest(id="part", inputs=[tensor], raw_input_contents=[] if raw is None else [raw])


def _in_threes(requests: Sequence[Message]) -> list[Call]:
    return [requests[start : start + 3] for start in range(0, len(requests), 3)]
