"""What honest callers send: for every RPC of every service, the messages of some calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from feddymem.openinference import open_inference_pb2 as oip
from feddymem.v1.federation_pb2 import (
    BankHeader,
    GetStatusRequest,
    JoinRequest,
    UploadBankRequest,
    WatchRoundsRequest,
)
from feddymem.v1.inspection_pb2 import MAP_FORMAT_FLOAT32, MAP_FORMAT_PNG, InspectRequest, InspectStreamRequest, RawImage
from feddymem.v1.release_pb2 import DownloadArrayRequest, WatchReleasesRequest
from services.runtime.arrays import bank_to_wire, chunks
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.fake_site import make_bank
from tests.unit.encoded_images import pillow_formats

Call = Sequence[Message]
"""The messages of one call."""
Calls = dict[str, list[Call]]
"""By full name of a method."""

RELEASES, FEDERATION = "/feddymem.v1.ReleaseService", "/feddymem.v1.FederationService"
INSPECTION, OPEN_INFERENCE = "/feddymem.v1.InspectionService", "/inference.GRPCInferenceService"
