"""What benchmarks inspect: pictures like mvtec_screw's, drawn, and a global memory that a federation made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from feddymem.backbone import FeatureExtractor
from feddymem.feature_cache import FeatureCache
from feddymem.feature_network import MapNetwork
from feddymem.federation import federate
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.network import EMBEDDED_BACKBONE, load_network
from feddymem.patches import PatchSource
from feddymem.runtimes import Compute, Precision, RuntimeName, compiled

SITES = 3
_IMAGES = 30
_QUALITY = 92


def picture(seed: int, side: int = 1024) -> NDArray[np.uint8]:
    """(side, side, 3): a screw on a grey ground, turned at random, with uneven light and the noise of a sensor."""
    rng = np.random.default_rng(seed)
    canvas = np.full((side, side), 0.75, np.float32)
    long, wide = 0.36 * side, 0.035 * side
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - np.float32(side / 2)
    along = columns * np.cos(turn) + rows * np.sin(turn) + rng.uniform(-0.03, 0.03) * side
    across = rows * np.cos(turn) - columns * np.sin(turn)
    thread = 0.012 * side * np.sin(2 * np.pi * (along / (0.025 * side) + across / (0.09 * side)))
    body = (np.abs(along) < long) & (np.abs(across) < wide + np.where(along < long / 3, np.abs(thread), 0))
    head = (along > 0.75 * long) & (along < long) & (np.abs(across) < 2.4 * wide)
    shade = 0.35 + 0.25 * np.cos(across / wide) + 0.06 * thread / (0.012 * side)
    canvas[body | head] = shade[body | head]
    light = 1 + 0.12 * np.cos(turn) * columns / side + 0.08 * rows / side
    noisy = cv2.GaussianBlur(canvas * light, (0, 0), side / 1000) * 190 + rng.normal(0, 2.2, (side, side))
    return np.repeat(noisy.clip(0, 255).astype(np.uint8)[:, :, None], 3, 2)


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG file as cameras of lines make them: quality 92, 4:2:0."""
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done, "an image in memory can be encoded"
    return data.tobytes()


@cache
def jpegs(count: int, side: int = 1024, first: int = 10_000) -> tuple[bytes, ...]:
    """Files of as many parts."""
    return tuple(jpeg(picture(first + number, side)) for number in range(count))


def bare_backbone(precision: Precision = "float32", runtime: RuntimeName = "auto") -> Compute:
    """The embedded backbone from prepared images to feature maps, without what makes patch features of them."""
    network = MapNetwork(load_network(EMBEDDED_BACKBONE))
    return compiled(network, 224, "bare embedded backbone", runtime, precision, torch.device("cpu")).network


def memory(extractor: FeatureExtractor, items: Sequence[int]) -> dict[int, MemoryBank]:
    """Global memories of SITES sites in one round, of each of so many items exactly."""
    with TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        sites: dict[str, PatchSource] = {}
        for site in range(SITES):
            paths = []
            for number in range(_IMAGES):
                path = folder / f"{site}-{number}.jpg"
                path.write_bytes(jpeg(picture(site * _IMAGES + number, 512)))
                paths.append(path)
            sites[f"site{site}"] = FeatureCache(folder / "features", extractor).extract(paths).patches
        made = {}
        for count in items:
            bank_items = -(-count * 5 // (4 * SITES))  # a little more than fits, so that items of sites are merged
            method = Method(
                bank_items=min(bank_items, 65_536), memory_items=count, rounds=1, memory_reduce=count <= 16_384
            )
            made[count] = federate(sites, method).memory
            assert len(made[count]) == count, f"wanted {count} items, got {len(made[count])}"
        return made
