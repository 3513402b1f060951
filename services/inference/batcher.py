"""From waiting image to result: decoded in threads, scored in batches, refused what does not fit."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import torch
from opentelemetry.trace import Span, get_current_span
from torch import Tensor

from feddymem.backbone import FeatureExtractor, PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import TooManyPixelsError
from feddymem.scoring import Inspection
from feddymem.threads import leave_cores, workers
from services.inference import metrics
from services.inference.active import Active
from services.inference.fair_queue import FairQueue
from services.inference.large_images import SMALL_PIXELS, LargeImages
from services.runtime import tracing
from services.runtime.errors import Refusal

_FOR_ROOM = 256
"""Images of streams and of large requests that may wait outside the queue; their senders are held back meanwhile."""
Result = TypeVar("Result")
Read = Callable[[FeatureExtractor, EncodedImage | RawImage], PreparedImage]
"""Decodes an image for a backbone."""
Afterwards = Callable[["Scored | None"], None]
"""Called when the result is out and nobody waits; with None where there is no time for it."""

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
        features: (1, patches, channels) float32, what was scored; None unless something is to be done afterwards.
    """

    inspection: Inspection
    height: int
    width: int
    queue_seconds: float
    compute_seconds: float
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Job(Generic[Result]):
    active: Active
    image: EncodedImage | RawImage
    finish: Callable[[Scored], Result]
    accepted: float
    expires: float | None
    result: Future[Result]
    afterwards: Afterwards | None
    span: Span

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
    job: _Job[Any]
    prepared: PreparedImage
    decode_seconds: float


class Batcher:
    """Scores images. `start` before use, `stop` after.

    Its threads all do the same: take a waiting image, decode it, and, unless enough of them are at it, score what is
    decoded by then. So a single image goes through one thread from arrival to result.

    Args:
        max_batch: images computed together, at most.
        at_once: batches computed at once, at most.
        max_delay: seconds that a batch waits for images that are being decoded.
        queue_size: images waiting, at most.
        max_pixels: of an image.

    Attributes:
        large_images: room for those that are decoded or drawn.
    """

    def __init__(self, max_batch: int, at_once: int, max_delay: float, queue_size: int, max_pixels: int) -> None:
        self._max_batch, self._max_delay, self._max_pixels = max_batch, max_delay, max_pixels
        self.large_images = LargeImages(max_pixels)
        self._waiting: FairQueue[_Job[Any]] = FairQueue(queue_size)
        self.queue_size = queue_size
        self._in_work, self._counting = 0, threading.Lock()
        self._to_come: set[Future[Any]] = set()
        self._seconds_per_image = self._done = 0.0
        self._for_room: deque[asyncio.Future[None]] = deque()
        # Bounded, so that what waits for long waits undecoded, in the fair queue; each thread holds one besides.
        self._ready: queue.Queue[_Ready] = queue.Queue(max(1, max_batch - workers()))
        self._scoring = threading.Semaphore(at_once)
        self._threads = [threading.Thread(target=self._work, name=f"inspect-{n}") for n in range(workers())]

    @property
    def queue_length(self) -> int:
        """Images that wait to be decoded."""
        return len(self._waiting)

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads after the work that is accepted."""
        self._waiting.close()
        for thread in self._threads:
            thread.join()

    def admit(self, caller: str, seconds_left: float | None) -> None:
        """Refuses what `inspect` would refuse now, so that an image without a chance need not even be received.

        Raises:
            Refusal: as that of `inspect`.
        """
        self._require_time(caller, seconds_left)
        if not self._waiting.admits(caller):
            raise self._full()

    async def inspect(
        self,
        active: Active,
        image: EncodedImage | RawImage,
        finish: Callable[[Scored], Result],
        caller: str = "",
        seconds_left: float | None = None,
        afterwards: Afterwards | None = None,
    ) -> Result:
        """Decodes and scores one image.

        Args:
            active: what scores it.
            image: not decoded.
            finish: makes the result of the score; called in a thread.
            caller: who asks; callers are served in turn.
            seconds_left: until nobody waits for the result any more.
            afterwards: what more is to be done of the score, by the way: called in a thread, or with None as soon as
                other images wait for it.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where the queue is full or the time left is less than the wait, with a hint when
                to try again; DEADLINE_EXCEEDED where time ran out.
            ImageError: the image cannot be decoded.
        """
        try:
            self._require_time(caller, seconds_left)
        except Refusal:
            self.notify_room()  # whoever was told of room and comes too late leaves it to the next
            raise
        now = time.monotonic()
        expires = None if seconds_left is None else now + seconds_left
        job = _Job[Result](active, image, finish, now, expires, Future(), afterwards, get_current_span())
        self._accept(job.result)
        refused = self._waiting.put(job, caller)
        if refused is not None:
            full = self._full()
            if refused is job:  # nothing has changed for those who wait for room
                job.result.cancel()
                raise full
            _fail(refused.result, full)
        try:
            result = await asyncio.wrap_future(job.result)
        except asyncio.CancelledError:
            self._waiting.remove(job, caller)  # its place is free at once
            raise
        finally:
            self.notify_room()
        metrics.DURATION.observe(time.monotonic() - now)
        return result

    def _accept(self, result: Future[Any]) -> None:
        with self._counting:
            self._to_come.add(result)
            self._in_work += 1
            metrics.WAITING.set(self._in_work)
        result.add_done_callback(self._leave)  # knows no job: with its image it would wait for a garbage collection

    def _leave(self, result: Future[Any]) -> None:
        """At once, not when the event loop gets to it: a batch would wait for what nobody wants any more."""
        with self._counting:
            self._to_come.discard(result)
            self._in_work -= 1
            metrics.WAITING.set(self._in_work)

    async def room(self, seconds: float | None) -> None:
        """Waits until another inspection is done, at most so long.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where as many wait here as are allowed.
        """
        if len(self._for_room) >= _FOR_ROOM:
            raise self._exhausted(f"{len(self._for_room)} images of streams wait for room, as many as are allowed")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._for_room.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # told of room, and does not use it
                self.notify_room()
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._for_room.remove(waiter)

    def read(self, extractor: FeatureExtractor, image: EncodedImage | RawImage) -> PreparedImage:
        """Decodes an image; a large one as soon as there is room for it.

        Raises:
            ImageError: see `FeatureExtractor.read`.
        """
        try:
            return extractor.read(image, min(SMALL_PIXELS, self._max_pixels))
        except TooManyPixelsError as error:  # nothing is decoded by then
            pixels = error.pixels
        with self.large_images.room(pixels):
            return extractor.read(image, self._max_pixels)

    def notify_room(self) -> None:
        """Wakes who waits for room the longest."""
        while self._for_room:
            waiter = self._for_room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _require_time(self, caller: str, seconds_left: float | None) -> None:
        wait = self._waiting.ahead(caller) * self._seconds_per_image
        if seconds_left is None or wait < seconds_left:
            return
        if seconds_left <= 0:
            raise _late()
        raise self._exhausted(f"images wait for about {wait:.3f} seconds, longer than the {seconds_left:.3f} left")

    def _full(self) -> Refusal:
        return self._exhausted(f"{self.queue_size} inspections are waiting, as many as are allowed")

    def _exhausted(self, text: str) -> Refusal:
        wait = max(0.01, len(self._waiting) * self._seconds_per_image)
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{text}; try again in {wait:.2f} seconds")

    def _work(self) -> None:
        leave_cores()
        while not self._waiting.ended:
            if (job := self._waiting.get()) is not None and job.wanted:
                self._decode(job)
            self._score_ready()

    def _decode(self, job: _Job[Any]) -> None:
        started = time.monotonic()
        try:
            prepared = self.read(job.active.scorer.extractor, job.image)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who logs it
            _fail(job.result, error)
        else:
            ended = time.monotonic()
            seconds = ended - started
            metrics.DECODE_SECONDS.observe(seconds)
            tracing.add_part(job.span, "queue", job.accepted, started)
            tracing.add_part(job.span, "decode", started, ended)
            self._ready.put(_Ready(job, prepared, seconds))

    def _score_ready(self) -> None:
        """Scores what is decoded, unless enough threads do; those look again after they have let go."""
        while not self._ready.empty() and self._scoring.acquire(blocking=False):
            try:
                scored = self._score([ready for ready in self._fill() if ready.job.wanted and _claim(ready.job.result)])
            finally:
                self._scoring.release()
            if scored and not self._ready.empty():
                self._waiting.wake()  # who had nothing to do but these, so that they do not wait for these results
            for ready, result in scored:
                _finish(ready.job, result)
            self._go_on([(ready.job.afterwards, result) for ready, result in scored if ready.job.afterwards])

    def _go_on(self, left: list[tuple[Afterwards, Scored]]) -> None:
        """What is to be done when results are out, as long as no image waits for this thread or the processor."""
        for afterwards, scored in left:
            idle = not len(self._waiting) and self._ready.empty() and self._scoring.acquire(blocking=False)
            if not idle:
                afterwards(None)
                continue
            try:
                afterwards(scored)
            finally:
                self._scoring.release()

    def _score(self, batch: list[_Ready]) -> list[tuple[_Ready, Scored]]:
        if not batch:
            return []
        started = time.monotonic()
        inspections, features = _inspect(batch)
        seconds = self._note_pace(started, len(batch))
        metrics.COMPUTE_SECONDS.observe(seconds)
        metrics.BATCH_IMAGES.observe(len(batch))
        scored = []
        for number, (ready, inspection) in enumerate(zip(batch, inspections, strict=True)):
            if isinstance(inspection, Exception):
                ready.job.result.set_exception(inspection)
                continue
            tracing.add_part(ready.job.span, "compute", started, started + seconds, batch_images=len(batch))
            image, waited = ready.prepared, started - ready.job.accepted
            metrics.QUEUE_SECONDS.observe(waited - ready.decode_seconds)
            kept = features.get(number)
            scored.append((ready, Scored(inspection, image.height, image.width, waited, seconds, kept)))
        return scored

    def _note_pace(self, started: float, images: int) -> float:
        """Seconds of the batch; keeps what an image takes while there is work, a mean that forgets."""
        now = time.monotonic()
        with self._counting:
            pace = (now - max(self._done, started - self._max_delay)) / images
            self._seconds_per_image += _FORGETTING * (pace - self._seconds_per_image)
            self._done = now
        return now - started

    def _fill(self) -> list[_Ready]:
        """What is decoded, and what is about to be within the delay, up to the largest batch."""
        batch: list[_Ready] = []
        until = time.monotonic() + self._max_delay
        while len(batch) < self._max_batch:
            # Alone, an image waits for nobody: there is nothing to wait for.
            left = until - time.monotonic() if batch and self._to_come else 0
            try:
                ready = self._ready.get(timeout=left) if left > 0 else self._ready.get_nowait()
            except queue.Empty:
                break
            with self._counting:
                self._to_come.discard(ready.job.result)
            batch.append(ready)
        return batch


def _late() -> Refusal:
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the image was computed")


def _finish(job: _Job[Any], scored: Scored) -> None:
    started = time.monotonic()
    try:
        with metrics.ENCODE_SECONDS.time():
            result = job.finish(scored)
    except Exception as error:  # noqa: BLE001 - handed to the caller, who logs it
        job.result.set_exception(error)
    else:
        tracing.add_part(job.span, "encode", started, time.monotonic())
        job.result.set_result(result)


def _claim(result: Future[Any]) -> bool:
    """Whether the result is still wanted; from here on it cannot be cancelled."""
    return not result.done() and result.set_running_or_notify_cancel()


def _fail(result: Future[Any], error: Exception) -> None:
    if _claim(result):
        result.set_exception(error)


def _inspect(batch: list[_Ready]) -> tuple[list[Inspection | Exception], dict[int, Tensor]]:
    """Features once for all images of a backbone, distances by scorer; results in the order of the batch, and features
    of those images of which more is to be done.

    What one backbone or scorer raises is the result of its own images, and handed to their callers, who log it.
    """
    results: dict[int, Inspection | Exception] = {}
    kept: dict[int, Tensor] = {}
    scorers = [ready.job.active.scorer for ready in batch]
    for extractor in {scorer.extractor for scorer in scorers}:
        rows = [i for i, scorer in enumerate(scorers) if scorer.extractor is extractor]
        try:
            features = extractor(torch.stack([batch[i].prepared.pixels for i in rows]))
        except Exception as error:  # noqa: BLE001 - see above
            results.update(dict.fromkeys(rows, error))
            continue
        kept |= {i: features[n : n + 1] for n, i in enumerate(rows) if batch[i].job.afterwards}
        for scorer in {scorers[i] for i in rows}:
            mine = [position for position, i in enumerate(rows) if scorers[i] is scorer]
            images = [rows[position] for position in mine]
            try:
                results.update(zip(images, scorer.inspect_features(features[mine]), strict=True))
            except Exception as error:  # noqa: BLE001 - see above
                results.update(dict.fromkeys(images, error))
    return [results[i] for i in range(len(batch))], kept
