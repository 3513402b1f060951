"""The GPU part: bare backbone in bfloat16, features, and search, by batch. Needs torch, timm and numpy, and no network.

The weights are random: they cost the same. Without a GPU it runs on the CPU, as a trial of itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor

from benchmarks import write_result
from feddymem.runtimes import compiled
from feddymem.search import NearestItems, screen_by_torch

BATCHES = (1, 8, 32, 128, 512)
ITEMS = (4096, 12_288, 65_536)
_CHANNELS, _PATCHES, _SITES = 152, 784, 3
_REPEATS = 20


class _Maps(torch.nn.Module):
    """The embedded backbone's two feature maps, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        fine, coarse = self.network((pixels - 127) / 128)
        grown = torch.nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, grown], 1)


def _per_second(work: Callable[[], object], images: int, device: torch.device) -> float:
    """Images a second, the median of several runs."""
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    for _ in range(3):
        work()
    wait()
    rates = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        wait()
        rates.append(images / (time.perf_counter() - start))
    return round(sorted(rates)[len(rates) // 2], 1)


@torch.inference_mode()
def main() -> None:
    """Measures and writes benchmarks/results/gpu.json."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = _Maps().to(device).requires_grad_(False).eval()
    maps = {
        precision: compiled(network, 224, "gpu benchmark", "torch", precision, device).network
        for precision in ("float32", "bfloat16")
    }
    batches = BATCHES if device.type == "cuda" else BATCHES[:2]
    backbone: dict[str, dict[str, float]] = {name: {} for name in maps}
    for batch in batches:
        pixels = torch.rand(batch, 3, 224, 224, device=device) * 255
        for name, run in maps.items():
            backbone[name][str(batch)] = _per_second(lambda run=run, pixels=pixels: run(pixels), batch, device)  # type: ignore[misc]
    search: dict[str, dict[str, float]] = {}
    for items in ITEMS:
        rng = torch.Generator().manual_seed(0)
        memory = (torch.randn(items, _CHANNELS, generator=rng) * 5).to(device)
        origins = torch.arange(items)[:, None] % _SITES == torch.arange(_SITES)
        nearest = NearestItems(memory, origins, screen_by_torch)
        search[str(items)] = {}
        for batch in batches:
            patches = (torch.randn(batch * _PATCHES, _CHANNELS, generator=rng) * 5).to(device)
            search[str(items)][str(batch)] = _per_second(
                lambda nearest=nearest, patches=patches: nearest(patches),  # type: ignore[misc]
                batch,
                device,
            )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "backbone_images_per_second_by_batch": backbone}
    write_result("gpu" if device.type == "cuda" else "gpu_trial", {**result, "search_images_per_second": search})


if __name__ == "__main__":
    main()
