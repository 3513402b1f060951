"""Calls an inference service as any user of KServe's Python client does, and writes what came back.

Run by test_open_inference.py in `.venv-clients`, with the arguments SERVER IMAGE PIXELS OUT: an address, an image file,
its pixels as .npy, and a folder that gets results.json and map.npy.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput
from numpy.typing import NDArray

MODEL = "bricks"


def tensor(values: NDArray[Any], datatype: str, *, typed: bool = False) -> Any:
    made = InferInput("image", list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=not typed)
    return made


def files(*images: bytes) -> Any:
    return tensor(np.array(images, np.object_), "BYTES")


def typed_file(image: bytes) -> Any:
    return InferInput("image", [1], "BYTES", data=[image])


def request(image: Any, *outputs: str, **fields: Any) -> Any:
    wanted = [RequestedOutput(name) for name in outputs]
    return InferRequest(MODEL, [image], request_outputs=wanted, **fields)


def output(response: Any, name: str) -> Any:
    return response.get_output_by_name(name).as_numpy()


async def score(client: Any, image: Any) -> Any:
    return output(await client.infer(request(image)), "score").tolist()


async def refusal(client: Any, image: Any) -> dict[str, str]:
    try:
        await client.infer(request(image))
    except grpc.aio.AioRpcError as error:
        return {"status": str(error.code()), "text": str(error.details())}
    raise AssertionError("the request was not refused")


async def call(server: str, image: bytes, pixels: NDArray[np.uint8], out: Path) -> dict[str, Any]:
    async with InferenceGRPCClient(server) as client:
        judged = await client.infer(
            request(files(image), request_id="part-9", parameters={"site": "dim-hall", "threshold": "0.5"})
        )
        mapped = await client.infer(request(files(image, image), "anomaly_map"))
        np.save(out / "map.npy", output(mapped, "anomaly_map"))
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": [await client.is_model_ready(MODEL), await client.is_model_ready("boats")],
            "id": [judged.model_name, judged.model_version, judged.id],
            "verdict": output(judged, "verdict").tolist(),
            "files": output(judged, "score").tolist(),
            "typed_file": await score(client, typed_file(image)),
            "batch": await score(client, files(image, image, image)),
            "uint8": await score(client, tensor(pixels, "UINT8")),
            "typed_uint8": await score(client, tensor(pixels, "UINT8", typed=True)),
            "typed_fp32": await score(client, tensor(pixels.astype(np.float32), "FP32", typed=True)),
            "refused": await refusal(client, files(b"broken")),
        }


def main(server: str, image_file: str, pixels_file: str, out: str) -> None:
    image, pixels = Path(image_file).read_bytes(), np.load(pixels_file)
    results = asyncio.run(call(server, image, pixels, Path(out)))
    (Path(out) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
