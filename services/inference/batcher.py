"""From accepted image to result: decode in threads, compute in batches in one thread, refuse what does not fit the
queue."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor

from feddymem.images import Pixels
from feddymem.scoring import Inspection
from services.inference import metrics
from services.inference.registry import Active
from services.runtime.errors import Refusal
from services.runtime.logs import get_logger

_DECODERS = 2
_log = get_logger()


@dataclass(frozen=True, eq=False)
class Timed:
    """A result and how long it took.

    Attributes:
        inspection: the result.
        height: rows of the image.
        width: columns of the image.
        queue_seconds: from acceptance to the start of its computation, decoding included.
        compute_seconds: of the batch that the image was in.
    """

    inspection: Inspection
    height: int
    width: int
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, eq=False)
class _Job:
    active: Active
    prepared: Tensor
    size: tuple[int, int]
    accepted: float
    result: Future[Timed]


class Batcher:
    """Runs inspections. `start` before use, `stop` after."""

    def __init__(self, max_batch: int, queue_size: int) -> None:
        self._max_batch, self._queue_size = max_batch, queue_size
        self._waiting = 0
        self._seconds_per_image = 0.0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._computer = threading.Thread(target=self._compute, name="compute")

    def start(self) -> None:
        """Starts the computing thread."""
        self._computer.start()

    def stop(self) -> None:
        """Ends the threads after the work that is accepted."""
        self._decoders.shutdown()
        self._jobs.put(None)
        self._computer.join()

    async def inspect(self, active: Active, decode: Callable[[], Pixels]) -> Timed:
        """Decodes and scores one image.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where the queue is full, with a hint when to try again.
            ImageError: the image cannot be decoded.
        """
        if self._waiting >= self._queue_size:
            wait = max(0.01, self._waiting * self._seconds_per_image)
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._waiting} inspections are waiting, as many as are allowed; try again in {wait:.2f} seconds",
            )
        accepted = time.perf_counter()
        self._waiting += 1
        metrics.WAITING.set(self._waiting)
        try:
            result: Future[Timed] = Future()
            loop = asyncio.get_running_loop()
            job = await loop.run_in_executor(self._decoders, self._prepare, active, decode, accepted, result)
            self._jobs.put(job)
            return await asyncio.wrap_future(result)
        finally:
            self._waiting -= 1
            metrics.WAITING.set(self._waiting)

    def _prepare(self, active: Active, decode: Callable[[], Pixels], accepted: float, result: Future[Timed]) -> _Job:
        pixels = decode()
        return _Job(active, active.scorer.extractor.prepare(pixels), pixels.shape[:2], accepted, result)

    def _compute(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            batch = self._fill([job])
            if not batch:
                continue
            started = time.perf_counter()
            try:
                inspections = _inspect(batch)
            except Exception as error:  # noqa: BLE001 - handed to every caller of the batch, who logs it
                for failed in batch:
                    failed.result.set_exception(error)
                continue
            seconds = time.perf_counter() - started
            self._seconds_per_image = seconds / len(batch)
            metrics.COMPUTE_SECONDS.observe(seconds)
            metrics.BATCH_IMAGES.observe(len(batch))
            for done, inspection in zip(batch, inspections, strict=True):
                waited = started - done.accepted
                metrics.QUEUE_SECONDS.observe(waited)
                done.result.set_result(Timed(inspection, *done.size, waited, seconds))

    def _fill(self, batch: list[_Job]) -> list[_Job]:
        """Adds what waits already, up to the largest batch, and leaves out what nobody waits for any more."""
        while len(batch) < self._max_batch:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            batch.append(job)
        return [job for job in batch if job.result.set_running_or_notify_cancel()]


def _inspect(batch: list[_Job]) -> list[Inspection]:
    """Features once for all images of a backbone, distances by scorer; results in the order of the batch."""
    results: dict[int, Inspection] = {}
    for extractor in {job.active.scorer.extractor for job in batch}:
        rows = [i for i, job in enumerate(batch) if job.active.scorer.extractor is extractor]
        features = extractor(torch.stack([batch[i].prepared for i in rows]))
        for scorer in {batch[i].active.scorer for i in rows}:
            mine = [(position, i) for position, i in enumerate(rows) if batch[i].active.scorer is scorer]
            inspections = scorer.inspect_features(features[[position for position, _ in mine]])
            results.update(zip((i for _, i in mine), inspections, strict=True))
    return [results[i] for i in range(len(batch))]
