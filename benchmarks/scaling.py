"""How inspection scales: with the items of the memory, and with the size of the image and of the network's input."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import torch

from benchmarks import interleaved, parts, spread, write_result
from benchmarks.inspection import INSPECT, request, serving
from feddymem.backbone import load_extractor
from feddymem.image_data import EncodedImage
from feddymem.scoring import Scorer
from services.runtime.hardware import configure_hardware

ITEMS = (1024, 4096, 12_288, 16_384, 65_536)
IMAGE_SIDES = (256, 512, 1024, 2048, 4096)
INPUT_SIZES = (224, 320, 448, 640)
SERVED = (4096, 65_536)
ROUNDS = 8


def main() -> None:
    """Measures and writes benchmarks/results/scaling.json."""
    configure_hardware(None)
    extractor = load_extractor()
    memories = parts.memory(extractor, ITEMS)
    image = EncodedImage(parts.jpegs(1)[0])
    patches = extractor(extractor.read(image).pixels[None])
    scorers = {items: Scorer(extractor, memory, None) for items, memory in memories.items()}
    search = interleaved(
        {str(items): partial(scorer.inspect_features, patches) for items, scorer in scorers.items()}, ROUNDS
    )
    encoded = {str(side): EncodedImage(parts.jpegs(1, side)[0]) for side in IMAGE_SIDES}
    decode = interleaved({side: partial(extractor.read, jpeg) for side, jpeg in encoded.items()}, ROUNDS)
    inputs = {
        str(side): partial(load_extractor(input_size=side), torch.zeros(1, 3, side, side)) for side in INPUT_SIZES
    }
    with TemporaryDirectory(prefix="feddymem-bench-") as name:
        few, many = (Path(name) / str(items) for items in SERVED)
        with (
            serving(few, extractor, memories[SERVED[0]]) as first,
            serving(many, extractor, memories[SERVED[1]]) as second,
            grpc.insecure_channel(first.grpc) as fast,
            grpc.insecure_channel(second.grpc) as slow,
        ):
            body = request(image.data)
            calls: list[Any] = [channel.unary_unary(INSPECT) for channel in (fast, slow)]
            work = {str(items): partial(call, body) for items, call in zip(SERVED, calls, strict=True)}
            served = interleaved(work, 2 * ROUNDS)
    one = {items: spread(times) for items, times in served.items()}
    write_result(
        "scaling",
        {
            "score_by_memory_items": {items: spread(times) for items, times in search.items()},
            "decode_by_image_side": {side: spread(times) for side, times in decode.items()},
            "features_by_input_size": {side: spread(times) for side, times in interleaved(inputs, ROUNDS // 2).items()},
            "service_one_caller_by_memory_items": one,
            "service_64k_to_4k": round(one["65536"]["median_ms"] / one["4096"]["median_ms"], 3),
        },
    )


if __name__ == "__main__":
    main()
