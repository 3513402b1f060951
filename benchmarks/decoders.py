"""Image decoders compared: milliseconds for 1024 x 1024, medians of interleaved runs, truncation included."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from statistics import median

import cv2
import numpy as np
import torch
import torchvision.io
from PIL import Image
from skimage import data

from benchmarks import write_result

_RUNS = 15


def _pillow(encoded: bytes) -> object:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


def _opencv(encoded: bytes) -> object:
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("refused")
    return pixels


def _torchvision(encoded: bytes) -> object:
    return torchvision.io.decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))


DECODERS: dict[str, Callable[[bytes], object]] = {"pillow": _pillow, "opencv": _opencv, "torchvision": _torchvision}


def main() -> None:
    """Measures all decoders on all files."""
    grey = cv2.resize(data.brick(), (1024, 1024), interpolation=cv2.INTER_CUBIC)
    colour = cv2.resize(data.coffee()[:, :, ::-1], (1024, 1024), interpolation=cv2.INTER_CUBIC)
    wide = grey.astype(np.uint16) * 257
    files = {
        "jpeg grey": (".jpg", grey),
        "jpeg rgb": (".jpg", colour),
        "png grey": (".png", grey),
        "png grey 16 bit": (".png", wide),
        "png rgb": (".png", colour),
    }
    result: dict[str, object] = {}
    for name, (suffix, pixels) in files.items():
        encoded = cv2.imencode(suffix, pixels)[1].tobytes()
        times: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
        for _ in range(_RUNS):
            for decoder, decode in DECODERS.items():
                started = time.perf_counter()
                decode(encoded)
                times[decoder].append((time.perf_counter() - started) * 1000)
        result[name] = {
            decoder: {"median_ms": round(median(values), 2), "refuses_truncated": _refuses(decoder, encoded)}
            for decoder, values in times.items()
        }
    write_result("decoders", result)


def _refuses(decoder: str, encoded: bytes) -> bool:
    try:
        DECODERS[decoder](encoded[: len(encoded) * 6 // 10])
    except (ValueError, OSError, RuntimeError):
        return True
    return False


if __name__ == "__main__":
    main()
