"""Releases on disk at the start of an inference service: what is damaged goes, what only lacks a backbone stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.inference.registry import Registry
from services.inference.release_store import ReleaseStore
from services.inference.settings import InferenceSettings
from services.runtime.arrays import bank_to_wire, chunks
from services.runtime.errors import Refusal
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.fake_site import make_bank

ARRAYS = bank_to_wire(make_bank(), "float16")


def registry(folder: Path, checkpoint: Path | None = None) -> Registry:
    return Registry(InferenceSettings(aggregator="127.0.0.1:1", state_dir=folder, checkpoint=checkpoint, device="cpu"))


def release(version: int, fingerprint: str = SPACE.fingerprint, federation: str = "parts") -> Release:
    space = feature_space_to_message(SPACE)
    space.fingerprint = fingerprint
    manifests = [array.manifest for array in ARRAYS]
    return Release(
        federation=federation,
        version=version,
        kind=RELEASE_KIND_GLOBAL_MEMORY,
        feature_space=space,
        arrays=manifests,
    )


def release_on_disk(folder: Path, fingerprint: str = SPACE.fingerprint, federation: str = "parts") -> Path:
    store, kept = ReleaseStore(folder), release(3, fingerprint, federation)
    put_arrays(store)
    store.write(kept)
    return store._path(kept)


def put_arrays(store: ReleaseStore) -> None:
    for array in ARRAYS:
        store.arrays.put(array.manifest.sha256, array.data)


def flip(path: Path) -> None:
    """One bit of a file, as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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


async def test_a_release_whose_record_is_damaged_is_in_quarantine_and_is_taken_when_it_comes_again(
    tmp_path: Path,
) -> None:
    path, other = release_on_disk(tmp_path), release_on_disk(tmp_path, federation="screws")
    flip(path)
    [kept] = ReleaseStore(tmp_path).load()
    assert kept.release.federation == "screws"
    assert not path.exists()
    [damaged] = (path.parent / "quarantine").iterdir()
    assert damaged.name.endswith(path.name)
    assert other.exists()
    store = ReleaseStore(tmp_path)
    put_arrays(store)
    store.write(release(3))
    assert {kept.release.federation for kept in ReleaseStore(tmp_path).load()} == {"parts", "screws"}


async def test_an_array_that_is_damaged_takes_only_its_releases_along(tmp_path: Path) -> None:
    path = release_on_disk(tmp_path)
    store = ReleaseStore(tmp_path)
    own = bank_to_wire(make_bank(seed=1), "float16")
    screws = release(3, federation="screws")
    del screws.arrays[:]
    screws.arrays.extend(array.manifest for array in own)
    for array in own:
        store.arrays.put(array.manifest.sha256, array.data)
    store.write(screws)
    damaged = tmp_path / "arrays" / own[0].manifest.sha256.hex()
    flip(damaged)
    [kept] = ReleaseStore(tmp_path).load()
    assert kept.release.federation == "parts"
    assert path.exists()
    assert own[0].manifest.sha256 not in store.arrays  # so that it is fetched again
    assert len(list((tmp_path / "arrays" / "quarantine").iterdir())) == 1


async def test_what_an_interrupted_swap_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    release_on_disk(tmp_path)
    store = ReleaseStore(tmp_path)
    for array in bank_to_wire(make_bank(seed=1), "float16"):
        store.arrays.put(array.manifest.sha256, array.data)
    store.load()
    assert sorted(path.name for path in (tmp_path / "arrays").iterdir()) == sorted(
        array.manifest.sha256.hex() for array in ARRAYS
    )


async def test_the_release_that_came_last_is_served_although_a_kill_left_a_newer_one(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    put_arrays(store)
    for number, version in enumerate((4, 3)):  # rolled back, and killed before the newer one was forgotten
        store.write(release(version))
        os.utime(store._path(release(version)), (number, number))
    assert [kept.release.version for kept in store.load()] == [4, 3]


async def test_parts_of_arrays_that_nobody_goes_on_with_are_removed_at_the_next_start(tmp_path: Path) -> None:
    release_on_disk(tmp_path)
    store = ReleaseStore(tmp_path)
    [array, *_] = bank_to_wire(make_bank(seed=1), "float16")
    store.arrays.append(array.manifest, next(chunks(array.manifest.sha256, array.data[:10])))
    assert store.arrays.held_bytes(array.manifest) == 10
    [kept] = store.load()
    assert store.arrays.held_bytes(array.manifest) == 0
    assert all(manifest.sha256 in store.arrays for manifest in kept.release.arrays)
