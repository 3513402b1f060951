"""The backbone: real ImageNet weights, features that depend on the image alone, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn
from torch.nn import functional

from feddymem import network
from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.feature_network import MapNetwork, PatchFeatures
from feddymem.image_data import RawImage
from feddymem.network import EMBEDDED_BACKBONE, Network
from tests.feature_spaces import SPACE

ESPRESSO, CATS, MISSILE = {967}, {281, 282, 283, 284, 285}, {657}


@pytest.fixture(scope="module")
def embedded() -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in network._embedded_state().items()}


def photograph(size: tuple[int, int] = (50, 80), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


class Maps(nn.Module):
    """A network of two given feature maps, the same for every image."""

    def __init__(self, fine: Tensor, coarse: Tensor) -> None:
        super().__init__()
        self.maps = [fine, coarse]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [m.expand(len(images), -1, -1, -1) for m in self.maps]


@pytest.mark.parametrize(
    ("name", "classes"),
    [("coffee", ESPRESSO), ("chelsea", CATS), ("rocket", MISSILE)],
)
def test_the_embedded_weights_know_the_classes_of_imagenet(
    name: str, classes: set[int], embedded: dict[str, Tensor]
) -> None:
    model = timm.create_model(EMBEDDED_BACKBONE, pretrained=False).eval()
    model.load_state_dict(embedded, strict=True)
    photo = getattr(data, name)()
    margins = [(side - min(photo.shape[:2])) // 2 for side in photo.shape[:2]]
    square = photo[margins[0] :, margins[1] :][: min(photo.shape[:2]), : min(photo.shape[:2])]
    pixels = torch.tensor(square).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    with torch.inference_mode():
        assert int(model((resized - 127) / 128).argmax()) in classes


def test_the_default_feature_space_is_the_documented_one(extractor: FeatureExtractor) -> None:
    space = extractor.feature_space
    assert (space.backbone, space.reductions, space.input_size) == ("tf_efficientnet_lite0", (8, 16), 224)
    assert (space.mean, space.std) == ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
    assert (space.channels, space.grid, space.layers) == (152, 28, (2, 3))
    assert (space.tile_size, space.tile_overlap) == (224, 0)
    assert (space.pooling, space.context_weight, space.border_weight) == (11, 1.25, 0.6875)


def test_the_default_fingerprint_is_that_of_earlier_versions(extractor: FeatureExtractor) -> None:
    """Kept banks and releases carry it: changing the default feature space orphans them."""
    assert extractor.feature_space.fingerprint == "ac5ecec5118d9bb4e2c134cc8f81f55870d6a3f6410108593c7c5c29eb74a8be"


def test_features_have_the_shape_of_the_feature_space(extractor: FeatureExtractor) -> None:
    features = extractor(torch.stack([extractor.prepare(photograph(seed=seed)) for seed in range(2)]))
    assert (tuple(features.shape), features.dtype) == ((2, 28 * 28, 152), torch.float32)
    assert features.is_contiguous()
    assert bool(features.isfinite().all())


def test_features_of_an_image_are_the_same_alone_and_in_a_batch(extractor: FeatureExtractor) -> None:
    batch = torch.stack([extractor.prepare(photograph(seed=seed)) for seed in range(3)])
    together = extractor(batch)
    for index in range(3):
        torch.testing.assert_close(extractor(batch[index : index + 1])[0], together[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [64, 96])
def test_the_grid_follows_the_input_size(size: int) -> None:
    other = load_extractor(input_size=size, device="cpu")
    assert other.feature_space.grid == size // 8
    assert tuple(other(other.prepare(photograph())[None]).shape) == (1, (size // 8) ** 2, 152)


def test_a_prepared_image_has_the_values_of_the_pixels(extractor: FeatureExtractor) -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :, 0], image[:, :, 1], image[:, :, 2] = 255, 127, 0
    prepared = extractor.prepare(image)
    assert (tuple(prepared.shape), prepared.dtype) == ((3, 224, 224), torch.float32)
    for channel, value in enumerate((255.0, 127.0, 0.0)):
        torch.testing.assert_close(prepared[channel], torch.full((224, 224), value))


def test_the_whole_image_is_stretched_to_the_square(extractor: FeatureExtractor) -> None:
    image = np.zeros((60, 300, 3), np.uint8)
    image[:, 150:] = 254
    prepared = extractor.prepare(image)[0]
    assert prepared[:, :110].max() < 10
    assert prepared[:, 114:].min() > 240


def test_fine_detail_is_averaged_when_an_image_is_made_smaller(extractor: FeatureExtractor) -> None:
    """Without antialiasing, it would come out as a pattern that is not there."""
    stripes = np.zeros((224 * 5, 224 * 5, 3), np.uint8)
    stripes[:, ::2] = 254
    assert (extractor.prepare(stripes) - 127).abs().max() < 20


def test_8_and_16_bit_pixels_of_the_same_value_are_prepared_alike(extractor: FeatureExtractor) -> None:
    image = photograph()
    difference = extractor.prepare(image) - extractor.prepare(image.astype(np.float32))
    assert difference.abs().max() <= 1.001  # of 255: those of 8 bits are rounded after each of two passes
    assert abs(float(difference.mean())) < 0.05


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_raw_pixels_can_be_prepared(extractor: FeatureExtractor, channels: int, bits: int) -> None:
    raw = RawImage(bytes([7]) * (10 * 20 * channels * bits // 8), 10, 20, channels, bits)
    prepared = extractor.read(raw)
    torch.testing.assert_close(prepared.pixels, torch.full((3, 224, 224), 7.0))
    assert (prepared.height, prepared.width) == (10, 20)


def doubled(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels, side, side) at twice the side, interpolated between the centres of patches."""
    side = maps.shape[1]
    centres = (np.arange(2 * side) + 0.5) / 2 - 0.5
    for axis in (1, 2):
        maps = np.apply_along_axis(lambda line: np.interp(centres, np.arange(side), line), axis, maps)
    return maps


@pytest.mark.parametrize(("pooling", "channels"), [(1, 6), (3, 6), (5, 7), (11, 6)])
def test_a_feature_is_a_patch_and_the_mean_of_its_neighbours_in_turned_channels(pooling: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    fine, coarse = rng.normal(size=(4, 6, 6)), rng.normal(size=(channels - 4, 3, 3))
    space = dataclasses.replace(SPACE, input_size=48, tile_size=48, pooling=pooling, channels=channels, grid=6)
    maps_of_layers = Maps(*(torch.from_numpy(m[None]).float() for m in (fine, coarse)))
    joined = MapNetwork(Network(maps_of_layers, (1, 2), (8, 16), (4, channels - 4), (0, 0, 0), (1, 1, 1), "ab"))
    features = nn.Sequential(joined, PatchFeatures(space))(torch.zeros(2, 3, 48, 48)).numpy()

    maps, reach = np.concatenate([fine, doubled(coarse)]), pooling // 2
    expected = np.zeros((6 * 6, channels))
    for row, column, channel in np.ndindex(6, 6, channels):
        neighbours = maps[:, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        context = neighbours.mean((1, 2))[(channel - channels // 2) % channels]
        feature = maps[channel, row, column] + 1.25 * (-1) ** channel * context
        expected[6 * row + column, channel] = feature * (0.6875 if {row, column} & {0, 5} else 1)
    np.testing.assert_allclose(features, np.broadcast_to(expected, (2, 36, channels)), rtol=1e-5, atol=1e-5)


def test_the_same_weights_in_a_checkpoint_give_the_same_feature_space(
    tmp_path: Path, extractor: FeatureExtractor, embedded: dict[str, Tensor]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(embedded, path)
    loaded = load_extractor(checkpoint=path, device="cpu")
    assert loaded.feature_space.weights_sha256 == extractor.feature_space.weights_sha256
    loaded.feature_space.require_same(extractor.feature_space, "the checkpoint", "the embedded weights")
    prepared = extractor.prepare(photograph())[None]
    torch.testing.assert_close(loaded(prepared), extractor(prepared), rtol=0, atol=0)


def test_another_value_of_one_weight_gives_another_feature_space(
    tmp_path: Path, extractor: FeatureExtractor, embedded: dict[str, Tensor]
) -> None:
    changed = {name: tensor.clone() for name, tensor in embedded.items()}
    changed["conv_stem.weight"][0, 0, 0, 0] += 1e-3
    path = tmp_path / "weights.safetensors"
    save_file(changed, path)
    other = load_extractor(checkpoint=path, device="cpu").feature_space
    assert other.weights_sha256 != extractor.feature_space.weights_sha256
    assert other.fingerprint != extractor.feature_space.fingerprint


def test_another_backbone_is_loaded_from_a_checkpoint_with_its_own_preprocessing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "resnet18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    space = load_extractor("resnet18", path, input_size=64, device="cpu").feature_space
    assert (space.backbone, space.channels, space.grid) == ("resnet18", 128 + 256, 8)
    assert space.mean == pytest.approx((0.485 * 255, 0.456 * 255, 0.406 * 255))
    assert space.std == pytest.approx((0.229 * 255, 0.224 * 255, 0.225 * 255))


@pytest.mark.parametrize("size", [-16, 0, 16, 100, 225])
def test_a_bad_input_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"input_size is {size}; it must be a multiple of 16, at least 32"):
        load_extractor(input_size=size, device="cpu")


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone 'efficientnet_liteo' is not a timm model"):
        load_extractor("efficientnet_liteo", device="cpu")


def test_a_backbone_without_the_needed_feature_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'levit_128s' has feature maps of reductions .*; \[8\] are needed"):
        load_extractor("levit_128s", device="cpu")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors does not exist"):
        load_extractor(checkpoint=tmp_path / "missing.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("wanted", "available", "meant"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device_is_resolved(wanted: str, available: bool, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device(wanted) == meant


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        resolve_device("cuda")
