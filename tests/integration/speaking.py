"""What tests ask an aggregator, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


def current_release(site: FakeSite) -> Release:
    request = WatchReleasesRequest(federations=[site.federation])
    stream = site.releases.WatchReleases(request, timeout=TIMEOUT_SECONDS)
    release = next(stream).release
    stream.cancel()
    return release


def download(site: FakeSite, sha256: bytes, offset: int = 0) -> bytes:
    request = DownloadArrayRequest(sha256=sha256, offset=offset)
    return b"".join(r.chunk.data for r in site.releases.DownloadArray(request, timeout=TIMEOUT_SECONDS))
