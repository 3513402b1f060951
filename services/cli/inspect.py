"""`feddymem inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Column, Table

from feddymem.client import InspectionClient
from feddymem.v1.inspection_pb2 import MAP_FORMAT_PNG, MAP_FORMAT_UNSPECIFIED, InspectStreamResponse
from services.cli.exit_codes import OK, REFUSED, SOME_IMAGES_FAILED, USAGE

_errors = Console(stderr=True, soft_wrap=True)


def inspect(images: list[Path], server: str, federation: str, site: str, heatmap: Path | None, as_json: bool) -> int:
    """Scores images and prints the results; the exit code."""
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        _errors.print(f"feddymem: no such image file: {', '.join(missing)}", markup=False)
        return USAGE
    if heatmap is not None:
        heatmap.mkdir(parents=True, exist_ok=True)
    table = Table(Column("image", overflow="fold"), "score", "release", "queue ms", "compute ms")
    failed = False
    try:
        for response in _results(images, server, federation, site, heatmap):
            failed |= response.HasField("error")
            if response.HasField("error"):
                _errors.print(f"{response.id}: {response.error.message}", markup=False)
            if as_json:
                print(json.dumps(_as_json(response)))
            elif response.HasField("result"):
                result = response.result
                milliseconds = (f"{seconds * 1000:.1f}" for seconds in (result.queue_seconds, result.compute_seconds))
                table.add_row(response.id, f"{result.score:.4f}", str(result.release), *milliseconds)
    except grpc.RpcError as error:
        _errors.print(f"feddymem: {server}: {error.code().name}: {error.details()}", markup=False)
        return REFUSED
    if not as_json and table.row_count:
        Console().print(table)
    return SOME_IMAGES_FAILED if failed else OK


def _results(
    images: list[Path], server: str, federation: str, site: str, heatmap: Path | None
) -> Iterator[InspectStreamResponse]:
    form = MAP_FORMAT_UNSPECIFIED if heatmap is None else MAP_FORMAT_PNG
    with InspectionClient(server, federation=federation, site=site) as client:
        for number, response in enumerate(client.inspect_files(images, form)):
            if heatmap is not None and response.HasField("result"):
                # Numbered, because images of different folders may have the same name.
                (heatmap / f"{number:05}_{Path(response.id).stem}.png").write_bytes(response.result.map.data)
            yield response


def _as_json(response: InspectStreamResponse) -> dict[str, object]:
    if response.HasField("error"):
        return {"image": response.id, "error": response.error.message, "code": response.error.code}
    result = response.result
    return {
        "image": response.id,
        "score": result.score,
        "federation": result.federation,
        "site": result.site,
        "release": result.release,
        "queue_seconds": result.queue_seconds,
        "compute_seconds": result.compute_seconds,
    }
