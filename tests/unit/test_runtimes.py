"""Runtimes: all give torch's numbers, and what cannot run on one of them is refused or runs on another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from feddymem import runtimes
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.network import EMBEDDED_BACKBONE
from feddymem.openvino_runtime import openvino
from feddymem.runtimes import Compute, Precision, RuntimeName, compiled
from feddymem.search import screen_by_torch

SIDE = 32
SECONDS = 60
CPU = torch.device("cpu")
VIT = "vit_tiny_patch16_224"

Extractors = Callable[..., FeatureExtractor]


class Small(nn.Module):
    """A network that is exported in no time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.Hardswish(), nn.Conv2d(16, 4, 3))
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.layers(pixels / 255)
        return maps


class NotExportable(Small):
    """A network whose operations depend on what it sees."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels if float(pixels.mean()) > 0 else pixels + 1)


class Antialiased(Small):
    """A network of which OpenVINO leaves a part out without a word: the antialiasing."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(super().forward(pixels), (4, 4), mode="bicubic", antialias=True)


def pixels(count: int, side: int = SIDE) -> Tensor:
    return 255 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def by_openvino(network: nn.Module, key: str = "network", runtime: RuntimeName = "openvino") -> Compute:
    return compiled(network, SIDE, key, runtime, "float32", CPU).network


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert off(found, expected) < 1e-4
    assert found.dtype == expected.dtype == torch.float32


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == runtimes.__name__]


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two features, as a share of the largest of all."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all extractors of this module, so that each network is exported once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where graphs are kept; empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "feddymem" / "graphs"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the networks that were exported."""
    sides: list[int] = []
    export = runtimes.to_onnx

    def noted(network: nn.Module, side: int) -> bytes:
        sides.append(side)
        return export(network, side)

    monkeypatch.setattr(runtimes, "to_onnx", noted)
    return sides


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(backbone: str) -> Path | None:
        if backbone == EMBEDDED_BACKBONE:
            return None
        path = folder / f"{backbone}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            state = timm.create_model(backbone, pretrained=False).state_dict()
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        return path

    return checkpoint


@pytest.fixture
def extractors(kept: Path, checkpoints: Callable[[str], Path | None], monkeypatch: pytest.MonkeyPatch) -> Extractors:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))

    def load(backbone: str, runtime: RuntimeName, precision: Precision = "float32", **sizes: int) -> FeatureExtractor:
        return load_extractor(
            backbone, checkpoints(backbone), device="cpu", runtime=runtime, precision=precision, **sizes
        )

    return load


LAYOUTS: list[Any] = [
    pytest.param(EMBEDDED_BACKBONE, {"input_size": 64}, id="embedded"),
    pytest.param(EMBEDDED_BACKBONE, {"input_size": 96, "tile_size": 64, "tile_overlap": 16}, id="embedded, tiles"),
    pytest.param("resnet18", {"input_size": 64}, id="resnet18"),
    pytest.param(VIT, {"input_size": 224}, id="ViT"),
]


@pytest.mark.parametrize("runtime", ["openvino"])
@pytest.mark.parametrize(("backbone", "sizes"), LAYOUTS)
def test_every_runtime_gives_the_features_of_torch(
    backbone: str, sizes: dict[str, int], runtime: RuntimeName, extractors: Extractors
) -> None:
    expected, other = extractors(backbone, "torch", **sizes), extractors(backbone, runtime, **sizes)
    assert other.feature_space == expected.feature_space
    for count in (1, 3):
        images = pixels(count, sizes["input_size"])
        assert_same(other(images), expected(images))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("backbone", [EMBEDDED_BACKBONE, "resnet18"])
def test_bfloat16_moves_features_and_not_far(backbone: str, runtime: RuntimeName, extractors: Extractors) -> None:
    """Measured: 3 % of the largest feature at most."""
    if runtime == "openvino" and "BF16" not in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16; OpenVINO computes in float32")
    images = pixels(3, 64)
    expected = extractors(backbone, "torch", input_size=64)(images)
    found = extractors(backbone, runtime, "bfloat16", input_size=64)(images)
    assert found.dtype == torch.float32
    assert 1e-3 < off(found, expected) < 0.06


def test_the_runtime_asked_for_is_the_one_that_computes(folder: Path, exports: list[int]) -> None:
    network = Small()
    expected = network(pixels(2))
    assert torch.equal(by_openvino(network, runtime="torch")(pixels(2)), expected)
    assert exports == []
    assert_same(by_openvino(network, runtime="auto")(pixels(2)), expected)
    assert exports == [SIDE]


def test_a_batch_may_have_any_number_of_images(folder: Path) -> None:
    network = Small()
    maps = by_openvino(network)
    for count in (4, 1, 2, 9, 1):
        assert_same(maps(pixels(count)), network(pixels(count)))


def test_what_was_computed_stays_when_more_is(folder: Path) -> None:
    network = Small()
    maps = by_openvino(network)
    first = maps(pixels(2))
    maps(pixels(2).flip(0) / 2)
    assert_same(first, network(pixels(2)))


def test_pixels_need_not_lie_in_one_piece(folder: Path) -> None:
    network, images = Small(), pixels(4)[::2].flip(-1).transpose(2, 3)
    assert_same(by_openvino(network)(images), network(images))


def test_two_threads_may_use_one_extractor(folder: Path) -> None:
    network = Small()
    maps = by_openvino(network)
    together = threading.Barrier(2)

    def work(first: int) -> list[Tensor]:
        together.wait(SECONDS)
        return [maps(pixels(1 + (first + turn) % 5)) for turn in range(40)]

    with ThreadPoolExecutor(2) as pool:
        for first, results in zip((0, 2), pool.map(work, (0, 2)), strict=True):
            for turn, found in enumerate(results):
                assert_same(found, network(pixels(1 + (first + turn) % 5)))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_openvino_on_a_gpu_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"'openvino' computes on the CPU, and the device is 'cuda'; use 'torch'"):
        compiled(Small(), SIDE, "network", "openvino", "float32", torch.device(device))


NOT_FOR_OPENVINO = [
    pytest.param(NotExportable, "Could not guard|data-dependent|export", id="cannot be exported"),
    pytest.param(Antialiased, "its output differs from torch's by", id="would give other numbers"),
]


@pytest.mark.parametrize(("kind", "reason"), NOT_FOR_OPENVINO)
def test_a_network_that_openvino_cannot_run_is_refused_where_it_is_asked_for(
    kind: type[Small], reason: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=f"'openvino' cannot run this backbone; use 'torch': .*({reason})"):
        by_openvino(kind())
    assert not list(folder.glob("*"))


@pytest.mark.parametrize(("kind", "reason"), NOT_FOR_OPENVINO)
def test_a_network_that_openvino_cannot_run_runs_on_torch_by_default(
    kind: type[Small], reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = kind()
    with caplog.at_level(logging.WARNING, runtimes.__name__):
        maps = by_openvino(network, runtime="auto")
    [warning] = warnings_of(caplog)
    assert warning.startswith("OpenVINO cannot run this backbone, torch computes it: ")
    assert torch.equal(maps(pixels(2)), network(pixels(2)))


@pytest.mark.parametrize("size", [64, 240])
def test_a_vit_of_another_size_than_it_was_made_for_has_the_features_of_torch(
    size: int, extractors: Extractors
) -> None:
    """OpenVINO brings the places of its patches to the size in another way."""
    images = pixels(2, size)
    expected = extractors(VIT, "torch", input_size=size)(images)
    assert_same(extractors(VIT, "auto", input_size=size)(images), expected)


def test_an_exported_network_is_used_again(folder: Path, exports: list[int]) -> None:
    network = Small()
    by_openvino(network)
    [path] = folder.iterdir()
    written = path.stat().st_mtime_ns
    assert_same(by_openvino(network)(pixels(2)), network(pixels(2)))
    assert exports == [SIDE]
    assert [(p, p.stat().st_mtime_ns) for p in folder.iterdir()] == [(path, written)]


def test_a_network_that_was_exported_when_it_was_installed_is_used(
    tmp_path: Path, folder: Path, exports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Small()
    by_openvino(network)
    folder.parent.rename(tmp_path / "installed")
    monkeypatch.setattr(runtimes, "installed_folder", lambda: tmp_path / "installed")
    assert_same(by_openvino(network)(pixels(2)), network(pixels(2)))
    assert exports == [SIDE]
    assert not folder.exists()


def test_networks_of_other_weights_or_sizes_are_exported_on_their_own(folder: Path, exports: list[int]) -> None:
    for key, side in (("one", 32), ("other", 32), ("one", 48)):
        compiled(Small(), side, key, "openvino", "float32", CPU)
    assert exports == [32, 32, 48]
    assert len(list(folder.iterdir())) == 3


def changed(content: bytes) -> bytes:
    """One bit of a weight, so that it is a graph still."""
    middle = len(content) * 3 // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(changed, id="changed"),
        pytest.param(lambda content: b"no graph at all", id="something else"),
    ],
)
def test_a_damaged_graph_is_exported_again(damage: Callable[[bytes], bytes], folder: Path, exports: list[int]) -> None:
    network = Small()
    by_openvino(network)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert_same(by_openvino(network)(pixels(2)), network(pixels(2)))
    by_openvino(network)
    assert exports == [SIDE, SIDE]
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_only_warned_of(
    folder: Path, exports: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_bytes(b"a file where the folder should be")
    network = Small()
    with caplog.at_level(logging.WARNING, runtimes.__name__):
        maps = by_openvino(network)
    assert_same(maps(pixels(2)), network(pixels(2)))
    [warning] = warnings_of(caplog)
    assert warning.startswith("the exported network cannot be kept")


def test_a_graph_that_cannot_be_moved_to_its_place_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING, runtimes.__name__):
        by_openvino(Small())
    [warning] = warnings_of(caplog)
    assert "no space left on device" in warning
    assert list(folder.iterdir()) == []


LOADED = """
import os
import sys
from pathlib import Path
import torch
from feddymem.runtimes import compiled
network = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
maps = compiled(network, 32, "network", "openvino", "float32", torch.device("cpu")).network
maps(torch.zeros(1, 3, 32, 32))
print([name for name in sys.modules if "openvino_telemetry." in name], os.listdir(Path.home()))
"""


def test_openvino_sets_up_no_telemetry(tmp_path: Path) -> None:
    """As it does when it is imported: with an ID of the user, which it keeps in the home folder."""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env=os.environ | home, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[] ['cache']\n"


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.usefixtures("folder")
def test_torch_screens_where_the_processor_has_tiles(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_tiles", lambda: tiles)
    screen = compiled(Small(), SIDE, "network", "openvino", "float32", CPU).screen
    assert (screen is screen_by_torch) == tiles
