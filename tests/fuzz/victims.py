"""Real processes to send malformed calls to: a federation that is done, one that waits, and what serves them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from feddymem.client import InspectionClient
from feddymem.v1.federation_pb2 import GetStatusRequest
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.operator_pb2 import STANDING_JUDGED, RemoveSiteRequest, SetStandingRequest
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from feddymem.v1.release_pb2 import Release
from services.demo.processes import Fleet, RunningService
from tests.chaos.federation import Published, read_release, write_images
from tests.fuzz.seeds import (
    FEDERATION,
    OTHER_SITE,
    SITE,
    Calls,
    aggregator_calls,
    edge_client_calls,
    inference_calls,
    join_request,
)
from tests.integration.conftest import serves_image

HONEST_SITE = "dim-hall"
_HONEST_SECONDS = 30
_METHOD = {"generator": True, "bank_items": 40, "memory_items": 60, "rounds": 1, "item_type": "uint8"}
_FEDERATIONS = {
    "parts": {"sites": [HONEST_SITE], "quorum": 1, "method": _METHOD},
    FEDERATION: {"quorum": 2, "method": _METHOD},
}
_ANY_RATE = "1000000"
_CODEC = re.compile(
    r"libpng (warning|error): |(Corrupt|Premature end of) JPEG |Unsupported marker |TIFF\w+: |tempfile\.tif: "
)
"""Lines that libpng, libjpeg and libtiff write themselves about a damaged image."""


@dataclass(frozen=True)
class Work:
    """What the honest have, which must be the same before and after; bit for bit.

    Attributes:
        status: of the federation that is done.
        releases: of aggregator and edge client.
        scores: of the site's images.
    """

    status: bytes
    releases: tuple[Published, ...]
    scores: tuple[float, ...]


class Victims:
    """An aggregator, an edge client and an inference service.

    Attributes:
        servers: by name.
        calls: honest ones of every RPC, by name of the server.
    """

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet = fleet
        data = write_images(folder)[HONEST_SITE]
        self._images = sorted(data.iterdir())
        config = folder / "aggregator.yaml"
        config.write_text(yaml.safe_dump({"federations": _FEDERATIONS}))
        aggregator = self._start("aggregator", "--config", str(config))
        where = ["--federation", "parts", "--site", HONEST_SITE, "--data", str(data), "--input-size", "64"]
        edge = self._start("edge", "--aggregator", aggregator.grpc, *where)
        inference = self._start("inference", "--aggregator", aggregator.grpc, "--edge-clients", edge.grpc)
        self.servers = {server.name: server for server in (aggregator, edge, inference)}
        fleet.wait_until(lambda: serves_image(inference, HONEST_SITE, self._images[0], 1), 120, "release 1")
        arrays = [
            [array.sha256 for array in Release.FromString(published.message).arrays] for published in self._releases()
        ]
        self.calls: dict[str, Calls] = {
            "aggregator": aggregator_calls(arrays[0]),
            "edge": edge_client_calls(arrays[1]),
            "inference": inference_calls(),
        }

    def work(self) -> Work:
        """What the honest have now."""
        with grpc.insecure_channel(self.servers["aggregator"].grpc) as channel:
            request = GetStatusRequest(federation="parts")
            status = FederationServiceStub(channel).GetStatus(request, timeout=_HONEST_SECONDS)
        with InspectionClient(self.servers["inference"].grpc, site=HONEST_SITE) as client:
            scores = tuple(client.inspect(image).score for image in self._images)
        return Work(status.SerializeToString(deterministic=True), self._releases(), scores)

    def set_right(self, forget: bool = False) -> None:
        """Undoes what was done to `FEDERATION`: its two sites are there, and may send banks.

        Args:
            forget: whether `SITE` has sent one.
        """
        with grpc.insecure_channel(self.servers["aggregator"].grpc) as channel:
            federation, operator = FederationServiceStub(channel), OperatorServiceStub(channel)
            if forget:
                operator.RemoveSite(RemoveSiteRequest(federation=FEDERATION, site=SITE), timeout=_HONEST_SECONDS)
            for site in (SITE, OTHER_SITE):
                judged = SetStandingRequest(federation=FEDERATION, site=site, standing=STANDING_JUDGED)
                operator.SetStanding(judged, timeout=_HONEST_SECONDS)
                federation.Join(join_request(site), timeout=_HONEST_SECONDS)

    def methods(self, server: str) -> set[str]:
        """Paths of all RPCs of a server, as its reflection tells them."""
        with grpc.insecure_channel(self.servers[server].grpc) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            services = [pool.FindServiceByName(name) for name in database.get_services()]
            return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}

    def faults(self) -> Iterator[str]:
        """Lines of the servers' logs that tell of a fault, or are none of ours."""
        for server in self.servers.values():
            for line in server.log.read_text(errors="replace").splitlines():
                if not line.startswith("{"):
                    if not _CODEC.match(line):
                        yield f"{server.name}: {line}"
                elif json.loads(line)["level"] in {"error", "critical"}:
                    yield f"{server.name}: {line}"

    def _start(self, name: str, *flags: str) -> RunningService:
        every = ("--max-rpcs-per-second", _ANY_RATE, "--threads", "1")
        rest = () if name == "aggregator" else ("--retry-seconds", "0.2")
        return self._fleet.start(name, name, *flags, *every, *rest)

    def _releases(self) -> tuple[Published, ...]:
        return tuple(read_release(self.servers[name].grpc, 1) for name in ("aggregator", "edge"))
