"""Networks: the layers wanted of CNNs, a ViT and a Swin, with the weights of a file, and never of the model hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from feddymem.backbone import load_extractor
from feddymem.network import Network, load_network

RESNET, VIT, SWIN, MIXER = "resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"
CONVNEXT = "convnext_atto"
"""timm's wrapper flattens its names: `stages.0` becomes `stages_0`."""

Checkpoints = Callable[[str], Path]


def model(backbone: str, seed: int = 0) -> Any:
    """A whole model with random weights."""
    torch.manual_seed(seed)
    return timm.create_model(backbone, pretrained=False).eval()


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def maps_of(network: Network, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found: list[Tensor] = network.module(images)
    return found


def photographs(size: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations of models whose pretrained weights timm was asked for; it does not get to its hub."""
    configurations: list[Any] = []

    def record(module: Any, pretrained_cfg: Any, **others: Any) -> None:
        configurations.append(pretrained_cfg)

    monkeypatch.setattr("timm.models._builder.load_pretrained", record)
    return configurations


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(backbone: str) -> Path:
        path = folder / f"{backbone}.safetensors"
        return path if path.exists() else saved(path, model(backbone).state_dict())

    return checkpoint


@pytest.mark.parametrize(
    ("backbone", "layers", "reductions", "channels"),
    [
        (RESNET, (2, 3), (8, 16), (128, 256)),
        (CONVNEXT, (1, 2), (8, 16), (80, 160)),
        (VIT, (5, 8), (16, 16), (192, 192)),
        (SWIN, (1, 2), (8, 16), (192, 384)),
    ],
)
def test_the_weights_of_a_file_give_the_layers_of_the_model_itself(
    backbone: str,
    layers: tuple[int, ...],
    reductions: tuple[int, ...],
    channels: tuple[int, ...],
    checkpoints: Checkpoints,
    asked: list[Any],
) -> None:
    network, images = load_network(backbone, checkpoints(backbone)), photographs(224, 2)
    assert (network.layers, network.reductions, network.channels) == (layers, reductions, channels)
    maps = maps_of(network, images)
    assert [tuple(m.shape) for m in maps] == [
        (2, c, 224 // r, 224 // r) for c, r in zip(channels, reductions, strict=True)
    ]
    with torch.inference_mode():
        expected = model(backbone).forward_intermediates(images, indices=list(layers), intermediates_only=True)
    for mine, own in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)
    assert not asked


def test_a_network_is_frozen(checkpoints: Checkpoints) -> None:
    module = load_network(VIT, checkpoints(VIT)).module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("backbone", "size"), [(CONVNEXT, 96), (VIT, 96), (VIT, 320), (SWIN, 96)])
def test_the_grid_follows_the_input_size(backbone: str, size: int, checkpoints: Checkpoints) -> None:
    extractor = load_extractor(backbone, checkpoints(backbone), input_size=size, device="cpu")
    space = extractor.feature_space
    assert space.grid == size // min(space.reductions)
    features = extractor(photographs(size))
    assert tuple(features.shape) == (1, space.grid**2, space.channels)
    assert bool(features.isfinite().all())


def test_the_weights_of_a_vit_do_not_depend_on_the_input_size(checkpoints: Checkpoints) -> None:
    small, large = (load_extractor(VIT, checkpoints(VIT), size, device="cpu").feature_space for size in (96, 224))
    assert small.weights_sha256 == large.weights_sha256
    assert small.fingerprint != large.fingerprint


@pytest.mark.parametrize("backbone", [RESNET, CONVNEXT, VIT])
def test_other_weights_make_another_feature_space(backbone: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    other = saved(tmp_path / "other.safetensors", model(backbone, seed=1).state_dict())
    first, second, again = (
        load_extractor(backbone, path, input_size=64, device="cpu").feature_space
        for path in (checkpoints(backbone), other, checkpoints(backbone))
    )
    assert first.weights_sha256 != second.weights_sha256
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    ("backbone", "behind"),
    [
        (RESNET, ("layer4.", "fc.")),
        (CONVNEXT, ("stages.3.", "norm_pre.", "head.")),
        (VIT, ("blocks.11.", "norm.", "head.")),
    ],
)
def test_weights_behind_the_layers_used_do_not_matter(
    backbone: str, behind: tuple[str, ...], tmp_path: Path, checkpoints: Checkpoints
) -> None:
    state = {name: tensor for name, tensor in model(backbone).state_dict().items() if not name.startswith(behind)}
    trimmed = saved(tmp_path / "trimmed.safetensors", state)
    assert load_network(backbone, trimmed).weights_sha256 == (
        load_network(backbone, checkpoints(backbone)).weights_sha256
    )


@pytest.mark.parametrize(
    ("backbone", "other"),
    [
        (RESNET, VIT),
        (VIT, RESNET),
        (VIT, "deit_tiny_distilled_patch16_224"),
        (RESNET, "resnet50"),
        (CONVNEXT, RESNET),
        (CONVNEXT, "convnext_femto"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(backbone: str, other: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint .*{other}\.safetensors is not one of '{backbone}'"):
        load_network(backbone, checkpoints(other))


@pytest.mark.parametrize("content", [b"", np.random.default_rng(0).bytes(4096)])
def test_a_checkpoint_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint {path} is not one of '{RESNET}'"):
        load_network(RESNET, path)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone 'vit_tinny' is not a timm model"):
        load_network("vit_tinny")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors does not exist"):
        load_network(VIT, tmp_path / "missing.safetensors")


def test_without_a_checkpoint_timm_is_asked_for_the_weights(asked: list[Any]) -> None:
    load_network(RESNET)
    assert [configuration["architecture"] for configuration in asked] == [RESNET]


def test_a_network_of_one_size_refuses_any_other(checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"'mixer_s32_224' does not take images of 448 x 448 pixels: .*\(448\)"):
        load_extractor(MIXER, checkpoints(MIXER), input_size=448, device="cpu")


def test_a_network_of_one_size_takes_large_images_in_tiles(checkpoints: Checkpoints) -> None:
    extractor = load_extractor(MIXER, checkpoints(MIXER), input_size=448, tile_size=224, device="cpu")
    space = extractor.feature_space
    assert (space.layers, space.reductions, space.grid) == ((3, 5), (32, 32), 14)
    assert tuple(extractor(photographs(448)).shape) == (1, 14 * 14, 2 * 512)


def test_sizes_are_multiples_of_the_networks_own_patches(checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match="input_size is 240; it must be a multiple of 32, at least 64"):
        load_extractor(MIXER, checkpoints(MIXER), input_size=240, device="cpu")
