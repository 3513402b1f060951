"""The peer's side of benchmarks/peer.py, run by the interpreter that has anomalib: `peer_anomalib.py FOLDER`.

Makes anomalib's PatchCore of the folder's pictures, exports it in every way that anomalib has, and loads those. Then
writes one line, what there is, and answers each line `run NAME COUNT` with one: seconds of COUNT images, each from a
file on disk to score, label, mask and map. All lines are JSON. Nothing of ours is imported.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize

Found = Mapping[str, NDArray[Any]]
"""pred_score, pred_label, pred_mask and anomaly_map."""
Way = Callable[[Path], Found]
"""What is found in a file."""


def patchcore(settings: Mapping[str, Any], folder: Path) -> Patchcore:
    """A PatchCore with so many items in memory and thresholds that validation would set.

    Its memory is picked at random from its own patches. anomalib picks greedily, which takes a minute and changes
    nothing in the time of an inspection: the search is exhaustive.
    """
    side = settings["input_size"]
    scaling = Normalize([value / 255 for value in settings["mean"]], [value / 255 for value in settings["std"]])
    model = Patchcore(
        backbone=settings["backbone"],
        layers=settings["layers"],
        pre_trained=False,
        pre_processor=PreProcessor(Compose([Resize((side, side), antialias=True), scaling])),
    )
    network = model.model.feature_extractor.feature_extractor
    state = load_file(folder / "weights.safetensors")
    network.load_state_dict({name: state[name] for name in network.state_dict()}, strict=True)
    assert network.feature_info.reduction() == settings["reductions"], network.feature_info.reduction()
    model.train()
    patches = torch.vstack([model.model(picture) for picture in _pictures(model, folder / "train")])
    model.model.embedding_store.clear()
    generator = torch.Generator().manual_seed(0)
    model.model.memory_bank = patches[torch.randperm(len(patches), generator=generator)[: settings["items"]]]
    assert tuple(model.model.memory_bank.shape) == (settings["items"], settings["channels"])
    model.eval()
    _calibrate(model, folder / "validation")
    return model


def _pictures(model: Patchcore, folder: Path) -> list[Tensor]:
    return [model.pre_processor(read_image(path, as_tensor=True)[None]) for path in sorted(folder.iterdir())]


def _calibrate(model: Patchcore, folder: Path) -> None:
    """A part is anomalous from the most that a good one scores, which is 0.5 on a scale of 0 to 1."""
    seen = [model.model(picture) for picture in _pictures(model, folder)]
    for name, results in (("image", [s.pred_score for s in seen]), ("pixel", [s.anomaly_map for s in seen])):
        most = torch.cat(results).max()
        for field, value in ((f"{name}_min", 0 * most), (f"{name}_max", 2 * most), (f"_{name}_threshold", most)):
            getattr(model.post_processor, field).copy_(value)


def ways(model: Patchcore, folder: Path, side: int, threads: int) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways by name, and what OpenVINO computes in where it is not told.

    Each with all threads, and exported for one image of this size at a time, which is faster than for any. Exported
    as anomalib does without being told, an image at a time is refused: 2.7.0 fixes the batch at two.
    """
    size, export = (side, side), {"dynamic_shapes": None, "opset_version": 18}
    by_torch = TorchInferencer(model.to_torch(folder), device="cpu")
    graph = model.to_openvino(folder, input_size=size, onnx_kwargs=dict(export))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    by_default = OpenVINOInferencer(graph, "CPU", options)
    by_f32 = OpenVINOInferencer(graph, "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    graph = model.to_onnx(folder, input_size=size, **export)
    session = onnxruntime.InferenceSession(graph, session_options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def torch_(path: Path) -> Found:
        with torch.inference_mode():
            found = by_torch.predict(path)
        return {name: getattr(found, name).numpy() for name in outputs}

    def openvino(inferencer: OpenVINOInferencer, image: object) -> Found:
        found = inferencer.predict(image)
        return {name: getattr(found, name) for name in outputs}

    def onnxruntime_(path: Path) -> Found:
        pixels = np.ascontiguousarray(OpenVINOInferencer.pre_process(_eight_bits(path)))
        return dict(zip(outputs, session.run(outputs, {"input": pixels}), strict=True))

    return {
        "torch": torch_,
        "openvino": lambda path: openvino(by_default, path),
        "openvino_f32": lambda path: openvino(by_f32, path),
        "openvino_array": lambda path: openvino(by_default, _eight_bits(path)),
        "openvino_f32_array": lambda path: openvino(by_f32, _eight_bits(path)),
        "onnxruntime": onnxruntime_,
    }, {
        "openvino": by_default.model.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "openvino_f32": by_f32.model.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
    }


def _eight_bits(path: Path) -> NDArray[np.uint8]:
    """As an array, which their inferencers take too; their own way from a file goes over 64-bit floats."""
    return np.asarray(Image.open(path).convert("RGB"))


def _score(found: Found, side: int) -> float:
    assert found["anomaly_map"].size == found["pred_mask"].size == side**2, found["anomaly_map"].shape
    assert found["pred_label"].item() in (False, True), found["pred_label"]
    return round(float(found["pred_score"].item()), 4)


def _run(way: Way, turn: Iterator[Path], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        path = next(turn)
        start = time.perf_counter()
        way(path)
        seconds.append(time.perf_counter() - start)
    return seconds


def main(folder: Path) -> None:
    """Prepares, then answers until its input ends."""
    assert "openvino" not in sys.modules, "OpenVINO would set up its telemetry"
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # makes it missing: nothing is reported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    settings = json.loads((folder / "settings.json").read_text())
    threads = settings["threads"]
    torch.set_num_threads(threads)
    model = patchcore(settings, folder)
    available, precisions = ways(model, folder, settings["side"], threads)
    images = sorted((folder / "images").iterdir())
    scores = {name: [_score(way(path), settings["input_size"]) for path in images] for name, way in available.items()}
    versions = {name: version(name) for name in ("anomalib", "torch", "openvino", "onnxruntime")}
    say({"scores": scores, "precisions": precisions, "versions": versions})
    turn = itertools.cycle(images)
    for line in sys.stdin:
        _command, name, count = line.split()
        say(_run(available[name], turn, int(count)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
