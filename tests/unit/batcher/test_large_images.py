"""Large images: together they have no more pixels than one may have, whatever threads there are."""

from __future__ import annotations

import asyncio
import threading

import pytest

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError, TooManyPixelsError
from services.inference.batcher import Batcher
from services.inference.large_images import SMALL_PIXELS, LargeImages
from tests.unit.batcher.fakes import SECONDS, Extractor, active, as_it_is, begun, image, scores

MOST = 10 * SMALL_PIXELS


class OfSizes(Extractor):
    """Reads images that have as many millions of pixels as their number says; knows how many are read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._counting = threading.Lock()

    def read(self, image: EncodedImage | RawImage, max_pixels: int) -> PreparedImage:
        pixels = int(bytes(image.data)) * 2**20
        if pixels > max_pixels:
            raise TooManyPixelsError(f"{pixels} pixels; at most {max_pixels} are allowed", pixels)
        with self._counting:
            self._now += pixels
            self.most = max(self.most, self._now)
        try:
            return super().read(image, max_pixels)
        finally:
            with self._counting:
                self._now -= pixels


async def test_images_that_are_too_large_together_are_decoded_one_after_the_other() -> None:
    extractor = OfSizes()
    extractor.reading.close()
    batcher = Batcher(1, 1, 0, 64, MOST)
    batcher.start()
    try:
        tasks = await begun([batcher.inspect(active(extractor), image(size), as_it_is) for size in (30, 31, 4)])
        await extractor.reading.come(2)  # one of the large ones, and the small one, which waits for nobody
        assert extractor.most in (34 * 2**20, 35 * 2**20)
        extractor.reading.open()
        assert await scores(tasks) == [30, 31, 4]
    finally:
        extractor.reading.open()
        await asyncio.to_thread(batcher.stop)
    assert extractor.most <= MOST + SMALL_PIXELS


async def test_an_image_that_is_larger_than_any_may_be_is_told_the_limit() -> None:
    large_images = LargeImages(MOST)
    with pytest.raises(ImageError, match=f"at most {MOST} are allowed"):
        large_images.read(OfSizes(), image(99))  # type: ignore[arg-type]
    assert large_images.read(OfSizes(), image(40)).height == 40  # type: ignore[arg-type]


def test_room_is_waited_for_by_large_images_only() -> None:
    large_images, passed = LargeImages(MOST), threading.Event()

    def wait() -> None:
        with large_images.room(MOST - 1):
            passed.set()

    waiting = threading.Thread(target=wait)
    with large_images.room(2 * MOST), large_images.room(SMALL_PIXELS):
        waiting.start()
        assert not passed.is_set()
    waiting.join(SECONDS)
    assert passed.is_set()
