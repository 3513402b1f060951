"""From waiting image to score: decoded in threads, computed in batches in one thread, refused what does not fit."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import grpc
import torch

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.scoring import Inspection
from feddymem.threads import decoders, leave_cores
from services.inference import metrics
from services.inference.fair_queue import FairQueue
from services.inference.registry import Active
from services.runtime.changes import Changes
from services.runtime.errors import Refusal

_FOR_ROOM = 256
"""Images of streams and of large requests that may wait outside the queue; their senders are held back meanwhile."""
_FORGETTING = 0.1
"""Share of the newest batch in the mean that the wait is told from."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A score, and how long it took.

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
    image: EncodedImage | RawImage
    accepted: float
    expires: float | None
    result: Future[Scored]

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it; if time is up, says so to the caller."""
        if self.result.cancelled():
            return False
        if self.expires is None or time.monotonic() < self.expires:
            return True
        _fail(self.result, _late())
        return False


@dataclass(frozen=True, eq=False)
class _Ready:
    job: _Job
    prepared: PreparedImage


class Batcher:
    """Scores images. `start` before use, `stop` after.

    Args:
        max_batch: images computed together, at most.
        max_delay: seconds that a batch waits for images that are being decoded.
        queue_size: images waiting, at most.
        max_pixels: of an image.
    """

    def __init__(self, max_batch: int, max_delay: float, queue_size: int, max_pixels: int) -> None:
        self._max_batch, self._max_delay, self._max_pixels = max_batch, max_delay, max_pixels
        self._waiting: FairQueue[_Job] = FairQueue(queue_size)
        self.queue_size = queue_size
        self._in_work, self._counting = 0, threading.Lock()
        self._seconds_per_image = self._done = 0.0
        self._room, self._for_room = Changes(), 0
        # Bounded, so that what waits for long waits undecoded, in the fair queue; each decoder holds one besides.
        self._ready: queue.Queue[_Ready | None] = queue.Queue(max(1, max_batch - decoders()))
        self._decoders = [threading.Thread(target=self._decode, name=f"decode-{n}") for n in range(decoders())]
        self._computer = threading.Thread(target=self._compute, name="compute")

    def start(self) -> None:
        """Starts the threads."""
        for thread in (*self._decoders, self._computer):
            thread.start()

    def stop(self) -> None:
        """Ends the threads after the work that is accepted."""
        self._waiting.close()
        for thread in self._decoders:
            thread.join()
        self._ready.put(None)
        self._computer.join()

    async def inspect(
        self, active: Active, image: EncodedImage | RawImage, caller: str = "", seconds_left: float | None = None
    ) -> Scored:
        """Decodes and scores one image.

        Args:
            active: what scores it.
            image: not decoded.
            caller: who asks; callers are served in turn.
            seconds_left: until nobody waits for the result any more.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where the queue is full or the time left is less than the wait, with a hint when
                to try again; DEADLINE_EXCEEDED where time ran out.
            ImageError: the image cannot be decoded.
        """
        if seconds_left is not None and seconds_left <= 0:
            raise _late()
        wait = self._waiting.ahead(caller) * self._seconds_per_image
        if seconds_left is not None and wait > seconds_left:
            raise self._full(f"images wait for about {wait:.3f} seconds, longer than the {seconds_left:.3f} left")
        now = time.monotonic()
        job = _Job(active, image, now, None if seconds_left is None else now + seconds_left, Future())
        self._count(1)
        job.result.add_done_callback(lambda _result: self._count(-1))
        refused = self._waiting.put(job, caller)
        if refused is not None:
            full = self._full(f"{self.queue_size} inspections are waiting, as many as are allowed")
            if refused is job:  # nothing has changed for those who wait for room
                job.result.cancel()
                raise full
            _fail(refused.result, full)
        try:
            return await asyncio.wrap_future(job.result)
        except asyncio.CancelledError:
            self._waiting.remove(job, caller)  # its place is free at once
            raise
        finally:
            self.notify_room()

    def _count(self, change: int) -> None:
        """Counts what is in work. At once, not when the event loop gets to it: a batch would wait for what is done."""
        with self._counting:
            self._in_work += change
            metrics.WAITING.set(self._in_work)

    async def room(self, seconds: float | None) -> None:
        """Waits until another inspection is done, at most so long.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where as many wait here as are allowed.
        """
        if self._for_room >= _FOR_ROOM:
            raise self._full(f"{self._for_room} images of streams wait for room, as many as are allowed")
        self._for_room += 1
        try:
            await self._room.wait(seconds)
        finally:
            self._for_room -= 1

    def notify_room(self) -> None:
        """Wakes those who wait for room."""
        self._room.notify()

    def _full(self, text: str) -> Refusal:
        wait = max(0.01, len(self._waiting) * self._seconds_per_image)
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{text}; try again in {wait:.2f} seconds")

    def _decode(self) -> None:
        leave_cores()
        while (job := self._waiting.get()) is not None:
            if not job.wanted:
                continue
            try:
                prepared = job.active.scorer.extractor.read(job.image, self._max_pixels)
            except Exception as error:  # noqa: BLE001 - handed to the caller, who logs it
                _fail(job.result, error)
                continue
            self._ready.put(_Ready(job, prepared))

    def _compute(self) -> None:
        while (first := self._ready.get()) is not None:
            batch = [ready for ready in self._fill(first) if ready.job.wanted and _claim(ready.job.result)]
            if not batch:
                continue
            started = time.monotonic()
            try:
                inspections = _inspect(batch)
            except Exception as error:  # noqa: BLE001 - handed to every caller of the batch, who logs it
                for ready in batch:
                    ready.job.result.set_exception(error)
                continue
            seconds = self._note_pace(started, len(batch))
            metrics.COMPUTE_SECONDS.observe(seconds)
            metrics.BATCH_IMAGES.observe(len(batch))
            for ready, inspection in zip(batch, inspections, strict=True):
                waited = started - ready.job.accepted
                metrics.QUEUE_SECONDS.observe(waited)
                image = ready.prepared
                ready.job.result.set_result(Scored(inspection, image.height, image.width, waited, seconds))

    def _note_pace(self, started: float, images: int) -> float:
        """Seconds of the batch; keeps what an image takes while there is work, a mean that forgets."""
        now = time.monotonic()
        pace = (now - max(self._done, started - self._max_delay)) / images
        self._seconds_per_image += _FORGETTING * (pace - self._seconds_per_image)
        self._done = now
        return now - started

    def _fill(self, first: _Ready) -> list[_Ready]:
        """Adds what is decoded, and what is about to be within the delay, up to the largest batch."""
        batch, until = [first], time.monotonic() + self._max_delay
        while len(batch) < self._max_batch:
            # Alone, an image waits for nobody: there is nothing to wait for.
            left = until - time.monotonic() if self._in_work > len(batch) else 0
            try:
                ready = self._ready.get(timeout=left) if left > 0 else self._ready.get_nowait()
            except queue.Empty:
                break
            if ready is None:
                self._ready.put(None)
                break
            batch.append(ready)
        return batch


def _late() -> Refusal:
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the image was computed")


def _claim(result: Future[Scored]) -> bool:
    """Whether the result is still wanted; from here on it cannot be cancelled."""
    return not result.done() and result.set_running_or_notify_cancel()


def _fail(result: Future[Scored], error: Exception) -> None:
    if _claim(result):
        result.set_exception(error)


def _inspect(batch: list[_Ready]) -> list[Inspection]:
    """Features once for all images of a backbone, distances by scorer; results in the order of the batch."""
    results: dict[int, Inspection] = {}
    scorers = [ready.job.active.scorer for ready in batch]
    for extractor in {scorer.extractor for scorer in scorers}:
        rows = [i for i, scorer in enumerate(scorers) if scorer.extractor is extractor]
        features = extractor(torch.stack([batch[i].prepared.pixels for i in rows]))
        for scorer in {scorers[i] for i in rows}:
            mine = [(position, i) for position, i in enumerate(rows) if scorers[i] is scorer]
            inspections = scorer.inspect_features(features[[position for position, _ in mine]])
            results.update(zip((i for _, i in mine), inspections, strict=True))
    return [results[i] for i in range(len(batch))]
