"""An inference service whose operator rolls back: each global memory has a memory generator to go with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from services.aggregator.settings import FederationSettings
from services.inference.registry import GENERATORS_KEPT, Registry
from services.inference.settings import InferenceSettings
from services.runtime.arrays import WireArray, bank_to_wire
from services.runtime.errors import Refusal
from services.runtime.messages import feature_space_to_message, generator_to_wire
from tests.samples import growth


class Line:
    """The inference service of a site, over its restarts, and what its publishers send it."""

    def __init__(self, folder: Path, extractor: FeatureExtractor) -> None:
        self._folder, self.space = folder, extractor.feature_space
        self.registry = self._started()
        self.learn(extractor)

    def learn(self, extractor: FeatureExtractor) -> None:
        """It has this backbone, too."""
        self.registry._scorers._extractors[extractor.feature_space.fingerprint] = extractor

    def _started(self) -> Registry:
        settings = InferenceSettings(aggregator="127.0.0.1:1", state_dir=self._folder, device="cpu", max_batch=1)
        return Registry(settings)

    async def restart(self) -> None:
        extractors = self.registry._scorers._extractors
        self.registry = self._started()
        self.registry._scorers._extractors = extractors
        await self.registry.load()

    async def memory(self, version: int, needs_generator: bool = True, shadow: bool = False) -> None:
        """The aggregator publishes a global memory."""
        rng = np.random.default_rng(version)
        items = rng.normal(size=(9, self.space.channels)).astype(np.float32)
        bank = MemoryBank(items, np.ones((9, 1), np.float32), np.ones(9, np.float32))
        fields = {"needs_generator": needs_generator, "shadow": shadow}
        await self._receive(version, bank_to_wire(bank, "float16"), kind=RELEASE_KIND_GLOBAL_MEMORY, **fields)

    async def generator(self, version: int, site: str = "a") -> None:
        """The edge client publishes its generator: its scale is the version, so that a test can tell which it is."""
        torch.manual_seed(0)
        generator = MemoryGenerator(self.space.channels, self.space.grid, scale=version + 1)
        await self._receive(version, generator_to_wire(generator), kind=RELEASE_KIND_MEMORY_GENERATOR, site=site)

    async def _receive(self, version: int, arrays: list[WireArray], **fields: Any) -> None:
        for array in arrays:
            self.registry.arrays.put(array.manifest.sha256, array.data)
        release = Release(
            federation="parts",
            version=version,
            feature_space=feature_space_to_message(self.space),
            arrays=[array.manifest for array in arrays],
            **fields,
        )
        await self.registry.receive(release)

    def pair(self, site: str = "a") -> tuple[int, int]:
        """Versions of the global memory and the memory generator that score."""
        active = self.registry.find("parts", site)
        assert active.scorer._generator is not None
        return active.release, round(float(active.scorer._generator.scale)) - 1


@pytest.fixture
def line(tmp_path: Path, small: FeatureExtractor) -> Line:
    return Line(tmp_path, small)


async def test_back_and_forth_over_restarts(line: Line) -> None:
    for version in range(1, 6):
        await line.generator(version)
        await line.memory(version)
    await line.generator(6)  # of the round that is open
    assert line.pair() == (5, 5)
    await line.memory(2)
    assert line.pair() == (2, 2)
    await line.restart()
    assert line.pair() == (2, 2)
    await line.memory(5)
    assert line.pair() == (5, 5)
    await line.memory(6)
    assert line.pair() == (6, 6)
    await line.restart()
    assert line.pair() == (6, 6)


async def test_a_memory_generator_that_comes_is_no_swap_of_the_release(line: Line) -> None:
    swaps = growth("release_swaps_total")
    await line.memory(2)
    assert swaps() == [0], "nothing to score with yet"
    for generator, pair in ((1, (2, 1)), (2, (2, 2))):
        await line.generator(generator)
        assert (line.pair(), swaps()) == (pair, [1])
    await line.memory(3)
    assert (line.pair(), swaps()) == ((3, 2), [2])


async def test_where_all_generators_are_newer_the_oldest_scores_and_the_log_says_so(line: Line) -> None:
    for version in (7, 8):
        await line.generator(version)
    with capture_logs() as logs:
        await line.memory(3)
    assert line.pair() == (3, 7)
    [said] = [entry for entry in logs if entry["event"] == "generator_newer_than_memory"]
    assert (said["site"], said["release"], said["generator"], said["log_level"]) == ("a", 3, 7, "warning")
    await line.restart()
    assert (line.pair(), line.registry.ready) == ((3, 7), True)
    with capture_logs() as logs:
        await line.memory(8)
    assert line.pair() == (8, 8)
    assert "generator_newer_than_memory" not in {entry["event"] for entry in logs}


async def test_as_many_generators_are_kept_as_releases_can_be_activated_and_one_more(
    line: Line, tmp_path: Path
) -> None:
    assert FederationSettings().keep_releases + 1 == GENERATORS_KEPT
    for version in range(1, GENERATORS_KEPT + 4):
        await line.generator(version)
    assert len(list((tmp_path / "releases").iterdir())) == GENERATORS_KEPT
    await line.memory(1)
    assert line.pair() == (1, 4)


async def test_a_federation_that_begins_anew_is_followed_from_its_first_round_on(line: Line) -> None:
    for version in range(1, GENERATORS_KEPT + 4):
        await line.generator(version)
        await line.memory(version)
    for version in (1, 2):  # the aggregator has lost its disk
        await line.generator(version)
        assert line.pair()[0] == (GENERATORS_KEPT + 3 if version == 1 else 1)
        await line.memory(version)
        assert line.pair() == (version, version)
        await line.restart()
        assert line.pair() == (version, version)


async def test_an_untrained_generator_takes_the_place_of_no_trained_one(line: Line) -> None:
    await line.generator(2)
    await line.memory(2)
    await line.generator(0)
    assert line.pair() == (2, 2)
    await line.restart()
    assert line.pair() == (2, 2)
    await line.generator(0, site="b")
    assert (line.pair("a"), line.pair("b")) == ((2, 2), (2, 0))


@pytest.mark.parametrize("pattern", ["*-1-*", "*-2-*"], ids=["memory", "generator"])
async def test_a_site_whose_release_was_damaged_is_told_to_come_again_and_others_that_they_are_unknown(
    line: Line, tmp_path: Path, pattern: str
) -> None:
    await line.generator(1)
    await line.memory(1)
    [record] = (tmp_path / "releases").glob(pattern)
    record.write_bytes(b"damaged")
    await line.restart()
    with pytest.raises(Refusal) as refused:
        line.pair()
    assert refused.value.status is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Refusal) as refused:
        line.registry.find("boats", "a")
    assert refused.value.status is grpc.StatusCode.NOT_FOUND
    await (line.generator(1) if pattern == "*-2-*" else line.memory(1))
    assert line.pair() == (1, 1)
    with pytest.raises(Refusal) as refused:
        line.pair("b")
    assert refused.value.status is grpc.StatusCode.NOT_FOUND


async def test_a_generator_of_other_weights_scores_nothing_and_the_other_sites_go_on(line: Line) -> None:
    own = line.space
    line.space = dataclasses.replace(own, weights_sha256="0" * 64)
    await line.generator(1)
    line.space = own
    with capture_logs() as logs:
        await line.memory(1)
    [said] = [entry for entry in logs if entry["event"] == "generator_refused"]
    assert (said["site"], f"weights_sha256: {own.weights_sha256} against 000" in said["reason"]) == ("a", True)
    assert not line.registry.ready
    await line.generator(1, site="b")
    assert (line.pair("b"), line.registry.ready) == ((1, 1), True)
    with pytest.raises(Refusal, match="no release ready for site 'a'"):
        line.pair("a")
