"""Releases on disk at the start of an inference service: what is damaged goes, what only lacks a backbone stays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feddymem.backbone import load_extractor
from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.feature_space import FingerprintMismatchError
from feddymem.memory import MemoryBank
from feddymem.sketch import ScoreSketch
from feddymem.v1.calibration_pb2 import Calibration as CalibrationMessage
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.inference.registry import Registry
from services.inference.release_store import ReleaseStore
from services.inference.settings import InferenceSettings
from services.runtime.arrays import bank_to_wire, chunks
from services.runtime.errors import Refusal
from services.runtime.messages import calibration_to_message, feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.fake_site import make_bank
from tests.samples import growth, sample

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


CALIBRATION = calibration_to_message(
    Calibration.of({site_key("parts", "north"): SiteCalibration(*[ScoreSketch.of([3.0, 4.0, 5.0])] * 2)}, 0.05)
)


async def scoring(folder: Path) -> Registry:
    """A registry with a calibrated release that scores."""
    started = small_registry(folder)
    await started.receive(small_release(started, 3, calibration=CALIBRATION))
    return started


def small_registry(folder: Path) -> Registry:
    return Registry(InferenceSettings(aggregator="127.0.0.1:1", state_dir=folder, device="cpu"))


def small_release(registry: Registry, version: int, seed: int = 0, input_size: int = 32, **fields: Any) -> Release:
    """A release of the embedded backbone at a small size, whose arrays are in the store."""
    space = load_extractor(input_size=input_size, device="cpu").feature_space
    items = np.random.default_rng(seed).normal(size=(20, space.channels)).astype(np.float32)
    arrays = bank_to_wire(MemoryBank(items, np.ones((20, 1), np.float32), np.ones(20, np.float32)), "float16")
    for array in arrays:
        registry.arrays.put(array.manifest.sha256, array.data)
    return Release(
        federation="parts",
        version=version,
        kind=RELEASE_KIND_GLOBAL_MEMORY,
        feature_space=feature_space_to_message(space),
        arrays=[array.manifest for array in arrays],
        **fields,
    )


async def test_a_release_comes_with_what_its_calibration_says_and_has_it_after_a_restart(tmp_path: Path) -> None:
    started = await scoring(tmp_path)
    for each in (started, small_registry(tmp_path)):
        await each.load()
        limits = each.find("parts", "north").limits("north")
        assert limits is not None
        assert (limits.scores.images, limits.scores.rate) == (3, 0.25)


async def test_a_release_without_a_calibration_scores_as_before(tmp_path: Path) -> None:
    started = small_registry(tmp_path)
    await started.receive(small_release(started, 3))
    again = small_registry(tmp_path)
    await again.load()
    assert again.find("parts", "north").limits("north") is None


def broken_calibrations() -> Iterator[CalibrationMessage]:
    for damage in (
        lambda message: message.sites[0].calibration.scores.levels.append(-7),
        lambda message: message.sites[0].calibration.peaks.counts.pop(),
        lambda message: message.sites[0].calibration.peaks.counts.__setitem__(0, 2),
        lambda message: setattr(message, "false_alarm_rate", 0.0),
        lambda message: setattr(message, "false_alarm_rate", float("nan")),
    ):
        message = CalibrationMessage.FromString(CALIBRATION.SerializeToString())
        damage(message)
        yield message


@pytest.mark.parametrize("broken", list(broken_calibrations()))
async def test_a_release_with_a_calibration_that_no_sites_make_is_refused(
    tmp_path: Path, broken: CalibrationMessage
) -> None:
    started = await scoring(tmp_path)
    for shadow in (False, True):
        with pytest.raises(Refusal, match="calibration"):
            await started.receive(small_release(started, 4, calibration=broken, shadow=shadow))
        assert started.find("parts", "").release == 3


async def test_a_shadow_is_beside_the_active_release_until_it_ends_and_is_not_on_disk(tmp_path: Path) -> None:
    started = await scoring(tmp_path)
    shadow = small_release(started, 2, seed=1, calibration=CALIBRATION, shadow=True)
    await started.receive(shadow)
    active = started.find("parts", "north")
    assert active.release == 3
    assert active.lines.shadow is not None
    assert active.lines.shadow.release == 2
    assert active.lines.shadow.scorer("") is not active.scorer
    [items] = [array for array in shadow.arrays if array.name == "items"]
    assert items.sha256 not in started.arrays
    assert len(list((tmp_path / "releases").glob("*.binpb"))) == 1
    again = small_registry(tmp_path)
    await again.load()
    assert again.find("parts", "north").lines.shadow is None

    await started.receive(small_release(started, 5, seed=2, calibration=CALIBRATION))
    newer = started.find("parts", "north")
    assert newer.release == 5
    assert newer.lines.shadow is not None
    assert newer.lines.shadow.release == 2
    await started.receive(Release(federation="parts", kind=RELEASE_KIND_GLOBAL_MEMORY, shadow=True))
    assert newer.lines.shadow is None


async def test_a_shadow_that_is_also_active_leaves_its_arrays_where_they_are(tmp_path: Path) -> None:
    started = await scoring(tmp_path)
    await started.receive(small_release(started, 3, calibration=CALIBRATION, shadow=True))
    again = small_registry(tmp_path)
    await again.load()
    assert again.find("parts", "").release == 3


async def test_a_shadow_that_comes_first_waits_for_a_release(tmp_path: Path) -> None:
    started = small_registry(tmp_path)
    await started.receive(small_release(started, 2, seed=1, calibration=CALIBRATION, shadow=True))
    assert not started.ready
    await started.receive(small_release(started, 3, calibration=CALIBRATION))
    active = started.find("parts", "")
    assert active.release == 3
    assert active.lines.shadow is not None


async def test_lines_are_the_same_while_the_release_is(tmp_path: Path) -> None:
    started = await scoring(tmp_path)
    lines = started.find("parts", "").lines
    await started.receive(small_release(started, 3, calibration=CALIBRATION))
    assert started.find("parts", "").lines is lines
    await started.receive(small_release(started, 4, calibration=CALIBRATION))
    assert started.find("parts", "").lines is not lines


async def test_a_swap_is_counted_and_shown_where_another_release_scores(tmp_path: Path) -> None:
    def seen() -> tuple[float | None, ...]:
        names = ("release_version", "release_timestamp_seconds")
        return *swaps(), *(sample(f"serving_{name}", federation="parts") for name in names)

    swaps, started = growth("release_swaps_total"), small_registry(tmp_path)
    first = small_release(started, 3)

    async def come(version: int, shadow: bool = False) -> None:
        release = Release(version=version, shadow=shadow)
        release.created.FromMilliseconds(1000 * version + 250)
        await started.receive(Release.FromString(first.SerializeToString() + release.SerializeToString()))

    for version, count in ((3, 1), (3, 1), (4, 2), (2, 3)):  # the same again, the next, and back
        await come(version)
        assert seen() == (count, version, version + 0.25)
    await come(5, shadow=True)
    assert seen() == (3, 2, 2.25)
    again = small_registry(tmp_path)
    await again.load()
    assert seen() == (4, 2, 2.25)


async def test_a_release_of_other_weights_than_those_of_the_backbone_is_refused(tmp_path: Path) -> None:
    started = small_registry(tmp_path)
    foreign = small_release(started, 3)
    space = load_extractor(input_size=32, device="cpu").feature_space
    foreign.feature_space.CopyFrom(feature_space_to_message(dataclasses.replace(space, weights_sha256="0" * 64)))
    with pytest.raises(FingerprintMismatchError, match=f"weights_sha256: {space.weights_sha256} against {'0' * 64}"):
        await started.receive(foreign)
    assert not started.ready
    assert not list((tmp_path / "releases").glob("*.binpb"))
