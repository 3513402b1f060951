"""From waiting image to result: decoded in threads, scored in batches, refused what does not fit."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc
from opentelemetry.trace import get_current_span

from feddymem.image_data import EncodedImage, RawImage
from feddymem.threads import leave_cores, workers
from services.inference import metrics
from services.inference.active import Active
from services.inference.batch import inspect_batch
from services.inference.fair_queue import FairQueue
from services.inference.job import Afterwards, Decoded, Job, Result, Scored, late
from services.inference.large_images import LargeImages
from services.inference.pace import Pace
from services.inference.room import Room
from services.runtime import tracing
from services.runtime.errors import Refusal

_FOR_ROOM = 256
"""Images of streams and of large requests that may wait outside the queue; their senders are held back meanwhile."""


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
        queue_size: as above.
    """

    def __init__(self, max_batch: int, at_once: int, max_delay: float, queue_size: int, max_pixels: int) -> None:
        self._max_batch, self._max_delay = max_batch, max_delay
        self.large_images = LargeImages(max_pixels)
        self._waiting: FairQueue[Job[Any]] = FairQueue(queue_size)
        self.queue_size = queue_size
        self._room = Room(_FOR_ROOM)
        self._pace = Pace(max_delay)
        # Accepted, and not in a batch yet. Needs no lock: adding one, and discarding one, are atomic.
        self._to_come: set[Future[Any]] = set()
        # Bounded, so that what waits for long waits undecoded, in the fair queue; each thread holds one besides.
        self._ready: queue.Queue[Decoded] = queue.Queue(max(1, max_batch - workers()))
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
            self._room.notify()  # whoever was told of room and comes too late leaves it to the next
            raise
        now = time.monotonic()
        expires = None if seconds_left is None else now + seconds_left
        job = Job[Result](active, image, finish, now, expires, Future(), afterwards, get_current_span())
        self._accept(job.result)
        refused = self._waiting.put(job, caller)
        if refused is not None:
            full = self._full()
            if refused is job:  # nothing has changed for those who wait for room
                job.result.cancel()
                raise full
            refused.fail(full)
        try:
            result = await asyncio.wrap_future(job.result)
        except asyncio.CancelledError:
            self._waiting.remove(job, caller)  # its place is free at once
            raise
        finally:
            self._room.notify()
        metrics.DURATION.observe(time.monotonic() - now)
        return result

    def _accept(self, result: Future[Any]) -> None:
        self._to_come.add(result)
        metrics.WAITING.inc()
        result.add_done_callback(self._leave)  # knows no job: with its image it would wait for a garbage collection

    def _leave(self, result: Future[Any]) -> None:
        """At once, not when the event loop gets to it: a batch would wait for what nobody wants any more."""
        self._to_come.discard(result)
        metrics.WAITING.dec()

    async def room(self, seconds: float | None) -> None:
        """Waits until another inspection is done, at most so long.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where as many wait here as are allowed.
        """
        if self._room.crowded:
            raise self._exhausted(f"{_FOR_ROOM} images of streams wait for room, as many as are allowed")
        await self._room.wait(seconds)

    def _require_time(self, caller: str, seconds_left: float | None) -> None:
        wait = self._pace.seconds(self._waiting.ahead(caller))
        if seconds_left is None or wait < seconds_left:
            return
        if seconds_left <= 0:
            raise late()
        raise self._exhausted(f"images wait for about {wait:.3f} seconds, longer than the {seconds_left:.3f} left")

    def _full(self) -> Refusal:
        return self._exhausted(f"{self.queue_size} inspections are waiting, as many as are allowed")

    def _exhausted(self, text: str) -> Refusal:
        wait = max(0.01, self._pace.seconds(len(self._waiting)))
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{text}; try again in {wait:.2f} seconds")

    def _work(self) -> None:
        leave_cores()
        while not self._waiting.ended:
            if (job := self._waiting.get()) is not None and job.wanted:
                self._decode(job)
            self._score_ready()

    def _decode(self, job: Job[Any]) -> None:
        started = time.monotonic()
        try:
            prepared = self.large_images.read(job.active.scorer.extractor, job.image)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who logs it
            job.fail(error)
        else:
            ended = time.monotonic()
            seconds = ended - started
            metrics.DECODE_SECONDS.observe(seconds)
            tracing.add_part(job.span, "queue", job.accepted, started)
            tracing.add_part(job.span, "decode", started, ended)
            self._ready.put(Decoded(job, prepared, seconds))

    def _score_ready(self) -> None:
        """Scores what is decoded, unless enough threads do; those look again after they have let go."""
        while not self._ready.empty() and self._scoring.acquire(blocking=False):
            try:
                scored = self._score([ready for ready in self._fill() if ready.job.wanted and ready.job.claim()])
            finally:
                self._scoring.release()
            if scored and not self._ready.empty():
                self._waiting.wake()  # who had nothing to do but these, so that they do not wait for these results
            for ready, result in scored:
                ready.job.answer(result)
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

    def _score(self, batch: list[Decoded]) -> list[tuple[Decoded, Scored]]:
        if not batch:
            return []
        started = time.monotonic()
        results = inspect_batch(
            [ready.job.active.scorer for ready in batch], [ready.prepared.pixels for ready in batch]
        )
        done = time.monotonic()
        seconds = done - started
        self._pace.note(started, done, len(batch))
        metrics.COMPUTE_SECONDS.observe(seconds)
        metrics.BATCH_IMAGES.observe(len(batch))
        scored = []
        for ready, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                ready.job.result.set_exception(result)
                continue
            tracing.add_part(ready.job.span, "compute", started, done, batch_images=len(batch))
            image, waited = ready.prepared, started - ready.job.accepted
            metrics.QUEUE_SECONDS.observe(waited - ready.seconds)
            inspection, features = result
            kept = features if ready.job.afterwards else None
            scored.append((ready, Scored(inspection, image.height, image.width, waited, seconds, kept)))
        return scored

    def _fill(self) -> list[Decoded]:
        """What is decoded, and what is about to be within the delay, up to the largest batch."""
        batch: list[Decoded] = []
        until = time.monotonic() + self._max_delay
        while len(batch) < self._max_batch:
            # Alone, an image waits for nobody: there is nothing to wait for.
            left = until - time.monotonic() if batch and self._to_come else 0
            try:
                ready = self._ready.get(timeout=left) if left > 0 else self._ready.get_nowait()
            except queue.Empty:
                break
            self._to_come.discard(ready.job.result)
            batch.append(ready)
        return batch
