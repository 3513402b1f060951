"""Global memories that no memory generator fits yet, and releases that are said again: what scores goes on scoring."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from feddymem.backbone import FeatureExtractor, load_extractor
from services.inference.lines import Shadow
from services.inference.registry import Registry
from services.inference.scorers import Scorers
from services.runtime.errors import Refusal
from tests.unit.test_rollback import Line


@pytest.fixture
def line(tmp_path: Path, small: FeatureExtractor) -> Line:
    return Line(tmp_path, small)


@pytest.fixture
def other() -> FeatureExtractor:
    """Of another feature space."""
    return load_extractor(input_size=48, device="cpu")


def move(line: Line, extractor: FeatureExtractor) -> None:
    """What is published from here on is of this feature space."""
    line.learn(extractor)
    line.space = extractor.feature_space


def records(folder: Path) -> list[str]:
    """Kind and version of the releases on disk."""
    return sorted(path.stem.partition("-")[2] for path in (folder / "releases").glob("*.binpb"))


async def test_a_memory_of_another_feature_space_waits_for_its_generator_while_the_one_before_scores(
    line: Line, other: FeatureExtractor, tmp_path: Path
) -> None:
    await line.generator(1)
    await line.memory(1)
    move(line, other)
    await line.memory(2)
    assert (line.pair(), records(tmp_path)) == ((1, 1), ["1-0000000001", "2-0000000001"])
    await line.restart()
    assert (line.pair(), line.registry.ready) == ((1, 1), True)
    await line.memory(2)  # is sent again
    await line.generator(2)
    assert line.pair() == (2, 2)
    assert "1-0000000001" not in records(tmp_path)
    await line.restart()
    assert line.pair() == (2, 2)


async def test_a_memory_that_waits_is_overtaken_by_a_newer_one_or_ends_with_a_rollback(
    line: Line, other: FeatureExtractor
) -> None:
    before = line.space
    await line.generator(1)
    await line.memory(1)
    held = stored(line.registry)
    move(line, other)
    await line.memory(2)
    two = stored(line.registry)
    await line.memory(3)
    assert len(stored(line.registry)) == len(two) > len(held)
    line.space = before
    await line.memory(1)
    assert stored(line.registry) == held
    move(line, other)
    await line.generator(3)
    assert line.pair() == (1, 1)


async def test_a_first_memory_that_needs_a_generator_waits_while_one_that_needs_none_scores(line: Line) -> None:
    await line.memory(1, needs_generator=False)
    await line.memory(2)
    for site in ("", "a"):
        assert line.registry.find("parts", site).release == 1
    await line.generator(2)
    assert line.pair() == (2, 2)
    assert [active.site for active in line.registry.active()] == ["a"]
    with pytest.raises(Refusal) as refused:
        line.registry.find("parts", "b")
    assert refused.value.status is grpc.StatusCode.NOT_FOUND


async def test_nothing_is_left_of_a_memory_with_generators_after_one_without(line: Line) -> None:
    await line.generator(1)
    await line.memory(1)
    await line.memory(2, needs_generator=False)
    assert [(active.site, active.release) for active in line.registry.active()] == [("", 2)]
    await line.memory(1)
    assert [(active.site, active.release) for active in line.registry.active()] == [("a", 1)]


async def test_what_is_said_again_is_not_built_again_and_not_written_again(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say() -> None:
        await line.generator(1)
        await line.memory(2)
        await line.memory(1, shadow=True)

    await say()
    active, shadow, files = line.registry.find("parts", "a"), shadow_of(line), written(tmp_path)
    with monkeypatch.context() as patched:
        patched.delattr(Scorers, "build")
        await say()
    assert line.registry.find("parts", "a") is active
    assert shadow_of(line) is shadow
    assert written(tmp_path) == files


async def test_what_is_said_again_is_written_where_it_is_not_on_disk(line: Line, tmp_path: Path) -> None:
    await line.generator(1)
    await line.memory(1)
    for path in (tmp_path / "releases").glob("*.binpb"):
        path.unlink()
    await line.generator(1)
    await line.memory(1)
    await line.restart()
    assert line.pair() == (1, 1)


async def test_a_shadow_keeps_its_counts_when_a_generator_comes_but_not_beside_another_release(line: Line) -> None:
    await line.generator(1)
    await line.memory(2)
    await line.memory(1, shadow=True)
    before, scorer = shadow_of(line), shadow_of(line).scorer("a")
    before.count("a", alarm=True, active_alarm=True)
    await line.generator(2)
    assert shadow_of(line).counts("a").total() == 1
    assert shadow_of(line).scorer("a") is not scorer
    await line.memory(3)
    assert shadow_of(line).counts("a").total() == 0


def shadow_of(line: Line) -> Shadow:
    shadow = line.registry.find("parts", "a").lines.shadow
    assert shadow is not None
    return shadow


def stored(registry: Registry) -> set[str]:
    """Names of the arrays on disk."""
    return {path.name for path in registry.arrays._folder.iterdir()}


def written(folder: Path) -> dict[str, int]:
    """When each release was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "releases").iterdir()}
