"""Releases on disk at the start of an inference service: what is damaged goes, what only lacks a backbone stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.inference.registry import Registry
from services.inference.settings import InferenceSettings
from services.runtime.errors import Refusal
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE


def registry(folder: Path, checkpoint: Path | None = None) -> Registry:
    return Registry(InferenceSettings(aggregator="127.0.0.1:1", state_dir=folder, checkpoint=checkpoint, device="cpu"))


def release(version: int, fingerprint: str = SPACE.fingerprint) -> Release:
    space = feature_space_to_message(SPACE)
    space.fingerprint = fingerprint
    return Release(federation="parts", version=version, kind=RELEASE_KIND_GLOBAL_MEMORY, feature_space=space)


def release_on_disk(folder: Path, fingerprint: str = SPACE.fingerprint) -> Path:
    kept = release(3, fingerprint)
    path = registry(folder)._path(kept)
    path.write_bytes(kept.SerializeToString())
    return path


async def test_a_good_release_is_kept_where_its_checkpoint_is_missing(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path)
    started = registry(tmp_path, tmp_path / "missing.safetensors")
    await started.load()
    assert path.exists()
    assert not started.ready


async def test_a_good_release_is_kept_where_the_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path)
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


async def test_a_release_that_is_refused_on_arrival_leaves_the_one_before_where_it_is(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path)
    started = registry(tmp_path, tmp_path / "missing.safetensors")
    await started.load()
    for refused in (release(4), release(5, fingerprint="0" * 64)):
        with pytest.raises(Refusal):
            await started.receive(refused)
    assert list(path.parent.glob("*.binpb")) == [path]
