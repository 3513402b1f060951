"""Releases on disk at the start of an inference service: what is damaged goes, what only lacks a backbone stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from feddymem.feature_space import FeatureSpace
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.inference.registry import Registry
from services.inference.settings import InferenceSettings
from services.runtime.messages import feature_space_to_message

SPACE = FeatureSpace(
    backbone="resnet18",
    weights_sha256="ab" * 32,
    layers=(2, 3),
    reductions=(8, 16),
    input_size=64,
    tile_size=64,
    tile_overlap=0,
    mean=(123.0, 116.5, 103.5),
    std=(58.0, 57.0, 57.5),
    pooling=11,
    context_weight=1.25,
    border_weight=0.6875,
    channels=384,
    grid=8,
)


def registry(folder: Path, checkpoint: Path | None = None) -> Registry:
    return Registry(InferenceSettings(aggregator="127.0.0.1:1", state_dir=folder, checkpoint=checkpoint, device="cpu"))


def release_on_disk(folder: Path, fingerprint: str) -> Path:
    message = feature_space_to_message(SPACE)
    message.fingerprint = fingerprint
    release = Release(federation="parts", version=3, kind=RELEASE_KIND_GLOBAL_MEMORY, feature_space=message)
    path = registry(folder)._path(release)
    path.write_bytes(release.SerializeToString())
    return path


async def test_a_good_release_is_kept_where_its_checkpoint_is_missing(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path, SPACE.fingerprint)
    started = registry(tmp_path, tmp_path / "missing.safetensors")
    await started.load()
    assert path.exists()
    assert not started.ready


async def test_a_good_release_is_kept_where_the_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path, SPACE.fingerprint)
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(b"no weights")
    started = registry(tmp_path, checkpoint)
    await started.load()
    assert path.exists()
    assert not started.ready


@pytest.mark.parametrize("fingerprint", ["", "0" * 64])
async def test_a_damaged_release_is_discarded(tmp_path: Path, fingerprint: str) -> None:
    path = release_on_disk(tmp_path, fingerprint)
    started = registry(tmp_path)
    await started.load()
    assert not path.exists()
    assert not started.ready
