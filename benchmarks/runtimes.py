"""Runtimes: what the backbone costs in each, and what each does to scores and to the image AUROC of real data sets.

The memories are made with the default runtime; only the test images pass through the others. Scores are compared with
those of plain torch. `reduced` decodes the images, blown up to 1,024 px, at reduced scale and at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import onnxruntime
import torch
import typer
from torch import Tensor

from benchmarks import interleaved, parts, spread, write_result
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData, TestImage
from feddymem.evaluation import auroc
from feddymem.feature_cache import FeatureCache
from feddymem.feature_network import MapNetwork
from feddymem.federation import federate
from feddymem.image_data import EncodedImage
from feddymem.images import decode, decode_file
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.network import EMBEDDED_BACKBONE, load_network
from feddymem.patches import PatchSource
from feddymem.runtimes import to_onnx
from feddymem.scoring import Scorer
from services.runtime.hardware import configure_hardware

BATCHES = (1, 8)
ROUNDS = 8
_EVERY = 9
_SIDE = 1024


def speeds() -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds an image, features maps only, by runtime and batch."""
    runtimes: dict[str, Callable[[Tensor], object]] = {
        "torch": parts.bare_backbone(runtime="torch"),
        "openvino": parts.bare_backbone(runtime="openvino"),
        "openvino bfloat16": parts.bare_backbone(runtime="openvino", precision="bfloat16"),
        "onnxruntime": _onnxruntime(),
    }
    result = {}
    for batch in BATCHES:
        pixels = torch.rand(batch, 3, 224, 224) * 255
        times = interleaved({name: partial(run, pixels) for name, run in runtimes.items()}, ROUNDS)
        result[str(batch)] = {name: spread([value / batch for value in values]) for name, values in times.items()}
    return result


def _onnxruntime() -> Callable[[Tensor], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    graph = to_onnx(MapNetwork(load_network(EMBEDDED_BACKBONE)), 224)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels.numpy()})


def parity(data: Path) -> dict[str, object]:
    """What runtimes do to the scores of a data set's test images."""
    sites = load_sites(data)
    extractors = {
        "torch": load_extractor(runtime="torch"),
        "openvino": load_extractor(runtime="openvino"),
        "openvino bfloat16": load_extractor(runtime="openvino", precision="bfloat16"),
    }
    memory = _memory(sites, load_extractor())
    scores = {
        name: [_scores(site.test, Scorer(extractor, memory, None)) for site in sites]
        for name, extractor in extractors.items()
    }
    defects = [np.array([image.defect for image in site.test], bool) for site in sites]
    plain = np.concatenate(scores["torch"])
    result: dict[str, object] = {}
    for name, by_site in scores.items():
        off = np.abs(np.concatenate(by_site) / plain - 1)
        mean = np.mean([auroc(defect, values) for defect, values in zip(defects, by_site, strict=True)])
        result[name] = {"image_auroc": round(float(mean), 4), **_deviation(off)}
    result["reduced"] = _deviation(_reduced(sites, Scorer(load_extractor(), memory, None)))
    return result


def _memory(sites: Sequence[SiteData], extractor: FeatureExtractor) -> MemoryBank:
    with TemporaryDirectory(prefix="feddymem-bench-") as name:
        cache = FeatureCache(Path(name), extractor)
        sources: dict[str, PatchSource] = {site.name: cache.extract(site.train).patches for site in sites}
        return federate(sources, Method()).memory


def _scores(images: Sequence[TestImage], scorer: Scorer) -> np.ndarray:
    return np.array([scorer.inspect(scorer.extractor.read_file(image.path).pixels[None])[0].score for image in images])


def _reduced(sites: Sequence[SiteData], scorer: Scorer) -> np.ndarray:
    off = []
    for image in [image for site in sites for image in site.test][::_EVERY]:
        pixels = decode_file(image.path).astype(np.uint8)
        large = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
        data = parts.jpeg(large)
        extractor = scorer.extractor
        both = torch.stack([extractor.read(EncodedImage(data)).pixels, extractor.prepare(decode(data))])
        small, full = scorer.inspect(both)
        off.append(abs(small.score / full.score - 1))
    return np.array(off)


def _deviation(off: np.ndarray) -> dict[str, float]:
    return {
        "score_deviation_median": float(f"{np.median(off):.2g}"),
        "score_deviation_largest": float(f"{off.max():.2g}"),
    }


def main(data: list[Path]) -> None:
    """Measures on data sets of site folders, and writes benchmarks/results/runtimes.json."""
    configure_hardware(None)
    sets = {path.name: parity(path) for path in data}
    write_result("runtimes", {"milliseconds_an_image_by_batch": speeds(), "parity": sets})


if __name__ == "__main__":
    typer.run(main)
