"""From a JPEG file to a result in anomalib's PatchCore, and in our service, in turns: `make bench-peer`.

The same 1024 x 1024 files, backbone, weights and layers, 224 px, 28 x 28 patches and 4,096 items in memory; all cores
for both, one image at a time, and neither computes while the other does. The peer is in process (peer_anomalib.py, in
an environment of its own) and gives score, label, mask and map, each way from file to result that it has is measured,
and its fastest counts. The service is asked by one caller over gRPC for score, verdict and regions, and again for these
and the map.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import grpc
import psutil
import typer
from safetensors.torch import save_file

from benchmarks import parts, spread, write_result
from benchmarks.inspection import INSPECT, ITEMS, request, serving
from feddymem import __version__
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.network import _embedded_state
from feddymem.v1.inspection_pb2 import MAP_FORMAT_FLOAT32
from services.runtime.hardware import configure_hardware

SCRIPT = Path(__file__).with_name("peer_anomalib.py")
IMAGES = 8
_SIDE = 1024
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRUST_REMOTE_CODE": "1"}
"""No download; and anomalib may unpickle what it exported itself."""
_PAUSE_SECONDS = 0.1
"""Before each turn: threads of ONNX Runtime go on spinning for about 40 ms, and would take a core from who is next."""
_TOLERANCE = 0.01
"""By how much the scores of two ways in float32 may differ, on the peer's scale of 0 to 1."""


class Peer:
    """The peer's process, which computes only while it is asked to."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.prepared: dict[str, Any] = self._answer()

    def run(self, way: str, count: int) -> list[float]:
        """Seconds of so many images, one after another."""
        assert self._process.stdin is not None
        print("run", way, count, file=self._process.stdin, flush=True)
        seconds: list[float] = self._answer()
        return seconds

    def _answer(self) -> Any:  # noqa: ANN401 - what the line says
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)


@contextmanager
def prepared_peer(python: Path, folder: Path, extractor: FeatureExtractor) -> Iterator[Peer]:
    """A peer that has loaded everything; the files to inspect are in `folder / "images"`."""
    space = extractor.feature_space
    for number, kind in enumerate(("train", "validation", "images")):
        (folder / kind).mkdir(parents=True)
        for place, jpeg in enumerate(parts.jpegs(IMAGES, _SIDE, 10_000 + number * IMAGES)):
            (folder / kind / f"{place}.jpg").write_bytes(jpeg)
    save_file({name: tensor.contiguous() for name, tensor in _embedded_state().items()}, folder / "weights.safetensors")
    settings = {
        **{name: getattr(space, name) for name in ("backbone", "layers", "reductions", "input_size", "channels")},
        **{"mean": space.mean, "std": space.std, "side": _SIDE, "items": ITEMS, "threads": _cores()},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    log = folder / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [python.absolute(), "-I", SCRIPT, folder],
            cwd=folder,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Peer(process, log)
        finally:
            process.terminate()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def measured(work: dict[str, Callable[[int], list[float]]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, in turns like `benchmarks.interleaved`: a turn's first does not count."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            time.sleep(_PAUSE_SECONDS)
            times[name] += [seconds * 1000 for seconds in run(1 + repeats)[1:]]
    return times


@contextmanager
def _used_by_others() -> Iterator[list[float]]:
    """Puts into the list, at the end, how many cores' time went to processes that are not part of this benchmark."""
    cores: list[float] = []
    start, all_before, own_before = time.perf_counter(), *_processor_seconds()
    yield cores
    all_after, own_after = _processor_seconds()
    cores.append((all_after - all_before - own_after + own_before) / (time.perf_counter() - start))


def _processor_seconds() -> tuple[float, float]:
    """Of the machine, and of this process and its children."""
    machine, this = psutil.cpu_times(), psutil.Process()
    own = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return machine.user + machine.system + machine.nice, sum(times.user + times.system for times in own)


def _caller(inspect: Any, files: list[Path], **wishes: int) -> Callable[[int], list[float]]:  # noqa: ANN401 - gRPC's
    turn = itertools.cycle(files)

    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            path = next(turn)
            start = time.perf_counter()
            inspect(request(path.read_bytes(), **wishes))
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def main(
    python: Annotated[Path, typer.Option(help="The interpreter that has anomalib.")] = Path(".venv-peer/bin/python"),
    rounds: int = 20,
    repeats: int = 5,
) -> None:
    """Measures and writes benchmarks/results/peer.json."""
    if not python.exists():
        raise typer.BadParameter(f"{python} does not exist; `make bench-peer` makes it")
    configure_hardware(None)
    extractor = load_extractor()
    memory = parts.memory(extractor, (ITEMS,))[ITEMS]
    with (
        TemporaryDirectory(prefix="feddymem-bench-") as name,
        prepared_peer(python, Path(name) / "peer", extractor) as p,
    ):
        files = sorted((Path(name) / "peer" / "images").iterdir())
        scores = p.prepared["scores"]
        off = {way: max(abs(a - b) for a, b in zip(scores[way], scores["torch"], strict=True)) for way in scores}
        assert all(off[way] < _TOLERANCE for way in ("openvino_f32", "openvino_f32_array", "onnxruntime")), off
        with (
            serving(Path(name), extractor, memory) as inference,
            grpc.insecure_channel(inference.grpc) as channel,
        ):
            inspect: Any = channel.unary_unary(INSPECT)
            work: dict[str, Callable[[int], list[float]]] = {
                "service": _caller(inspect, files),
                "service_with_map": _caller(inspect, files, map_format=MAP_FORMAT_FLOAT32),
                **{way: lambda count, way=way: p.run(way, count) for way in scores},  # type: ignore[misc]
            }
            with _used_by_others() as others:
                times = {way: spread(taken) for way, taken in measured(work, rounds, repeats).items()}
    median = {way: taken["median_ms"] for way, taken in times.items()}
    fastest = min(scores, key=lambda way: median[way])
    write_result(
        "peer",
        {
            "cores": _cores(),
            "cores_used_by_others": round(others[0], 2),
            "memory_items": ITEMS,
            "images": rounds * repeats,
            "service": times["service"],
            "service_with_map": times["service_with_map"],
            "peer": {way: times[way] for way in scores},
            "fastest_peer": fastest,
            "fastest_peer_to_service": round(median[fastest] / median["service"], 2),
            "fastest_peer_to_service_with_map": round(median[fastest] / median["service_with_map"], 2),
            "peer_precisions": p.prepared["precisions"],
            "peer_scores_off_torch": {way: round(most, 4) for way, most in off.items()},
            "peer_versions": p.prepared["versions"],
            "versions": {"feddymem": __version__, "torch": version("torch"), "openvino": version("openvino")},
        },
    )


if __name__ == "__main__":
    typer.run(main)
