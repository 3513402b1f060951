"""Calls an inference service as any user of tritonclient does, and writes what came back.

Run by test_open_inference.py in `.venv-clients`, with the arguments SERVER IMAGE PIXELS OUT: an address, an image file,
its pixels as .npy, and a folder that gets results.json and map.npy.
"""

from __future__ import annotations

import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

MODEL = "bricks"
WAIT_SECONDS = 30


def tensor(values: NDArray[Any], datatype: str) -> Any:
    made = triton.InferInput("image", list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def files(*images: bytes) -> Any:
    return tensor(np.array(images, np.object_), "BYTES")


def score(result: Any) -> list[float]:
    values: list[float] = result.as_numpy("score").tolist()
    return values


def refusal(client: Any, *arguments: Any, **options: Any) -> dict[str, str]:
    try:
        client.infer(*arguments, **options)
    except InferenceServerException as error:
        return {"status": str(error.status()), "text": str(error.message())}
    raise AssertionError("the request was not refused")


def ask(client: Any, image: bytes) -> dict[str, Any]:
    """All that has no image in it, and what is refused."""
    model = client.get_model_metadata(MODEL)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [
            client.is_model_ready(MODEL),
            client.is_model_ready(MODEL, "1"),
            client.is_model_ready("boats"),
        ],
        "server": client.get_server_metadata().name,
        "platform": model.platform,
        "versions": list(model.versions),
        "outputs": [output.name for output in model.outputs],
        "index": [[entry.name, entry.version, entry.state] for entry in client.get_model_repository_index().models],
        "refused": {
            "model": refusal(client, "boats", [files(image)]),
            "version": refusal(client, MODEL, [files(image)], model_version="1"),
            "image": refusal(client, MODEL, [files(image, b"broken")]),
        },
    }


def infer(client: Any, image: bytes, pixels: NDArray[np.uint8], out: Path) -> dict[str, Any]:
    """Every datatype, one at a time."""
    parameters = {"site": "dim-hall", "threshold": 0.0}
    whole = client.infer(MODEL, [files(image)], request_id="part-9", parameters=parameters)
    response = whole.get_response()
    mapped = client.infer(MODEL, [files(image, image)], outputs=[triton.InferRequestedOutput("anomaly_map")])
    np.save(out / "map.npy", mapped.as_numpy("anomaly_map"))
    return {
        "id": [response.model_name, response.model_version, response.id],
        "verdict": whole.as_numpy("verdict").tolist(),
        "files": score(whole),
        "batch": score(client.infer(MODEL, [files(image, image, image)])),
        "uint8": score(client.infer(MODEL, [tensor(pixels, "UINT8")])),
        "fp32": score(client.infer(MODEL, [tensor(np.stack(2 * [pixels]).astype(np.float32), "FP32")])),
    }


def infer_asynchronously(client: Any, image: bytes) -> list[float]:
    done: queue.Queue[Any] = queue.Queue()
    for _ in range(3):
        client.async_infer(MODEL, [files(image)], lambda result, error: done.put(error or result))
    return [score(done.get(timeout=WAIT_SECONDS))[0] for _ in range(3)]


def infer_in_a_stream(client: Any, image: bytes) -> list[Any]:
    """What becomes of twelve requests, the fifth of them broken: id and score, or the text of the error."""
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put(error or result))
    for number in range(12):
        client.async_stream_infer(MODEL, [files(b"broken" if number == 4 else image)], request_id=str(number))
    answers = [done.get(timeout=WAIT_SECONDS) for _ in range(12)]
    client.stop_stream()
    return [
        str(answer.message())
        if isinstance(answer, InferenceServerException)
        else [answer.get_response().id, score(answer)[0]]
        for answer in answers
    ]


def main(server: str, image_file: str, pixels_file: str, out: str) -> None:
    image, pixels = Path(image_file).read_bytes(), np.load(pixels_file)
    with triton.InferenceServerClient(server) as client:
        results = {
            **ask(client, image),
            **infer(client, image, pixels, Path(out)),
            "asynchronous": infer_asynchronously(client, image),
            "stream": infer_in_a_stream(client, image),
        }
    (Path(out) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
